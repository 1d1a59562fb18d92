"""What this machine can do: bytes copied and products per second, and what a call costs.

Measured here and now, with cold operands, at the size and dtype asked for; the roofline of
`ffengine profile`, the floor of the benchmarks and the check of device profiles all read them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ffengine.ops import product

#: Enough to push everything out of the caches that matter.
FLUSH_BYTES = 1 << 28
#: Side of the square product that stands for a machine's arithmetic as a whole.
SIDE = {"cpu": 1024, "cuda": 4096}
#: Runs of which the least counts: whatever else the machine does can only slow one down.
RUNS = 7
#: Calls whose mean is the cost of one.
LAUNCHES = 200


@dataclass(frozen=True)
class Rates:
    """A machine's rates: bytes read and written per second, FLOP per second by dtype (a
    multiply-add is two), and seconds that a call on almost nothing takes."""

    bytes_per_second: float
    flops_per_second: dict[torch.dtype, float]
    launch_seconds: float

    def floor(self, nbytes: float, flops: float, dtype: torch.dtype) -> float:
        """Least seconds for so much traffic and arithmetic: the roofline."""
        return max(nbytes / self.bytes_per_second, flops / self.flops_per_second[dtype])


def machine_rates(dtype: torch.dtype | Sequence[torch.dtype],
                  device: torch.device | str) -> Rates:
    """Measured rates of `device` for one dtype or several; takes about a second."""
    device = torch.device(device)
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    side = SIDE.get(device.type, SIDE["cuda"])
    return Rates(copy_rate(device), {d: product_rate(side, side, side, d, device) for d in dtypes},
                 launch_seconds(device))


@functools.cache
def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a copy out of cold memory; measured once a process."""
    source = torch.randn(FLUSH_BYTES // 16, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / cold(lambda: target.copy_(source), device)


@functools.cache
def product_rate(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP per second of (m, k) x (k, n) in `dtype`; measured once a process."""
    return 2 * m * k * n / product_seconds(m, k, n, dtype, device)


def product_seconds(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of the faster library's product (m, k) x (k, n) with cold operands."""
    x, weight = (torch.randn(s, device=device).to(dtype) for s in ((m, k), (n, k)))
    return cold(lambda: product.linear(x, weight), device)


def launch_seconds(device: torch.device) -> float:
    """Seconds a call takes from Python to its end on almost nothing."""
    x = torch.zeros(1, device=device)
    times = []
    for _ in range(3):
        start = _now(device)
        for _ in range(LAUNCHES):
            x.add_(1.0)
        times.append((_now(device) - start) / LAUNCHES)
    return min(times)


def cold(call: Callable[[], Any], device: torch.device) -> float:
    """Least of RUNS cold runs, after one to warm the library up."""
    flush = torch.empty(FLUSH_BYTES // 4, device=device)
    times = []
    for _ in range(1 + RUNS):
        flush.fill_(0)
        start = _now(device)
        call()
        times.append(_now(device) - start)
    return min(times[1:])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()
