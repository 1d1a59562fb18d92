"""Time on a device: calls in one CUDA graph or between two events, on cold data, in rounds.

A graph holds the same call on several sets of data, together more than the cache takes, so that
each finds its own cold, and a replay has no host in it. Sides take turns, round after round, for
they must see the same machine; a reading is the mean over a graph's calls. On a processor a clock
stands for the graph.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.gpu.scale import Scale

Call = Callable[[], Any]
#: Seconds of one call.
Reading = Callable[[], float]
#: Data is cold when so many times the cache went by since.
TIMES_L2 = 4
#: Kernels of a step that a row names, and characters of a name (a library's tell tiles and widths).
MOST_NAMES, NAME_LENGTH = 24, 120


def sets_for(nbytes: int, scale: Scale) -> int:
    """Sets of data whose traffic of `nbytes` each is TIMES_L2 times the last cache."""
    if scale.device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(3, -(-TIMES_L2 * cache // max(nbytes, 1)))


def reading(calls: Sequence[Call], device: torch.device, replays: int = 1) -> Reading:
    """Seconds a call over `replays` of all calls, in a graph on a GPU; each call has been made."""
    if device.type != "cuda":
        return lambda: _by_clock(calls, replays)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return lambda: between_events(graph.replay, replays)[0] / len(calls)


def between_events(call: Call, times: int) -> tuple[float, float]:
    """(seconds of the device, seconds of the host until all was enqueued), a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begun = time.perf_counter()
    start.record()
    for _ in range(times):
        call()
    end.record()
    host = time.perf_counter() - begun
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / times, host / times


def _by_clock(calls: Sequence[Call], replays: int) -> float:
    begun = time.perf_counter()
    for _ in range(replays):
        for call in calls:
            call()
    return (time.perf_counter() - begun) / replays / len(calls)


def rounds(sides: dict[str, Reading], count: int) -> dict[str, list[float]]:
    """Readings of every side in turn, `count` times, the order turned round each time."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(count):
        for name in list(sides)[::1 if turn % 2 == 0 else -1]:
            found[name].append(sides[name]())
    return found


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def kernels(call: Call, device: torch.device) -> list[tuple[str, float]] | None:
    """(name, seconds) of the kernels that a call starts on a GPU, in order, and of the library's
    ops on a processor; None where the profiler sees none."""
    gpu = device.type == "cuda"
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * gpu]) as seen:
        call()
        if gpu:
            torch.cuda.synchronize()
    events = seen.profiler.kineto_results.events()
    found = sorted((e for e in events if e.device_type() == wanted
                    and not e.name().startswith(("Memcpy", "Memset"))), key=lambda e: e.start_ns())
    return [(e.name(), e.duration_ns() / 1e9) for e in found] or None


def summed(found: list[tuple[str, float]] | None) -> dict[str, Any]:
    """How many kernels a call started, and which took most of its time: [calls, seconds] by name
    without its template's arguments, MOST_NAMES of them."""
    by_name: dict[str, list[float]] = {}
    for name, seconds in found or ():
        held = by_name.setdefault(name.split("<")[0].split("(")[0][:NAME_LENGTH], [0, 0.0])
        held[0], held[1] = held[0] + 1, held[1] + seconds
    longest = sorted(by_name.items(), key=lambda pair: -pair[1][1])[:MOST_NAMES]
    return {"launches": None if found is None else len(found), "kernels": dict(longest)}
