"""The CUDA optimizer step on a CUDA device against torch.optim's formulas in fp64."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

from ffengine.ops import backends
from ffengine.ops.optim import OptimConfig, optim_call
from ffengine.reference.weight_update import optimizer_step

CONFIGS = {
    "sgd": OptimConfig("sgd", lr=0.05),
    "momentum": OptimConfig("sgd", lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": OptimConfig("sgd", lr=0.05, momentum=0.9, nesterov=True),
    "adam": OptimConfig("adam", lr=0.05, weight_decay=0.1),
    "adamw": OptimConfig("adamw", lr=0.05, weight_decay=0.1),
}


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("n", [1, 7, 4096, 100_003])
@pytest.mark.parametrize("name", CONFIGS)
def test_three_steps(name: str, n: int, offset: int) -> None:
    optim, ext = CONFIGS[name], backends.extension()
    assert ext is not None and ext.has_cuda
    gen = torch.Generator().manual_seed(5)
    start = torch.randn(n, generator=gen)
    has_m, has_v = optim.kind != "sgd" or optim.momentum != 0, optim.kind != "sgd"
    room = [torch.zeros(n + offset, device="cuda")[offset:] for _ in range(3)]
    room[0].copy_(start)
    weight, m, v = room
    twins = [[start.to(d), torch.zeros(n, dtype=d) if has_m else None,
              torch.zeros(n, dtype=d) if has_v else None] for d in (torch.float64, torch.float32)]
    for step in (1, 2, 3):
        grad = torch.randn(n, generator=gen)
        given = torch.zeros(n + offset, device="cuda")[offset:].copy_(grad)
        ext.optimizer_step_cuda(
            weight.data_ptr(), m.data_ptr() if has_m else 0, v.data_ptr() if has_v else 0,
            given.data_ptr(), n, 0.25, optim_call(optim, step),
            torch.cuda.current_stream().cuda_stream)
        for w, first, second in twins:
            assert w is not None
            optimizer_step(w, grad.to(w.dtype) * 0.25, first, second, optim, step)
    for kernel, exact, same in zip(room, *twins, strict=True):
        if exact is not None and same is not None:
            assert_close(kernel.cpu(), exact, same, reduction=3, what=name)
