"""The rows a step trains on: samples, or positive and negative halves of one batch."""

from __future__ import annotations

from dataclasses import replace

import torch

from ffengine.data import negatives
from ffengine.data.seeding import negatives_generator
from ffengine.engine import label_channel
from ffengine.engine.batch import Batch, paired
from ffengine.engine.context import StepContext
from ffengine.engine.rows import empty
from ffengine.nn.layers import LocalLinear, as_laid_out
from ffengine.nn.network import LocalNet


def rows_of(net: LocalNet, samples: int) -> int:
    """Rows of a step on so many samples."""
    return 2 * samples if paired(net) else samples


def entrance(ctx: StepContext, item: Batch | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The first layer's input for all rows, laid out; ctx.y becomes the layers' targets, and
    ctx.labels what a learned label channel shows.

    A batch that entered before (features of a frozen stack) passes as it is.
    """
    net = ctx.net
    if isinstance(item, torch.Tensor):
        return as_laid_out(net.prepare(item.to(dtype)))
    if item.features is not None:
        x = item.features.to(dtype)
    elif paired(net):
        x = net.normalise_input(halves(ctx, item, dtype), ours=True)
        ctx.differ = differing_columns(net, item, dtype)
    else:
        x = net.prepare(item.x.to(dtype))
    if item.negatives is not None and label_channel.learned(net) is not None:
        ctx.labels = item.y, item.negatives
    set_targets(ctx, x.shape[0])
    return as_laid_out(x)


def set_targets(ctx: StepContext, rows: int) -> None:
    """ctx.y becomes the layers' targets: 1 and 0 where so many rows are pairs of the samples'."""
    if paired(ctx.net) and ctx.y.shape[0] != rows:
        half = rows // 2
        ctx.y = torch.cat([ctx.y.new_ones(half), ctx.y.new_zeros(half)])


def differing_columns(net: LocalNet, item: Batch, dtype: torch.dtype) -> slice | None:
    """Columns of a label that alone tell the halves' rows apart; None where more does.

    One-hot rows have one length, so normalised rows stay equal. A 16-bit sum would be rounded once
    more than a product over all columns is.
    """
    encoding, layer = net.encoding, net.layer(0)
    labels = item.negatives is not None and not item.negatives.is_floating_point()
    plain = isinstance(layer, LocalLinear) and layer.pre_norm is None
    wide = dtype in (torch.float32, torch.float64)
    return encoding.columns if encoding is not None and labels and plain and wide else None


def completed(ctx: StepContext, item: Batch, dtype: torch.dtype) -> Batch:
    """The batch with its negatives, drawn where none were given; ValueError where rows that came
    encoded would train a label channel whose labels nobody told."""
    if item.negatives is not None or not paired(ctx.net):
        return item
    if item.features is not None:
        if label_channel.learned(ctx.net) is not None and 0 in ctx.whose().layers:
            raise ValueError("[train] a learned label channel expected samples, or features with "
                             "the negatives that they show, got features alone")
        return item
    return replace(item, negatives=drawn(ctx, item, dtype))


def halves(ctx: StepContext, item: Batch, dtype: torch.dtype) -> torch.Tensor:
    """Positive then negative rows (2N, ...) in `dtype`, labels encoded; no other copy is made."""
    encoding, x = ctx.net.encoding, item.x
    other = item.negatives
    assert other is not None  # completed() has drawn them
    if encoding is None:  # without labels a negative is an image
        return torch.cat([x.to(dtype), other.to(dtype)])
    out = empty(x, 2 * len(x), encoding.shape, dtype)
    scale = encoding.scale(x)  # the overlay's value is the batch's, the same for both halves
    for half, labels in zip(out.chunk(2), (item.y, other), strict=True):
        encoding.write(half, x, encoding.rows(labels, out) * scale)
    return out


def drawn(ctx: StepContext, item: Batch, dtype: torch.dtype) -> torch.Tensor:
    """Negatives where none were given: a function of the seed and the step alone."""
    net, kind = ctx.net, ctx.net.negatives
    # a full-batch recipe keeps one permutation for the whole training, as the published code does
    generator = negatives_generator(ctx.seed, 0 if kind == "permuted" else ctx.step)
    goodness = None
    if kind == "hardest":
        rows = net.goodness(item.x.to(dtype), backend=ctx.backend)
        start, end = net.layer_range
        goodness = net.readout.of_goodness(rows[start:end + 1])
    return negatives.draw(kind, item.y, net.num_classes, generator, x=item.x, goodness=goodness,
                          dtype=dtype)
