"""The least time a local step could take: sum over ops of max(bytes / copy rate, product time).

Rates are measured on the same machine at the op's own size, with cold inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from bench.machine import synchronize
from bench.sides import Problem
from ffengine.nn import LocalNet
from ffengine.ops import local_pass as sweep

#: Enough to push everything out of the caches that matter.
FLUSH_BYTES = 1 << 28


def seconds(problem: Problem) -> float:
    """Floor of one training step of `problem`."""
    net, dtype = problem.network(), problem.dtype
    rate = copy_rate(problem.x.device)
    known: dict[Any, float] = {}
    total = 0.0
    for i in range(len(net.layers)):
        rows, inner, out, moved = sizes(net, i, problem.batch, dtype)
        if (rows, inner, out) not in known:
            # forward and weight gradient are the same arithmetic: the better product's rate
            known[rows, inner, out] = min(
                product_seconds(*shape, dtype, problem.x.device)
                for shape in ((rows, inner, out), (out, rows, inner)))
        weights = net.layer(i).weight.numel()
        total += 2 * max(known[rows, inner, out], moved / rate)
        shape = (problem.batch, *net.layer(i).out_shape(net.input_of(i, net.shapes[i])))
        total += sweep.bytes_moved(shape, dtype, net.layer(i).config) / rate
        total += weights * 4 * 2 * (1 + problem.optim.states) / rate  # weight and states, both ways
    return total


def sizes(net: LocalNet, i: int, batch: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(pixels, patch, channels, bytes) of layer i's product over patches."""
    seen = net.input_of(i, net.shapes[i])
    a = net.layer(i).out_shape(seen)
    weight = net.layer(i).weight
    rows, inner = batch * _count(a[1:]), weight[0].numel()
    moved = dtype.itemsize * (batch * (_count(seen) + _count(a)) + weight.numel())
    return rows, inner, a[0], moved


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for s in shape:
        total *= s
    return total


def product_seconds(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(s, device=device).to(dtype) for s in ((m, k), (k, n)))
    return cold(lambda: torch.mm(a, b), device)


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a copy out of cold memory."""
    source = torch.randn(FLUSH_BYTES // 16, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / cold(lambda: target.copy_(source), device)


def cold(call: Callable[[], Any], device: torch.device) -> float:
    """Least of three cold runs, after one to warm the library up."""
    flush = torch.empty(FLUSH_BYTES // 4, device=device)
    times = []
    for _ in range(4):
        flush.fill_(0)
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
