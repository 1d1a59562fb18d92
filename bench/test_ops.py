"""pytest-benchmark suite of the ops: `make bench`, or pytest bench --benchmark-json FILE.

No shape is timed before its check is green; bytes, GB/s and the machine go into extra_info.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import batch_pass as coupled
from bench import linear_step as linear
from bench import machine
from bench.local_pass import GROUPS, RESNET17, check
from ffengine.nn.convolution import convolve
from ffengine.ops import linear_step
from ffengine.ops.config import LocalPassConfig
from ffengine.ops.local_pass import bytes_moved, local_pass
from ffengine.ops.optim import ConvGeometry, OptimConfig, OptimState
from ffengine.ops.weight_update import weight_update

BATCH = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = [pytest.param(c, size, id=f"{c}x{size}x{size}") for c, size, _ in RESNET17]


def maps(c: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(BATCH, c, size, size).to(dtype).contiguous(
        memory_format=torch.channels_last)


def timed(benchmark: Any, call: Any, **info: Any) -> None:
    benchmark.extra_info.update(info, machine=machine.facts())
    benchmark.pedantic(call, rounds=15, iterations=3, warmup_rounds=2)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("c", "size"), SHAPES)
def test_local_pass(benchmark: Any, c: int, size: int, precision: str) -> None:
    a, y = maps(c, size, DTYPES[precision]), torch.randint(0, GROUPS, (BATCH,))
    config = LocalPassConfig(groups=GROUPS)
    check(a, y, config, "auto")
    moved = bytes_moved(tuple(a.shape), a.dtype, config)
    timed(benchmark, lambda: local_pass(a, y, config=config, want_da=True, out=a), bytes=moved)
    benchmark.extra_info["gb_per_s"] = moved / benchmark.stats.stats.median / 1e9


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("c", "size"), SHAPES)
def test_weight_update(benchmark: Any, c: int, size: int, precision: str) -> None:
    x, da = (maps(c, size, DTYPES[precision]) for _ in range(2))
    weight = torch.randn(c, c, 3, 3).contiguous(memory_format=torch.channels_last)
    optim, geometry = OptimConfig(lr=1e-3), ConvGeometry((3, 3), 1, 1)
    exact = torch.empty_like(weight)
    ours = torch.empty_like(weight)
    for backend, out in (("reference", exact), ("auto", ours)):
        weight_update(weight.clone(memory_format=torch.preserve_format), x, da, optim=optim,
                      state=OptimState.create(weight, optim), geometry=geometry, grad_out=out,
                      backend=backend)
    assert (ours - exact).norm() <= 1e-2 * exact.norm()
    state = OptimState.create(weight, optim)
    flops = 2 * x.shape[0] * size * size * weight.numel()
    timed(benchmark, lambda: weight_update(weight, x, da, optim=optim, state=state,
                                           geometry=geometry), flops=flops)
    benchmark.extra_info["gflop_per_s"] = flops / benchmark.stats.stats.median / 1e9


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("c", "size"), SHAPES)
def test_convolve(benchmark: Any, c: int, size: int, precision: str) -> None:
    x, geometry = maps(c, size, DTYPES[precision]), ConvGeometry((3, 3), 1, 1)
    weight = torch.randn(c, c, 3, 3).to(x.dtype).contiguous(memory_format=torch.channels_last)
    exact = torch.nn.functional.conv2d(x, weight, None, 1, 1)
    assert (convolve(x, weight, None, geometry) - exact).norm() <= 1e-2 * exact.norm()
    timed(benchmark, lambda: convolve(x, weight, None, geometry))


@pytest.mark.parametrize("side", ["ours", "eager"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("rows", [4096, 50_000])
def test_linear_step(benchmark: Any, rows: int, precision: str, side: str) -> None:
    layer = linear.Layer(rows, 784, 500, DTYPES[precision])
    layer.check()
    call = getattr(layer, side)
    timed(benchmark, call, flops=4 * rows * 784 * 500, working_bytes=linear.metered(call, layer),
          bytes=linear_step.bytes_moved(tuple(layer.x.shape), tuple(layer.weight.shape),
                                        layer.x.dtype, linear.CONFIG, optim=linear.OPTIM))
    benchmark.extra_info["gflop_per_s"] = (
        benchmark.extra_info["flops"] / benchmark.stats.stats.median / 1e9)


@pytest.mark.parametrize("side", ["ours", "eager"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("c", "size", "pools"), coupled.CWCOMP)
def test_batch_pass(benchmark: Any, c: int, size: int, pools: bool, precision: str,
                    side: str) -> None:
    layer = coupled.Layer(BATCH, c, size, pools, DTYPES[precision])
    layer.check()
    timed(benchmark, getattr(layer, side), bytes=layer.moved)
    benchmark.extra_info["gb_per_s"] = layer.moved / benchmark.stats.stats.median / 1e9
