"""What lies between the two sweeps of BatchNorm: arithmetic on (N, C), (N, K) and (C,) numbers.

From every sample's mean and centred M2 of a channel follow the batch statistics (Chan's formula),
the goodness of z = gamma x̂ + beta, the loss, dgamma, dbeta, and with them the two means by which
BatchNorm's backward answers: no third sweep. In fp64, because dgamma reaches every element of da
times gamma / sigma^2, and these are small tensors.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch

from ffengine.ops.config import BatchNorm, LocalPassConfig
from ffengine.ops.host import widths
from ffengine.reference import local_pass as reference


class Statistics(NamedTuple):
    """What a channel is normalised by, fp64."""

    mean: torch.Tensor  # (C,)
    var: torch.Tensor  # (C,) biased


class Sweep(NamedTuple):
    """The settings of one call that the arithmetic reads."""

    config: LocalPassConfig
    coupling: BatchNorm
    affine: tuple[torch.Tensor, torch.Tensor] | None  # gamma, beta (C,)
    running: tuple[torch.Tensor, torch.Tensor] | None  # mean, var (C,), updated when training
    training: bool
    pixels: int  # of a channel of a sample: what the statistics are taken over
    pixels_z: int
    da_scale: float


class Middle(NamedTuple):
    """What sweep 2 and the caller need; fields as in csrc/params.h and BatchPassOutput."""

    table: torch.Tensor  # (5, C)
    g: torch.Tensor
    weight: torch.Tensor | None = None  # (N, C)
    loss: torch.Tensor | None = None
    coef: torch.Tensor | None = None
    dgamma: torch.Tensor | None = None
    dbeta: torch.Tensor | None = None


def pivots(a: torch.Tensor) -> torch.Tensor:
    """(C,) fp32: one h of every channel, from which sweep 1 counts its means; 0 if not finite."""
    first = a[0]
    while first.dim() > 1:
        first = first.select(-1, 0)
    return first.float().relu().nan_to_num(0.0, 0.0)


def between(moments: torch.Tensor, extrema: torch.Tensor | None, pivot: torch.Tensor, y: Any,
            s: Sweep) -> Middle:
    """Everything between the sweeps.

    moments (2, N, C): mean, from the pivots (C,), and centred M2 of what is normalised; extrema:
    the same of what z is made of, where a pool stands between the two.
    """
    by = normalise_by(moments, pivot, s)
    rstd = torch.rsqrt(by.var + s.coupling.eps)
    gamma, beta = s.affine or (torch.ones_like(rstd), torch.zeros_like(rstd))
    scale = rstd * gamma
    mean, m2 = moments if extrema is None else extrema
    centred = mean - (by.mean - pivot)
    z_mean = centred * scale + beta
    g = goodness(m2, z_mean, scale, s)
    # the centre in fp32 and what its rounding lost, in the shift
    centre = by.mean.float()
    lost = by.mean - centre
    zero = torch.zeros_like(scale)
    table = torch.stack((centre, scale, beta - scale * lost, zero, zero))
    if y is None:
        return Middle(table.float(), g)
    loss, dg = reference.loss_and_gradient(g, y, s.config, g.shape[0])
    coef = dg / group_sizes(s.config, mean.shape[1], s.pixels_z, g)
    weight = spread(coef, s.config, mean.shape[1])
    along, dbeta = affine_gradients(weight, m2, centred, z_mean, scale, s)
    weight *= scale * (s.da_scale * (1 if s.config.goodness == "mean" else 2))
    if s.training and not s.coupling.use_running:
        answer = scale * (s.da_scale / (moments.shape[1] * s.pixels))
        table[4] = answer * rstd.square() * along
        table[3] = answer * dbeta - table[4] * lost
    affine = (None, None) if s.affine is None else ((along * rstd).float(), dbeta.float())
    return Middle(table.float(), g, weight, loss, coef, *affine)


def normalise_by(moments: torch.Tensor, pivot: torch.Tensor, s: Sweep) -> Statistics:
    """The batch's or the running statistics, as they are before this call updates them."""
    batch = batch_statistics(moments, pivot, s.pixels) if s.training else None
    by = batch
    if batch is None or s.coupling.use_running:
        assert s.running is not None  # the op checked
        by = Statistics(s.running[0].double(), s.running[1].double())
    if batch is not None and s.running is not None:
        count, momentum = moments.shape[1] * s.pixels, s.coupling.momentum
        unbiased = batch.var * (count / (count - 1))
        for state, value in zip(s.running, (batch.mean, unbiased), strict=True):
            state.copy_((1 - momentum) * state.double() + momentum * value)
    assert by is not None
    return by


def batch_statistics(moments: torch.Tensor, pivot: torch.Tensor, pixels: int) -> Statistics:
    """Moments (2, N, C) of `pixels` numbers each, merged over the batch by Chan's formula."""
    means = moments[0].double()
    mean = means.mean(0)
    m2 = moments[1].sum(0, dtype=torch.float64) + pixels * means.sub_(mean).square_().sum(0)
    return Statistics(mean + pivot, m2 / (pixels * moments.shape[1]))


def goodness(m2: torch.Tensor, z_mean: torch.Tensor, scale: torch.Tensor,
             s: Sweep) -> torch.Tensor:
    """g (N, K) fp32 of z from every channel's moments."""
    if s.config.goodness == "mean":
        sums = z_mean * s.pixels_z
    else:
        sums = (m2 * scale.square()).addcmul_(z_mean, z_mean, value=s.pixels_z)
    if isinstance(s.config.groups, int):
        g = sums.view(sums.shape[0], s.config.groups, -1).sum(2)
    else:
        g = torch.stack([sums[:, i:j].sum(1) for i, j in pairwise(s.config.groups)], 1)
    return g.div_(group_sizes(s.config, z_mean.shape[1], s.pixels_z, g)).float()


def group_sizes(config: LocalPassConfig, channels: int, pixels: int, g: torch.Tensor) -> Any:
    """Elements of z in a group: a number, or (K,); 1 for sums of squares."""
    if config.goodness == "sum_sq":
        return 1
    if isinstance(config.groups, int):
        return channels // config.groups * pixels
    return widths(config.groups, g.dtype, g.device) * pixels


def affine_gradients(coef: torch.Tensor, m2: torch.Tensor, centred: torch.Tensor,
                     z_mean: torch.Tensor, scale: torch.Tensor,
                     s: Sweep) -> tuple[torch.Tensor, torch.Tensor]:
    """(dL/dgamma / rstd, dL/dbeta), each (C,) fp64; coef (N, C). Overwrites all but coef, m2."""
    if s.config.goodness == "mean":
        along, dbeta = centred.mul_(coef), coef.sum(0, dtype=torch.float64)
        return along.sum(0) * s.pixels_z, dbeta * s.pixels_z
    # sum over pixels of z (p - mean) = scale M2 + pixels z_mean centred
    along = centred.mul_(z_mean).mul_(s.pixels_z).addcmul_(m2, scale).mul_(coef)
    return along.sum(0) * 2, z_mean.mul_(coef).sum(0) * (2 * s.pixels_z)


def spread(coef: torch.Tensor, config: LocalPassConfig, channels: int) -> torch.Tensor:
    """coef (N, K) for every channel, (N, C), in memory of its own."""
    if isinstance(config.groups, int):
        return coef.repeat_interleave(channels // config.groups, 1)
    return coef.repeat_interleave(widths(config.groups, torch.int64, coef.device), 1,
                                  output_size=channels)
