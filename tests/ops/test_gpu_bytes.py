"""What the ops hold on a GPU is what they declare: counted on CUDA tensors without values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import DEVICE, fake_cuda

from ffengine.engine.memory.meter import MemoryMeter
from ffengine.ops import backends, linear_step, local_pass, routes, weight_update
from ffengine.ops import batch_pass as coupled
from ffengine.ops.config import BatchNorm, LocalPassConfig, Norm, Peer, threshold
from ffengine.ops.optim import ConvGeometry, OptimConfig, OptimState, Parameter, compressed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
kernels = pytest.mark.parametrize("backend", ["triton", "cuda"])
LENGTH = Norm("length", eps=1e-4, length="l2")


@pytest.fixture(autouse=True)
def as_if_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel runs here: those that were not built count like those that were."""
    monkeypatch.setattr(backends, "why_not", lambda *_: None)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.empty(shape, dtype=dtype, device=DEVICE)
    return made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made


def held(call: Callable[[], Any], *given: torch.Tensor | None) -> int:
    """Most bytes live during the call, beside what it was given and what it gives back."""
    with MemoryMeter(feature=[t for t in given if t is not None]) as meter:
        before = meter.live_bytes
        made = call()
        results = meter.live_bytes - before
    del made
    return meter.report.peak_bytes - before - results


@kernels
@every
@pytest.mark.parametrize("pool", ["none", "max2"])
def test_local_pass(pool: Any, dtype: torch.dtype, backend: str) -> None:
    config, shape = LocalPassConfig(groups=10, pool=pool), (6, 40, 8, 8)
    with fake_cuda():
        a, y = empty(*shape, dtype=dtype), torch.empty(6, dtype=torch.int64, device=DEVICE)
        local_pass.local_pass(a, y, config=config, backend=backend)
        seen = held(lambda: local_pass.local_pass(a, y, config=config, want_da=True,
                                                  backend=backend), a, y)
        assert seen == local_pass.extra_bytes(shape, dtype, config, backend=backend,
                                              channels_last=True)


@kernels
@every
@pytest.mark.parametrize("coupling", [BatchNorm(), BatchNorm(order="norm_pool"), Peer()], ids=str)
def test_batch_pass(coupling: BatchNorm | Peer, dtype: torch.dtype, backend: str) -> None:
    peer = isinstance(coupling, Peer)
    shape = (64, 40) if peer else (16, 40, 8, 8)
    config = LocalPassConfig(groups=1, loss=threshold(2.0)) if peer else LocalPassConfig(
        groups=10, norm=Norm("none"), pool="max2")
    with fake_cuda():
        a, y = empty(*shape, dtype=dtype), torch.empty(shape[0], dtype=torch.int64, device=DEVICE)
        state = empty(shape[1]) if peer else None

        def call() -> Any:
            return coupled.batch_pass(a, y, config=config, coupling=coupling, running_mean=state,
                                      want_da=True, backend=backend)

        call()
        declared = coupled.extra_bytes(shape, dtype, config, coupling, backend=backend,
                                       channels_last=True)
        assert held(call, a, y, state) <= declared


@kernels
@every
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("accumulate", [False, True], ids=["alone", "adds"])
@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_weight_update_of_a_convolution(states: Any, accumulate: bool, groups: int,
                                        dtype: torch.dtype, backend: str) -> None:
    geometry, optim = ConvGeometry((3, 3), 1, 1, groups), OptimConfig(state_precision=states)
    with fake_cuda():
        weight, x = empty(64, 32 // groups, 3, 3), empty(8, 32, 16, 16, dtype=dtype)
        da, bias = empty(8, 64, 16, 16, dtype=dtype), empty(64)
        assert held(*update(weight, x, da, bias, geometry, optim, accumulate, backend)) <= (
            declared_update(weight, x, da, geometry, optim, accumulate, backend))


@kernels
@pytest.mark.parametrize(("dtype", "weight_dtype"), [
    *((d, torch.float32) for d in DTYPES), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_weight_update_of_a_dense_layer(dtype: torch.dtype, weight_dtype: torch.dtype,
                                        backend: str) -> None:
    with fake_cuda():
        weight = empty(50, 40, dtype=weight_dtype)
        x, da, bias = empty(64, 40, dtype=dtype), empty(64, 50, dtype=dtype), empty(50)
        assert held(*update(weight, x, da, bias, None, OptimConfig(), False, backend)) <= (
            declared_update(weight, x, da, None, OptimConfig(), False, backend))


def update(weight: torch.Tensor, x: torch.Tensor, da: torch.Tensor, bias: torch.Tensor,
           geometry: ConvGeometry | None, optim: OptimConfig, accumulate: bool,
           backend: str) -> tuple[Any, ...]:
    """A call, and what it is given."""
    states = [OptimState.create(t, optim) for t in (weight, bias)]
    sums = [torch.zeros_like(t, dtype=torch.float32) if accumulate else None
            for t in (weight, bias)]

    def call() -> None:
        weight_update.weight_update(
            Parameter(weight, states[0], sums[0]), x, da, optim=optim, geometry=geometry,
            bias=Parameter(bias, states[1], sums[1]), backend=backend)

    return (call, weight, x, da, bias, *sums, *(t for s in states for t in s.tensors().values()))


def declared_update(weight: torch.Tensor, x: torch.Tensor, da: torch.Tensor,
                    geometry: ConvGeometry | None, optim: OptimConfig, accumulate: bool,
                    backend: str) -> int:
    return weight_update.extra_bytes(
        tuple(x.shape), tuple(da.shape), tuple(weight.shape), x.dtype, geometry=geometry,
        accumulate=accumulate, bias=True, backend=backend, weight_dtype=weight.dtype,
        compressed=compressed(weight.numel(), weight.dtype, optim))


@kernels
@every
@pytest.mark.parametrize("norm", [Norm("none"), LENGTH], ids=["", "length"])
def test_linear_step(norm: Norm, dtype: torch.dtype, backend: str) -> None:
    config, optim = LocalPassConfig(groups=1, loss=threshold(2.0)), OptimConfig()
    with fake_cuda():
        weight, bias, x = empty(72, 130), empty(72), empty(300, 130, dtype=dtype)
        y = torch.empty(300, dtype=torch.int64, device=DEVICE)
        states = [OptimState.create(t, optim) for t in (weight, bias)]

        def call() -> Any:
            return linear_step.linear_step(
                Parameter(weight, states[0]), x, y, config=config, optim=optim,
                bias=Parameter(bias, states[1]), input_norm=norm, tile_rows=100, backend=backend)

        call()
        seen = held(call, weight, bias, x, y, *(t for s in states for t in s.tensors().values()))
        declared = linear_step.extra_bytes((300, 130), (72, 130), dtype, config, input_norm=norm,
                                           bias=True, tile_rows=100, backend=backend)
        assert seen <= declared


@every
@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize("pool", [False, True])
def test_routes(pool: bool, straight: bool, dtype: torch.dtype) -> None:
    shape = (6, 40, 9, 8)
    size = (6, 40, 4, 4) if pool else shape
    with fake_cuda():
        a, dz = empty(*shape, dtype=dtype), empty(*size, dtype=dtype)
        out = empty(*size, dtype=torch.uint8)
        seen = held(lambda: routes.routes(a, out, pool=pool, straight=straight), a, out)
        assert seen <= routes.extra_bytes(shape, dtype, pool=pool, straight=straight,
                                          backend="triton")
        seen = held(lambda: routes.along_routes(out, dz, shape[1:], pool=pool), out, dz)
        assert seen <= routes.extra_bytes(shape, dtype, pool=pool, along=True, backend="triton")
