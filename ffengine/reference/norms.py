"""Normalisations in plain PyTorch: the definition of correct, in any dtype up to fp64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ffengine.ops.config import BatchNorm, LocalPassConfig, Norm


def standardised(x: torch.Tensor, eps: float,
                 centre: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(x̂, 1 / sigma) of every sample of x (N, ...) over all its elements, as layer norm has them:
    x̂ = (x - mean) / sqrt(var + eps), var biased; without `centre` by the mean square."""
    dims = list(range(1, x.dim()))
    centred = x - x.mean(dims, keepdim=True) if centre else x
    rstd = torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
    return centred * rstd, rstd


def by_length(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """x / (||x|| + eps) row by row of x (N, m), ||x|| the l2 norm or the root mean square."""
    square = (x * x).sum(1, keepdim=True)
    if norm.length == "rms":
        square = square / x.shape[1]
    return x / (square.sqrt() + norm.eps)


def batch_normed(h: torch.Tensor, config: LocalPassConfig, coupling: BatchNorm,
                 running: tuple[torch.Tensor | None, torch.Tensor | None],
                 affine: tuple[torch.Tensor | None, torch.Tensor | None],
                 own: bool) -> torch.Tensor:
    """torch's BatchNorm of h (N, C, ...), pooled before or after it where the config pools.

    own: by the batch's statistics, which then move the running ones.
    """
    pools = config.pool == "max2"
    if pools and coupling.order == "pool_norm":
        h = F.max_pool2d(h, 2)
    h = F.batch_norm(h, *running, *affine, own, coupling.momentum, coupling.eps)
    return F.max_pool2d(h, 2) if pools and coupling.order == "norm_pool" else h
