"""Where a result was measured (ffengine.provenance), and the one timing loop.

    python -m bench.machine [FOLDER]      digest of a tree's sources, as results without .git say it
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ffengine.env import machine_class
from ffengine.ops import backends
from ffengine.provenance import ROOT, digest, facts, source

__all__ = ["ROOT", "clock", "cpu_time", "digest", "facts", "interleaved", "machine_class", "ratio",
           "source", "spread", "synchronize"]

#: What steps are timed by: `cpu_time` changes it.
clock: Callable[[], float] = time.perf_counter


@contextlib.contextmanager
def cpu_time() -> Iterator[None]:
    """Inside, steps run in one thread and are timed by the process's own processor seconds: other
    work on the machine then counts only through what it shares with this core."""
    global clock
    ext, threads, before = backends.extension(), torch.get_num_threads(), clock
    try:
        clock = time.process_time
        torch.set_num_threads(1)
        if ext is not None:
            ext.set_num_threads(1)
        yield
    finally:
        clock = before
        torch.set_num_threads(threads)
        if ext is not None:
            ext.set_num_threads(0)  # its default again


def interleaved(sides: dict[str, Callable[[], Any]], rounds: int,
                warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every call: all sides in turn, `rounds` times, in one process."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name, call in sides.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of ours / theirs over the rounds that both have: both saw the same machine."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=False))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(digest(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
