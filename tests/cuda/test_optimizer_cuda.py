"""The CUDA optimizer steps on a CUDA device, against fp64: in fp32, and on rounded states."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tolerances import assert_close

from ffengine.ops.launch import launch
from ffengine.ops.optim import OptimConfig, OptimState
from ffengine.ops.optimizer_step import step_arguments
from ffengine.reference.weight_update import optimizer_step
from tests import compressed_step_cases

CONFIGS = {
    "sgd": OptimConfig("sgd", lr=0.05),
    "momentum": OptimConfig("sgd", lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": OptimConfig("sgd", lr=0.05, momentum=0.9, nesterov=True),
    "adam": OptimConfig("adam", lr=0.05, weight_decay=0.1),
    "adamw": OptimConfig("adamw", lr=0.05, weight_decay=0.1),
}
#: What a step has besides: see csrc/params.h.
EXTRAS: dict[str, dict[str, Any]] = {
    "row": {"by_row": True},
    "bf16-gradient": {"grad_dtype": torch.bfloat16},
    "fp16-gradient-row": {"grad_dtype": torch.float16, "by_row": True},
    "bf16-copy": {"half_dtype": torch.bfloat16},
    "fp16-copy-gradient-row": {"grad_dtype": torch.float16, "half_dtype": torch.float16,
                               "by_row": True},
}


def row_of(optim: OptimConfig, step: int, device: str) -> torch.Tensor:
    """A step's numbers as the kernels read them from memory (csrc/params.h: OptimParams)."""
    row = torch.zeros(8)
    row[0] = optim.weight_decay * (optim.lr if optim.kind == "adamw" else 1.0)
    row[1] = optim.lr / (1.0 if optim.kind == "sgd" else 1.0 - optim.betas[0]**step)
    row[2] = 1.0 if optim.kind == "sgd" else math.sqrt(1.0 - optim.betas[1]**step)
    row.view(torch.int32)[7] = step
    return row.to(device)


def stale(optim: OptimConfig) -> OptimConfig:
    """The rate and decay of another step: what a captured launch would still say."""
    return replace(optim, lr=123.0, weight_decay=4.0)


def three_steps(name: str, n: int, offset: int, device: str, *,
                grad_dtype: torch.dtype = torch.float32, half_dtype: torch.dtype | None = None,
                by_row: bool = False) -> None:
    """Against torch.optim's formulas, on tensors `offset` elements past an aligned address."""
    optim = CONFIGS[name]
    gen = torch.Generator().manual_seed(5)
    start = torch.randn(n, generator=gen)
    has_m, has_v = optim.states > 0, optim.states > 1

    def room(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(n + offset, device=device, dtype=dtype)[offset:]

    weight, m, v = room().copy_(start), room(), room()
    half = None if half_dtype is None else room(half_dtype)
    twins = [[start.to(d, copy=True), torch.zeros(n, dtype=d) if has_m else None,
              torch.zeros(n, dtype=d) if has_v else None] for d in (torch.float64, torch.float32)]
    for count in (1, 2, 3):
        grad = room(grad_dtype).copy_(torch.randn(n, generator=gen))
        row = row_of(optim, count, device) if by_row else None
        state = OptimState(m if has_m else None, v if has_v else None, 6 if by_row else count - 1)
        launch("optimizer_step", "cuda", *step_arguments(
            weight, grad, state, stale(optim) if by_row else optim, 0.25, half, row))
        for w, first, second in twins:
            assert w is not None
            optimizer_step(w, grad.cpu().to(w.dtype) * 0.25, first, second, optim, count)
    for kernel, exact, same in zip((weight, m, v), *twins, strict=True):
        if exact is not None and same is not None:
            assert_close(kernel.cpu(), exact, same, reduction=3, what=name)
    if half is not None:
        assert torch.equal(half, weight.to(half.dtype))


def compressed(weight: torch.Tensor, grad: torch.Tensor, state: OptimState, optim: OptimConfig,
               inv_scale: float, half: torch.Tensor | None = None,
               row: torch.Tensor | None = None) -> None:
    """As compressed_step_cases.check calls it."""
    launch("compressed_step", "cuda",
           *step_arguments(weight, grad, state, optim, inv_scale, half, row))


def compressed_by_row(weight: torch.Tensor, grad: torch.Tensor, state: OptimState,
                      optim: OptimConfig, inv_scale: float) -> None:
    """The same with the step's numbers in memory, beside a stale call; and a 16-bit copy."""
    row = row_of(optim, state.step + 1, str(weight.device))
    wide = weight.dtype is torch.float32
    half = torch.empty_like(weight, dtype=torch.float16) if wide else None
    compressed(weight, grad, replace(state, step=90), stale(optim), inv_scale, half, row)
    assert half is None or torch.equal(half.nan_to_num(), weight.half().nan_to_num())


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("n", [1, 7, 4096, 100_003])
@pytest.mark.parametrize("name", CONFIGS)
def test_three_steps(name: str, n: int, offset: int) -> None:
    three_steps(name, n, offset, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("name", CONFIGS)
def test_extras(name: str, extras: str) -> None:
    three_steps(name, 4096, 0, "cuda", **EXTRAS[extras])


@pytest.mark.gpu
@pytest.mark.parametrize("name", compressed_step_cases.CASES | compressed_step_cases.GRADIENTS_16)
def test_compressed_step(name: str) -> None:
    case = (compressed_step_cases.CASES | compressed_step_cases.GRADIENTS_16)[name]
    compressed_step_cases.check(name, case, compressed, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", compressed_step_cases.CASES)
def test_compressed_step_by_row(name: str) -> None:
    compressed_step_cases.check(name, compressed_step_cases.CASES[name], compressed_by_row, "cuda")
