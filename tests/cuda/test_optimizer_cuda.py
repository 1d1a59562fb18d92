"""The CUDA optimizer steps on a CUDA device, against fp64: in fp32, and on rounded states."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tolerances import assert_close

from ffengine.ops import backends
from ffengine.ops.optim import OptimCall, OptimConfig, OptimState, compressed_call, optim_call
from ffengine.reference.weight_update import optimizer_step
from tests import compressed_step_cases

CONFIGS = {
    "sgd": OptimConfig("sgd", lr=0.05),
    "momentum": OptimConfig("sgd", lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": OptimConfig("sgd", lr=0.05, momentum=0.9, nesterov=True),
    "adam": OptimConfig("adam", lr=0.05, weight_decay=0.1),
    "adamw": OptimConfig("adamw", lr=0.05, weight_decay=0.1),
}
#: (addresses of weight, m, v and gradient, numel, inv_scale, call)
Plain = Callable[[int, int, int, int, int, float, OptimCall], None]


def three_steps(name: str, n: int, offset: int, device: str, step: Plain) -> None:
    """Against torch.optim's formulas."""
    optim = CONFIGS[name]
    gen = torch.Generator().manual_seed(5)
    start = torch.randn(n, generator=gen)
    has_m, has_v = optim.states > 0, optim.states > 1
    room = [torch.zeros(n + offset, device=device)[offset:] for _ in range(3)]
    room[0].copy_(start)
    weight, m, v = room
    twins = [[start.to(d, copy=True), torch.zeros(n, dtype=d) if has_m else None,
              torch.zeros(n, dtype=d) if has_v else None] for d in (torch.float64, torch.float32)]
    for count in (1, 2, 3):
        grad = torch.randn(n, generator=gen)
        given = torch.zeros(n + offset, device=device)[offset:].copy_(grad)
        step(weight.data_ptr(), m.data_ptr() if has_m else 0, v.data_ptr() if has_v else 0,
             given.data_ptr(), n, 0.25, optim_call(optim, count))
        for w, first, second in twins:
            assert w is not None
            optimizer_step(w, grad.to(w.dtype) * 0.25, first, second, optim, count)
    for kernel, exact, same in zip(room, *twins, strict=True):
        if exact is not None and same is not None:
            assert_close(kernel.cpu(), exact, same, reduction=3, what=name)


def plain(*arguments: object) -> None:
    ext = backends.extension()
    assert ext is not None and ext.has_cuda
    ext.optimizer_step_cuda(*arguments, torch.cuda.current_stream().cuda_stream)


def compressed(weight: torch.Tensor, grad: torch.Tensor, state: OptimState, optim: OptimConfig,
               inv_scale: float) -> None:
    """As compressed_step_cases.check calls it."""
    ext = backends.extension()
    assert ext is not None and ext.has_cuda
    tensors = (weight, grad, state.m, state.v, state.m_scale, state.v_scale)
    ext.compressed_step_cuda(*(0 if t is None else t.data_ptr() for t in tensors), weight.numel(),
                             inv_scale, compressed_call(weight, state, optim),
                             torch.cuda.current_stream().cuda_stream)


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("n", [1, 7, 4096, 100_003])
@pytest.mark.parametrize("name", CONFIGS)
def test_three_steps(name: str, n: int, offset: int) -> None:
    three_steps(name, n, offset, "cuda", plain)


@pytest.mark.gpu
@pytest.mark.parametrize("name", compressed_step_cases.CASES)
def test_compressed_step(name: str) -> None:
    compressed_step_cases.check(name, compressed_step_cases.CASES[name], compressed, "cuda")
