"""`weight_update` in plain PyTorch: the definition of correct, in fp32 and fp64.

16-bit inputs are multiplied in fp32; the optimizers are torch.optim's, operation by operation.
"""

from __future__ import annotations

import math

import torch

from ffengine.ops.optim import OptimConfig


def weight_gradient(x: torch.Tensor, da: torch.Tensor, weight: torch.Tensor, stride: int,
                    padding: int, groups: int = 1) -> torch.Tensor:
    """dW = sum_n,p,q da[n, o, p, q] x[n, c, p s + i - pad, q s + j - pad], in weight's dtype.

    Of the weight only shape, dtype and layout count.
    """
    if x.shape[0] == 0 or da.numel() == 0:
        return torch.zeros_like(weight)
    x, da = x.to(weight.dtype), da.to(weight.dtype)
    if weight.dim() == 2:
        return da.t() @ x
    gradient: torch.Tensor = torch.ops.aten.convolution_backward(
        da, x, weight, None, [stride, stride], [padding, padding], [1, 1], False, [0, 0],
        groups, [False, True, False])[1]
    return gradient


def bias_gradient(da: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum of da over samples and pixels: (O,)."""
    over = [0, *range(2, da.dim())]
    # a GPU widens in registers; a CPU would copy da inside the sum
    return da.sum(over, dtype=dtype) if da.device.type != "cpu" else da.to(dtype).sum(over)


def optimizer_step(weight: torch.Tensor, grad: torch.Tensor, m: torch.Tensor | None,
                   v: torch.Tensor | None, optim: OptimConfig, step: int) -> None:
    """One step of torch.optim's Adam, AdamW or SGD; `step` is 1 at the first."""
    if optim.kind == "adamw":
        weight.mul_(1 - optim.lr * optim.weight_decay)
    elif optim.weight_decay:
        grad = grad.add(weight, alpha=optim.weight_decay)
    if optim.kind == "sgd":
        if m is not None:
            m.mul_(optim.momentum).add_(grad)
            grad = grad.add(m, alpha=optim.momentum) if optim.nesterov else m
        weight.add_(grad, alpha=-optim.lr)
        return
    if m is None or v is None:
        raise ValueError(f"[optimizer] {optim.kind} expected states m and v, got none")
    beta1, beta2 = optim.betas
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    denominator = v.sqrt().div_(math.sqrt(correction2)).add_(optim.eps)
    weight.addcdiv_(m, denominator, value=-optim.lr / correction1)
