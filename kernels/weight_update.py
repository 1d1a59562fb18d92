"""The optimizer step of `weight_update`: SGD, Adam and AdamW in one sweep over the weights.

reference: ffengine/reference/weight_update.py   op: ffengine/ops/weight_update.py
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

#: fp32 elements a program owns: 128 threads with two 16-byte loads a tensor each.
BLOCK = 1024
KINDS = ("sgd", "adam", "adamw")


class Scalars(NamedTuple):
    """A step's numbers, all floats: Triton compiles nothing anew when their values change."""

    inv_scale: float  # 1 / da_scale
    decay: float  # weight decay (sgd, adam); lr * weight decay (adamw)
    beta1: float  # momentum for sgd
    one_minus_beta1: float  # 1 for sgd: its buffer is an undamped sum
    beta2: float
    one_minus_beta2: float
    step_size: float  # lr, divided by the first moment's bias correction for Adam
    root_correction: float  # sqrt of the second moment's bias correction
    eps: float


class Variant(NamedTuple):
    """Compile-time choices."""

    kind: str
    momentum: bool
    nesterov: bool
    block: int


@triton.jit
def optimizer_kernel(p_weight, p_grad, p_m, p_v, numel, s, v: tl.constexpr):
    """One optimizer step in place, g = grad / da_scale; all tensors (numel,).

    sgd:   g += decay w;  m = momentum m + g;  w -= lr (g + momentum m if nesterov else m)
    adam:  g += decay w;  m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2;
           w -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
    adamw: w -= lr decay w first, no decay in g; then as adam
    """
    i = tl.program_id(0).to(tl.int64) * v.block + tl.arange(0, v.block)
    b = i < numel
    w = tl.load(p_weight + i, mask=b, other=0.0)
    g = tl.load(p_grad + i, mask=b, other=0.0).to(tl.float32) * s.inv_scale
    if v.kind == "adamw":
        w -= s.decay * w
    else:
        g += s.decay * w
    if v.kind == "sgd":
        if v.momentum:
            m = s.beta1 * tl.load(p_m + i, mask=b, other=0.0) + g
            tl.store(p_m + i, m, mask=b)
            g = g + s.beta1 * m if v.nesterov else m
        w -= s.step_size * g
    else:
        m = tl.load(p_m + i, mask=b, other=0.0)
        m += s.one_minus_beta1 * (g - m)
        square = tl.load(p_v + i, mask=b, other=0.0)
        square = s.beta2 * square + s.one_minus_beta2 * g * g
        tl.store(p_m + i, m, mask=b)
        tl.store(p_v + i, square, mask=b)
        w -= s.step_size * m / (tl.sqrt(square) / s.root_correction + s.eps)
    tl.store(p_weight + i, w, mask=b)


def scalars(optim: Any, step: int, inv_scale: float) -> Scalars:
    """Bias corrections and products on the host, in double. Pure: unit-tested without a GPU."""
    if optim.kind == "sgd":
        return Scalars(float(inv_scale), float(optim.weight_decay), float(optim.momentum), 1.0,
                       0.0, 0.0, float(optim.lr), 1.0, 0.0)
    beta1, beta2 = optim.betas
    decay = optim.weight_decay * (optim.lr if optim.kind == "adamw" else 1.0)
    return Scalars(float(inv_scale), float(decay), float(beta1), 1.0 - beta1, float(beta2),
                   1.0 - beta2, optim.lr / (1.0 - beta1**step),
                   math.sqrt(1.0 - beta2**step), float(optim.eps))


def optimizer_step(weight: torch.Tensor, grad: torch.Tensor, m: torch.Tensor | None,
                   v: torch.Tensor | None, *, optim: Any, step: int, inv_scale: float) -> None:
    """Step `weight` (fp32) and the states m, v (fp32) in place with grad * inv_scale.

    m: first moment or SGD's momentum buffer, zeros before step 1; v: second moment. grad: fp32,
    bf16 or fp16; copied first where its memory order is not weight's. Semantics of torch.optim,
    step 1 the first.
    """
    variant = Variant(optim.kind, optim.kind == "sgd" and optim.momentum != 0.0,
                      optim.kind == "sgd" and bool(optim.nesterov), BLOCK)
    _check(weight, grad, m, v, variant, step)
    numel = weight.numel()
    if numel == 0:
        return
    if not _same_order(grad, weight):
        grad = torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
    with torch.cuda.device_of(weight):
        optimizer_kernel[(triton.cdiv(numel, BLOCK),)](
            weight, grad, m, v, numel, scalars(optim, step, inv_scale), v=variant,
            num_warps=4, enable_fp_fusion=True)


def _same_order(t: torch.Tensor, weight: torch.Tensor) -> bool:
    """Both contiguous or both channels_last: one flat index serves both."""
    return any(t.is_contiguous(memory_format=f) and weight.is_contiguous(memory_format=f)
               for f in (torch.contiguous_format, torch.channels_last)
               if f is torch.contiguous_format or weight.dim() == 4)


def _check(weight: torch.Tensor, grad: torch.Tensor, m: torch.Tensor | None,
           v: torch.Tensor | None, variant: Variant, step: int) -> None:
    if variant.kind not in KINDS:
        raise ValueError(f"[weight_update] optimizer must be one of {', '.join(KINDS)}, "
                         f"got {variant.kind!r}")
    if step < 1:
        raise ValueError(f"[weight_update] step counts from 1, got {step}")
    adam = variant.kind != "sgd"
    needed = {"weight": weight, "grad": grad}
    if adam or variant.momentum:
        needed["m"] = m
    if adam:
        needed["v"] = v
    for name, t in needed.items():
        if t is None:
            raise ValueError(f"[weight_update] {variant.kind} needs the state {name}, got None")
        if name != "grad" and t.dtype is not torch.float32:
            raise TypeError(f"[weight_update] {name} must be float32, got {t.dtype}")
        if t.shape != weight.shape:
            raise ValueError(f"[weight_update] {name} must have the weight's shape "
                             f"{tuple(weight.shape)}, got {tuple(t.shape)}")
        if name != "grad" and not _same_order(t, weight):
            raise ValueError("[weight_update] weight and states must all be contiguous or all "
                             f"channels_last, got strides {t.stride()} of {name}")
