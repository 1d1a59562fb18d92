"""The rows a step trains on: samples, or positive and negative halves of one batch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ffengine.data import negatives
from ffengine.data.seeding import negatives_generator
from ffengine.engine.batch import Batch, paired
from ffengine.nn.layers import as_laid_out

if TYPE_CHECKING:
    from ffengine.engine.step import StepContext
    from ffengine.nn.network import LocalNet


def rows_of(net: LocalNet, samples: int) -> int:
    """Rows of a step on so many samples."""
    return 2 * samples if paired(net) else samples


def entrance(ctx: StepContext, item: Batch | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The first layer's input for all rows, laid out; ctx.y becomes the layers' targets.

    A batch that entered before (features of a frozen stack) passes as it is.
    """
    net = ctx.net
    if isinstance(item, torch.Tensor):
        return as_laid_out(net.prepare(item.to(dtype)))
    x = item.x.to(dtype)
    if item.features is not None:
        x = item.features.to(dtype)
    elif paired(net):
        x = net.normalise_input(halves(ctx, item, x), ours=True)
    else:
        x = net.prepare(x)
    if paired(net) and ctx.y.shape[0] != x.shape[0]:
        half = x.shape[0] // 2
        ctx.y = torch.cat([ctx.y.new_ones(half), ctx.y.new_zeros(half)])
    return as_laid_out(x)


def completed(ctx: StepContext, item: Batch, dtype: torch.dtype) -> Batch:
    """The batch with its negatives, drawn where none were given."""
    if item.negatives is not None or item.features is not None or not paired(ctx.net):
        return item
    return replace(item, negatives=drawn(ctx, item, item.x.to(dtype)))


def halves(ctx: StepContext, item: Batch, x: torch.Tensor) -> torch.Tensor:
    """Positive then negative rows (2N, ...), labels encoded."""
    encoding = ctx.net.encoding
    other = item.negatives
    assert other is not None  # completed() has drawn them
    if encoding is None:  # without labels a negative is an image
        return torch.cat([x, other.to(x.dtype)])
    base = encoding.base(x)
    # the overlay's value is the batch's, the same for both halves
    scale = encoding.scale(x)
    rows = encoding.mark(torch.cat([encoding.rows(item.y, x), encoding.rows(other, x)]) * scale)
    for half in rows.chunk(2):
        half.add_(base)
    return rows


def drawn(ctx: StepContext, item: Batch, x: torch.Tensor) -> torch.Tensor:
    """Negatives where none were given: a function of the seed and the step alone."""
    net, kind = ctx.net, ctx.net.negatives
    # a full-batch recipe keeps one permutation for the whole training, as the published code does
    generator = negatives_generator(ctx.seed, 0 if kind == "permuted" else ctx.step)
    goodness = None
    if kind == "hardest":
        rows = net.goodness(x, backend=ctx.backend)
        start, end = net.layer_range
        goodness = net.readout.of_goodness(rows[start:end + 1])
    return negatives.draw(kind, item.y, net.num_classes, generator, x=item.x, goodness=goodness,
                          dtype=x.dtype)
