"""Cases of the Triton optimizer step, against torch.optim in fp64, and of compressed states."""

from __future__ import annotations

from dataclasses import replace

import torch

from ffengine.ops.optim import OptimConfig, OptimState, optim_call
from ffengine.ops.optimizer_step import step_arguments
from tests import compressed_step_cases
from tests.kernels.check import Banded
from tests.tolerances import assert_close

STEPS = 3
BASE = {"lr": 0.05, "betas": (0.9, 0.99)}
CASES = {
    "optimizer-sgd": {"kind": "sgd"},
    "optimizer-sgd-decay": {"kind": "sgd", "weight_decay": 0.1},
    "optimizer-sgd-momentum": {"kind": "sgd", "momentum": 0.9, "weight_decay": 0.1},
    "optimizer-sgd-nesterov": {"kind": "sgd", "momentum": 0.9, "nesterov": True},
    "optimizer-adam": {"kind": "adam"},
    "optimizer-adam-decay": {"kind": "adam", "weight_decay": 0.1},
    "optimizer-adamw": {"kind": "adamw", "weight_decay": 0.1},
    "optimizer-adamw-bf16": {"kind": "adamw", "weight_decay": 0.1, "grad": torch.bfloat16},
    "optimizer-sgd-fp16": {"kind": "sgd", "momentum": 0.9, "grad": torch.float16},
}
COMPRESSED = {**compressed_step_cases.CASES, **compressed_step_cases.GRADIENTS_16}
#: (settings, state format, dtype of the 16-bit copy) of steps whose numbers come from memory.
FROM_MEMORY = {
    "optimizer-row-sgd": ({"kind": "sgd", "weight_decay": 0.1}, "fp32", torch.float16),
    "optimizer-row-adam": ({"kind": "adam", "weight_decay": 0.1}, "fp32", torch.bfloat16),
    "optimizer-row-adamw": ({"kind": "adamw", "weight_decay": 0.1}, "fp32", None),
    "optimizer-row-8bit": ({"kind": "adamw", "weight_decay": 0.1}, "8bit", torch.bfloat16),
    "optimizer-row-bf16": ({"kind": "sgd", "momentum": 0.9}, "bf16", torch.float16),
}
#: one above a block, and a multiple of 16
SHAPES = ((41, 25), (16, 4, 3, 3))


def twin(optim: OptimConfig, weight: torch.Tensor) -> torch.optim.Optimizer:
    """torch's own optimizer of the same settings."""
    if optim.kind == "sgd":
        return torch.optim.SGD([weight], optim.lr, momentum=optim.momentum,
                               weight_decay=optim.weight_decay, nesterov=optim.nesterov)
    made = torch.optim.Adam if optim.kind == "adam" else torch.optim.AdamW
    return made([weight], optim.lr, betas=optim.betas, eps=optim.eps,
                weight_decay=optim.weight_decay)


def check(name: str, device: str) -> None:
    """Some steps of the kernel between guard bands, of torch in fp64 and of torch in fp32."""
    settings = {**BASE, **CASES[name]}
    dtype = settings.pop("grad", torch.float32)
    optim = OptimConfig(**settings)
    for shape in SHAPES:
        rng = torch.Generator().manual_seed(0)
        start = torch.randn(shape, generator=rng).to(device)
        if len(shape) == 4:  # the gradients below stay contiguous
            start = start.contiguous(memory_format=torch.channels_last)
        zero = torch.zeros_like(start)
        weight, m, v = Banded(start, True), Banded(zero, True), Banded(zero, True)
        same, exact = start.clone(), start.double()
        twins = [twin(optim, same), twin(optim, exact)]
        for taken in range(STEPS):
            grad = Banded(torch.randn(shape, generator=rng).to(device).to(dtype), True)
            step(weight.view, grad.view, OptimState(m.view, v.view, taken), optim, 0.25)
            for parameter, torch_step in zip((same, exact), twins, strict=True):
                parameter.grad = grad.view.to(parameter.dtype) * 0.25
                torch_step.step()
            grad.check("grad", written=False)
        for what, banded in (("weight", weight), ("m", m), ("v", v)):
            banded.check(what, written=True)
        assert_close(weight.view, exact, same, reduction=STEPS, what=f"weight {shape}")


def row_of(optim: OptimConfig, step: int) -> torch.Tensor:
    """The numbers of a step as the kernels read them from memory."""
    from ffengine.kernels.weight_update import scalars

    numbers = scalars(optim_call(optim, step), 1.0)
    row = torch.zeros(8)
    row[:3] = torch.tensor([numbers.decay, numbers.step_size, numbers.root_correction])
    row.view(torch.int32)[7] = step
    return row


def check_row(name: str, device: str) -> None:
    """A row and a 16-bit copy change no bit of the step; other numbers in the row do."""
    settings, form, half_dtype = FROM_MEMORY[name]
    optim = OptimConfig(**BASE, **settings)
    rng = torch.Generator().manual_seed(0)
    shape = (24, 19, 3, 3)
    start = torch.randn(shape, generator=rng).to(device).contiguous(
        memory_format=torch.channels_last)
    config = OptimConfig(**{**settings, "state_precision": form})
    state = OptimState.create(start, config, seed=7, name=name)
    assert state.format == form or settings["kind"] == "sgd"

    def run(steps: list[int], from_memory: bool, half: torch.Tensor | None) -> list[torch.Tensor]:
        weight = Banded(start, True)
        held = {k: Banded(t, True) for k, t in state.tensors().items()}
        views = {"m": None, "v": None, **{k: b.view for k, b in held.items()}}
        gradients = torch.Generator().manual_seed(1)
        for count in steps:
            grad = torch.randn(shape, generator=gradients).to(device, torch.bfloat16)
            grad = grad.contiguous(memory_format=torch.channels_last)
            row = row_of(optim, count).to(device) if from_memory else None
            now = OptimState(**views, step=0 if from_memory else count - 1, seed=state.seed,
                             stream=state.stream)
            step(weight.view, grad, now, replace(optim, lr=9.0) if from_memory else optim, 0.25,
                 half, row)
        for what, banded in {"weight": weight, **held}.items():
            banded.check(what, written=True)
        return [weight.view, *(b.view for b in held.values())]

    copy = None if half_dtype is None else Banded(start.to(half_dtype), False)
    plain = run([1, 2, 5], False, None)
    ours = run([1, 2, 5], True, None if copy is None else copy.view)
    for a, b in zip(plain, ours, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(plain[0], run([1, 2, 6], True, None)[0]) or settings["kind"] == "sgd"
    if copy is not None:
        copy.check("half", written=True)
        assert torch.equal(copy.view, ours[0].to(half_dtype))


def step(weight: torch.Tensor, grad: torch.Tensor, state: OptimState, optim: OptimConfig,
         inv_scale: float, half: torch.Tensor | None = None,
         row: torch.Tensor | None = None) -> None:
    """The Triton kernel, as compressed_step_cases.check calls it."""
    from ffengine.kernels import weight_update as kernels

    tensors, _, call = step_arguments(weight, grad, state, optim, inv_scale, half, row)
    kernels.optimizer_step(tensors, call)
