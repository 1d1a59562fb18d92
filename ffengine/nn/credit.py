"""Credit: what one loss asks every parameter of a whole network to change.

Backpropagation's here; networks that assign it in another way have `gradients` of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

#: (mean loss, logits (N, classes), gradients by the parameter's name).
Credit = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def backpropagated(net: Any, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> Credit:
    """Of the mean cross-entropy of a LocalNet's scores, end to end.

    Args:
        x, y: samples (N, *in_shape) in the parameters' dtype, labels int64 (N,).
        dtype: bf16 for products in 16 bits.
    """
    with cast(x, dtype):
        logits = net.differentiable_logits(x)
        loss = F.cross_entropy(logits.to(x.dtype), y)
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss, logits, {n: g for n, g in zip(named, found, strict=True) if g is not None}


@contextlib.contextmanager
def cast(x: torch.Tensor, dtype: torch.dtype) -> Iterator[None]:
    """Products in 16 bits, where that is what `dtype` says."""
    if dtype is not torch.bfloat16:
        yield
        return
    with torch.autocast(x.device.type, dtype):
        yield
    torch.clear_autocast_cache()  # of weights; inside another autocast they would live on
