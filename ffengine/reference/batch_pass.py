"""`batch_pass` in plain PyTorch: the definition of correct, in any dtype up to fp64.

The formulas forward, autograd backward. 16-bit input is computed in fp32 and rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ffengine.ops.config import BatchNorm, LocalPassConfig, Peer
from ffengine.reference import local_pass as local


class BatchPassResult(NamedTuple):
    """As ffengine.ops.batch_pass.BatchPassOutput, without the scale of da."""

    z: torch.Tensor | None
    g: torch.Tensor
    loss: torch.Tensor | None
    coef: torch.Tensor | None
    da: torch.Tensor | None
    dgamma: torch.Tensor | None
    dbeta: torch.Tensor | None
    penalty: torch.Tensor | None


def batch_pass(
    a: torch.Tensor, y: Any = None, *, config: LocalPassConfig, coupling: BatchNorm | Peer,
    gamma: torch.Tensor | None = None, beta: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None, running_var: torch.Tensor | None = None,
    training: bool = True, want_z: bool = True, want_da: bool = False, da_scale: float = 1.0,
) -> BatchPassResult:
    """Arguments, shapes and meaning as in ffengine.ops.batch_pass."""
    x = a.detach()
    x = x.double() if a.dtype is torch.float64 else x.float()
    # dL/da = dL/dh times this: autograd needs to know nothing of straight-through gradients
    mask = torch.ones_like(x) if config.relu_gradient == "straight_through" else (x > 0).to(x.dtype)
    with torch.enable_grad():
        h = F.relu(x).requires_grad_()
        penalty = None
        sources = [h]
        if isinstance(coupling, BatchNorm):
            z, affine = batch_norm(h, config, coupling, gamma, beta, running_mean, running_var,
                                   training)
            g = local.goodness(z, config.offsets(a.shape[1]), config.goodness)
            sources += affine
        else:
            assert running_mean is not None  # the op checked
            z = local.normalise(h, config.offsets(a.shape[1]), config)
            g = local.goodness(h, config.offsets(a.shape[1]), config.goodness)
            penalty = peer_penalty(h, y, coupling, running_mean, training)
        loss = coef = da = dgamma = dbeta = None
        if y is not None:
            loss, dg = local.loss_and_gradient(g, y, config, a.shape[0])
            m = 1 if config.goodness == "sum_sq" else local._sizes(
                z, config.offsets(a.shape[1]))
            coef = dg / m
            ends, weights = [g], [dg]
            if penalty is not None and penalty.requires_grad:
                ends.append(penalty)
                weights.append(torch.ones_like(penalty))
            dh, *affine_gradients = torch.autograd.grad(ends, sources, weights)
            if affine_gradients:
                dgamma, dbeta = affine_gradients
            if want_da:
                da = (dh * mask * da_scale).to(a.dtype)
    return BatchPassResult(
        z.detach().to(a.dtype) if want_z else None, g.detach(), loss, coef, da, dgamma, dbeta,
        None if penalty is None else penalty.detach())


def batch_norm(h: torch.Tensor, config: LocalPassConfig, coupling: BatchNorm,
               gamma: torch.Tensor | None, beta: torch.Tensor | None,
               running_mean: torch.Tensor | None, running_var: torch.Tensor | None,
               training: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(z, [gamma, beta] as leaves, or [] without): BatchNorm of h, pooled on its way or not.

    Normalises by the biased variance over batch and pixels; the running variance takes the
    unbiased one, in place and after its use, as in torch.
    """
    pools = config.pool == "max2"
    p = F.max_pool2d(h, 2) if pools and coupling.order == "pool_norm" else h
    over = [d for d in range(p.dim()) if d != 1]
    mean = p.mean(over, keepdim=True)
    centred = p - mean
    var = (centred * centred).mean(over, keepdim=True)
    wide = mean.shape
    batch = (mean.detach(), var.detach())
    if coupling.use_running or not training:
        assert running_mean is not None and running_var is not None  # the op checked
        centred = p - running_mean.clone().view(wide)
        var = running_var.clone().view(wide)
    u = centred * torch.rsqrt(var + coupling.eps)
    affine = []
    if gamma is not None and beta is not None:
        affine = [t.detach().to(h.dtype).clone().requires_grad_() for t in (gamma, beta)]
        u = u * affine[0].view(wide) + affine[1].view(wide)
    if training and running_mean is not None and running_var is not None:
        n = p.numel() // p.shape[1]
        for state, value in ((running_mean, batch[0]), (running_var, batch[1] * (n / (n - 1)))):
            state.mul_(1 - coupling.momentum).add_(value.view(-1), alpha=coupling.momentum)
    return F.max_pool2d(u, 2) if pools and coupling.order == "norm_pool" else u, affine


def peer_penalty(h: torch.Tensor, y: Any, coupling: Peer, state: torch.Tensor,
                 training: bool) -> torch.Tensor:
    """weight mean_c (mean(r') - r'_c)^2, and r' in place over the state r when training.

    Without a positive row, without weight, or when not training, r' is r.
    """
    after = state.clone()
    if training and coupling.weight:
        positive = y == 1
        rows = positive.sum()
        chosen = torch.where(positive[:, None], h, torch.zeros_like(h))
        mean = chosen.sum(0) / rows.clamp_min(1)
        after = torch.where(
            rows > 0, coupling.momentum * after + (1 - coupling.momentum) * mean, after)
        state.copy_(after.detach())
    return coupling.weight * ((after.mean() - after) ** 2).mean()
