"""`weight_update`: the weight gradient and the optimizer as one act.

dW[o, c, i, j] = sum over samples n and pixels p, q of da[n, o, p, q] x[n, c, p s + i - pad,
q s + j - pad], straight into Adam, AdamW or SGD; a linear layer is the 1x1 case.

reference: ffengine/reference/weight_update.py   cpu: csrc/cpu/weight_update.cpp, gemm*
triton: kernels/weight_update.py                 cuda: csrc/cuda/weight_update.cu
(on GPUs the library forms the gradient and one fused kernel steps the optimizer)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from ffengine.ops import backends
from ffengine.reference import weight_update as reference

OPTIM_CODES = {"sgd": 0, "adam": 1, "adamw": 2}
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class OptimConfig:
    """An optimizer with the semantics of torch.optim (bias correction included)."""

    kind: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.kind not in OPTIM_CODES:
            raise ValueError(
                f"[optimizer] kind must be one of {', '.join(OPTIM_CODES)}, got {self.kind!r}")
        if self.nesterov and (self.kind != "sgd" or self.momentum <= 0):
            raise ValueError("[optimizer] nesterov expected sgd with momentum > 0, got "
                             f"{self.kind} with momentum={self.momentum}")
        for name, value in (("lr", self.lr), ("eps", self.eps), ("momentum", self.momentum),
                            ("weight_decay", self.weight_decay)):
            if not value >= 0:
                raise ValueError(f"[optimizer] {name} must be 0 or more, got {value}")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"[optimizer] betas must lie in [0, 1), got {self.betas}")

    @property
    def states(self) -> int:
        """How many state tensors of the weight's shape the optimizer keeps."""
        return (1 if self.momentum else 0) if self.kind == "sgd" else 2


@dataclass(frozen=True)
class ConvGeometry:
    """A convolution's kernel, stride and zero padding."""

    kernel: tuple[int, int]
    stride: int = 1
    padding: int = 0

    def __post_init__(self) -> None:
        if min(self.kernel) < 1 or self.stride < 1 or self.padding < 0:
            raise ValueError("[conv] expected kernel >= 1, stride >= 1, padding >= 0, got "
                             f"kernel={self.kernel} stride={self.stride} padding={self.padding}")

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(P, Q) of an input of this size."""
        return ((height + 2 * self.padding - self.kernel[0]) // self.stride + 1,
                (width + 2 * self.padding - self.kernel[1]) // self.stride + 1)


LINEAR = ConvGeometry((1, 1))


@dataclass
class OptimState:
    """State of one weight: m (Adam's first moment, SGD's momentum), v, steps taken."""

    m: torch.Tensor | None
    v: torch.Tensor | None
    step: int = 0

    @classmethod
    def create(cls, weight: torch.Tensor, config: OptimConfig) -> OptimState:
        """Zeros in the weight's dtype (fp32, or fp64) and memory layout."""
        m, v = (torch.zeros_like(weight, requires_grad=False) if config.states > i else None
                for i in range(2))
        return cls(m, v)


@dataclass(frozen=True, slots=True)
class OptimCall:
    """An optimizer step's numbers, as the kernels read them (csrc/params.h: OptimParams)."""

    kind: int
    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    momentum: float
    nesterov: bool
    step: int


@dataclass(frozen=True, slots=True)
class WeightUpdateCall:
    """A call's numbers (csrc/params.h: WeightUpdateParams)."""

    x_channels_last: bool
    da_channels_last: bool
    weight_channels_last: bool
    accumulate: bool
    finish: bool
    inv_scale: float
    optim: OptimCall | None


class Parameter(NamedTuple):
    """A parameter with what belongs to it: weight or bias."""

    value: torch.Tensor
    state: OptimState | None
    accumulate: torch.Tensor | None
    grad_out: torch.Tensor | None


def optim_call(optim: OptimConfig, step: int) -> OptimCall:
    """The flat form of `optim` at its `step`-th update (1 at the first)."""
    return OptimCall(OPTIM_CODES[optim.kind], optim.lr, optim.weight_decay, *optim.betas,
                     optim.eps, optim.momentum, optim.nesterov, step)


def weight_update(
    weight: torch.Tensor,
    x: torch.Tensor,
    da: torch.Tensor,
    *,
    optim: OptimConfig,
    state: OptimState | None,
    geometry: ConvGeometry | None = None,
    accumulate: torch.Tensor | None = None,
    finish: bool = True,
    grad_out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    bias_state: OptimState | None = None,
    bias_accumulate: torch.Tensor | None = None,
    bias_grad_out: torch.Tensor | None = None,
    da_scale: float = 1.0,
    backend: str = "auto",
) -> None:
    """Add the gradient of these samples to the sum so far and, with `finish`, step the optimizer.

    Args:
        weight: (O, C, kH, kW) or (O, in), fp32 (fp64: reference only), contiguous or
            channels_last; updated in place. State, accumulate and grad_out share its layout.
        x: layer input (N, C, H, W) or (N, in), fp32 | bf16 | fp16, contiguous or channels_last;
            other strides are copied first.
        da: gradient at the pre-activation (N, O, P, Q) or (N, O), dtype of x, times da_scale.
        state: of `weight`; its step rises by one when finish is set. May be None otherwise.
        geometry: None for a linear layer.
        accumulate: buffer like weight, zeroed by the caller before the first tile; the gradient is
            added into it (with finish too). None: these samples are all there are.
        grad_out: receives the finished gradient, before weight decay.
        bias, bias_state, bias_accumulate, bias_grad_out: the same for the layer's bias (O,).
        da_scale: power of two that da was multiplied by (fp16).

    Raises:
        TypeError, ValueError: one line with what was expected and what came.
    """
    main = Parameter(weight, state, accumulate, grad_out)
    extra = None if bias is None else Parameter(bias, bias_state, bias_accumulate, bias_grad_out)
    _check(main, extra, x, da, optim, geometry, finish)
    name = backends.resolve("weight_update", backend, x.device.type, x.dtype)
    shape = geometry or LINEAR
    with torch.no_grad():
        _update_weight(main, _dense(x), _dense(da), optim, shape, finish, da_scale, name)
        if extra is not None:
            grad = reference.bias_gradient(da, bias.dtype)  # type: ignore[union-attr]
            finish_gradient(extra, grad, optim, finish, da_scale, name)
    if finish:
        for p in (main, extra):
            if p is not None and p.state is not None:
                p.state.step += 1


def _update_weight(p: Parameter, x: torch.Tensor, da: torch.Tensor, optim: OptimConfig,
                   geometry: ConvGeometry, finish: bool, da_scale: float, backend: str) -> None:
    grad = reference.weight_gradient(x, da, p.value, geometry.stride, geometry.padding)
    finish_gradient(p, grad, optim, finish, da_scale, backend)


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


def optimizer_step(weight: torch.Tensor, grad: torch.Tensor, state: OptimState,
                   optim: OptimConfig, inv_scale: float, backend: str) -> None:
    """One optimizer step with gradient grad * inv_scale; state.step is left as it is."""
    if inv_scale != 1.0:
        grad = grad * inv_scale
    reference.optimizer_step(weight, grad, state.m, state.v, optim, state.step + 1)


def _dense(t: torch.Tensor) -> torch.Tensor:
    return t if t.is_contiguous() or _channels_last(t) else t.contiguous()


def _channels_last(t: torch.Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def _check(main: Parameter, bias: Parameter | None, x: torch.Tensor, da: torch.Tensor,
           optim: OptimConfig, geometry: ConvGeometry | None, finish: bool) -> None:
    weight = main.value
    if x.dtype not in (*DTYPE_CODES, torch.float64) or da.dtype != x.dtype:
        raise TypeError("[weight_update] x and da must share a dtype of float32, bfloat16, "
                        f"float16 or float64, got {x.dtype} and {da.dtype}")
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    if weight.dtype is not wide:
        raise TypeError(f"[weight_update] weight must be {wide} for {x.dtype} inputs, "
                        f"got {weight.dtype}")
    _check_shapes(weight, x, da, geometry)
    for role, p in (("weight", main), ("bias", bias)):
        if p is not None:
            _check_parameter(role, p, optim, finish, weight)
    if bias is not None and tuple(bias.value.shape) != (weight.shape[0],):
        raise ValueError(f"[weight_update] bias must be ({weight.shape[0]},), "
                         f"got {tuple(bias.value.shape)}")
    if not x.device == da.device == weight.device:
        raise ValueError("[weight_update] weight, x and da must share a device, got "
                         f"{weight.device}, {x.device} and {da.device}")


def _check_shapes(weight: torch.Tensor, x: torch.Tensor, da: torch.Tensor,
                  geometry: ConvGeometry | None) -> None:
    dims = 2 if geometry is None else 4
    if not weight.dim() == x.dim() == da.dim() == dims:
        kind = "a linear layer" if geometry is None else "a convolution"
        raise ValueError(f"[weight_update] weight, x and da of {kind} must have {dims} dimensions, "
                         f"got {weight.dim()}, {x.dim()} and {da.dim()}")
    if geometry is not None and tuple(weight.shape[2:]) != tuple(geometry.kernel):
        raise ValueError(f"[weight_update] weight must have the geometry's kernel "
                         f"{tuple(geometry.kernel)}, got shape {tuple(weight.shape)}")
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"[weight_update] x must have {weight.shape[1]} channels as the weight, "
                         f"got shape {tuple(x.shape)}")
    out = () if geometry is None else geometry.output_size(x.shape[2], x.shape[3])
    if min(out, default=1) < 1:
        raise ValueError(f"[weight_update] x is smaller than the kernel: {tuple(x.shape)} with "
                         f"{geometry}")
    expected = (x.shape[0], weight.shape[0], *out)
    if tuple(da.shape) != expected:
        raise ValueError(f"[weight_update] da must be {expected}, got {tuple(da.shape)}")


def _check_parameter(role: str, p: Parameter, optim: OptimConfig, finish: bool,
                     weight: torch.Tensor) -> None:
    if finish and p.state is None:
        raise ValueError(f"[weight_update] finish=True expected a state for the {role}, got None")
    if not (p.value.is_contiguous() or _channels_last(p.value)) or p.value.dtype != weight.dtype:
        raise ValueError(f"[weight_update] {role} must be dense {weight.dtype}, got strides "
                         f"{p.value.stride()} {p.value.dtype}")
    state = p.state if finish else None
    if state is not None and [state.m is not None, state.v is not None] != [
            optim.states > 0, optim.states > 1]:
        raise ValueError(f"[weight_update] {optim.kind} expected {optim.states} state tensors for "
                         f"the {role}: make the state with OptimState.create(weight, optim)")
    for name, t in (("state.m", state and state.m), ("state.v", state and state.v),
                    ("accumulate", p.accumulate), ("grad_out", p.grad_out)):
        if t is not None and (t.shape != p.value.shape or t.dtype != p.value.dtype
                              or t.device != p.value.device or not _same_layout(t, p.value)):
            raise ValueError(
                f"[weight_update] {name} of the {role} must be {tuple(p.value.shape)} "
                f"{p.value.dtype} with the {role}'s strides {p.value.stride()}, got "
                f"{tuple(t.shape)} {t.dtype} with {t.stride()}")


def _same_layout(t: torch.Tensor, like: torch.Tensor) -> bool:
    return (like.is_contiguous() and t.is_contiguous()) or (
        _channels_last(like) and _channels_last(t))
