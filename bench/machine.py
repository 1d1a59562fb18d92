"""What every result says about where it was measured, and the one timing loop."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from ffengine.env import cpu_name, machine_class
from ffengine.ops import backends


def facts() -> dict[str, Any]:
    """Hardware, versions and commit of this run, for `extra_info` and result files."""
    ext = backends.extension()
    cuda = torch.cuda.is_available()
    return {
        "class": machine_class(),
        "cpu": cpu_name(),
        "isa": ext.isa() if ext is not None else "none",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


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


def _git(*args: str) -> str:
    try:
        return subprocess.run(["git", *args], capture_output=True, text=True,
                              check=False).stdout.strip()
    except OSError:
        return ""
