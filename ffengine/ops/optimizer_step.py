"""One optimizer step with a gradient that exists in memory, on every back-end.

fp32 weights with fp32 states take the plain sweep; a bf16 weight, or states in fewer bits, are
decoded, stepped in fp32 and rounded stochastically in one sweep (`compressed_step`):

reference: ffengine/reference/state_formats.py   cpu: csrc/cpu/compressed_kernel.cpp
triton: kernels/weight_update.py                 cuda: csrc/cuda/compressed_step.cu
"""

from __future__ import annotations

import torch

from ffengine.ops.launch import Tensors, launch
from ffengine.ops.memory_accounting import is_fake
from ffengine.ops.optim import (
    DTYPE_CODES,
    FORMAT_DTYPES,
    STATE_CODES,
    OptimConfig,
    OptimState,
    Parameter,
    blocks,
    optim_call,
    state_format,
)
from ffengine.ops.params import StepCall
from ffengine.reference import state_formats
from ffengine.reference import weight_update as reference


def step_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients of weights of `dtype` are added up in, and steps computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def finish_gradient(p: Parameter, grad: torch.Tensor, optim: OptimConfig, finish: bool,
                    da_scale: float, backend: str) -> None:
    """A gradient that exists in memory (scaled by da_scale): add it up, step the optimizer."""
    inv_scale = 1.0 / da_scale
    if p.accumulate is not None:
        p.accumulate.add_(grad, alpha=inv_scale)
        grad, inv_scale = p.accumulate, 1.0
    if not finish:
        return
    if p.grad_out is not None:
        torch.mul(grad, inv_scale, out=p.grad_out)
    if p.state is not None:
        optimizer_step(p.value, grad, p.state, optim, inv_scale, backend)


def is_compressed(weight: torch.Tensor, state: OptimState) -> bool:
    """The step decodes and rounds."""
    return weight.dtype is torch.bfloat16 or state.format != "fp32"


def optimizer_step(weight: torch.Tensor, grad: torch.Tensor, state: OptimState,
                   optim: OptimConfig, inv_scale: float, backend: str) -> None:
    """One optimizer step with gradient grad * inv_scale; state.step is left as it is."""
    if backend == "reference":
        _reference_step(weight, grad, state, optim, inv_scale)
    else:
        half = row = None
        if backend == "cpu":
            grad = grad.float()
        else:
            half, row = None if state.half is None else state.half.copy, state.row
        launch("compressed_step" if is_compressed(weight, state) else "optimizer_step", backend,
               *step_arguments(weight, grad, state, optim, inv_scale, half, row))
    stepped(weight, state, backend)


def step_arguments(weight: torch.Tensor, grad: torch.Tensor, state: OptimState, optim: OptimConfig,
                   inv_scale: float, half: torch.Tensor | None = None,
                   row: torch.Tensor | None = None) -> tuple[Tensors, tuple[int], StepCall]:
    """The tensors, sizes and numbers of a step's kernel."""
    call = StepCall(optim_call(optim, state.step + 1), inv_scale,
                    0 if half is None else DTYPE_CODES[half.dtype])
    if is_compressed(weight, state):
        call = StepCall(*call[:3], STATE_CODES[state.format], weight.dtype is torch.bfloat16,
                        state.seed, state.stream)
    return ((grad, weight, state.m, state.v, state.m_scale, state.v_scale, half, row),
            (weight.numel(),), call)


def _reference_step(weight: torch.Tensor, grad: torch.Tensor, state: OptimState,
                    optim: OptimConfig, inv_scale: float) -> None:
    rounds = is_compressed(weight, state)
    grad = grad.float() if rounds else grad
    grad = grad if inv_scale == 1.0 else grad * inv_scale
    if rounds:
        state_formats.compressed_step(weight, grad, state, optim,
                                      chunks=1 if is_fake(weight) else None)
    else:
        reference.optimizer_step(weight, grad, state.m, state.v, optim, state.step + 1)


def stepped(weight: torch.Tensor, state: OptimState, backend: str) -> None:
    """Tell who watches the weight that a step has written into it, and bring its 16-bit copy up to
    date, which the GPUs' kernels have done."""
    if backend != "reference":  # there torch has told them
        torch.autograd.graph.increment_version(weight)
    if state.half is not None:
        if backend in ("reference", "cpu"):
            state.half.copy.copy_(weight)
        state.half.written(weight)


def check_state(op: str, role: str, value: torch.Tensor, state: OptimState,
                optim: OptimConfig) -> None:
    """ValueError unless the state is what OptimState.create(value, optim) makes, steps aside."""
    form = state_format(value.numel(), value.dtype, optim)
    dtype = torch.float64 if value.dtype is torch.float64 else FORMAT_DTYPES[form]
    for i, t in enumerate((state.m, state.v)):
        if (t is not None) != (optim.states > i):
            raise ValueError(f"[{op}] {optim.kind} expected {optim.states} state tensors for the "
                             f"{role}: make the state with OptimState.create(weight, optim)")
        if t is not None and not (t.shape == value.shape and t.dtype is dtype
                                  and t.device == value.device and same_layout(t, value)):
            raise ValueError(
                f"[{op}] state.{'mv'[i]} of the {role} must be {tuple(value.shape)} {dtype} with "
                f"the {role}'s strides {value.stride()}, got {tuple(t.shape)} {t.dtype} with "
                f"{t.stride()}")
    if form == "8bit":
        _check_scales(op, role, value, state, optim)


def _check_scales(op: str, role: str, value: torch.Tensor, state: OptimState,
                  optim: OptimConfig) -> None:
    wanted = (blocks(value.numel()),)
    for name, t in (("m_scale", state.m_scale), ("v_scale", state.v_scale))[:optim.states]:
        if t is None or tuple(t.shape) != wanted or t.dtype is not torch.float32 or (
                t.device != value.device or not t.is_contiguous()):
            came = "None" if t is None else f"{tuple(t.shape)} {t.dtype}"
            raise ValueError(f"[{op}] state.{name} of the {role} must be {wanted} torch.float32 on "
                             f"{value.device}, got {came}")


def same_layout(t: torch.Tensor, like: torch.Tensor) -> bool:
    return (like.is_contiguous() and t.is_contiguous()) or (
        is_channels_last(like) and is_channels_last(t))


def is_channels_last(t: torch.Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def as_laid_out(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if same_layout(grad, like):
        return grad
    return torch.empty_like(like, dtype=grad.dtype).copy_(grad)
