"""The rows a step trains on: samples, or positive and negative halves of one batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ffengine.data import negatives
from ffengine.data.seeding import negatives_generator
from ffengine.engine import label_channel
from ffengine.engine.batch import Batch, paired, whole
from ffengine.engine.context import StepContext
from ffengine.engine.rows import Rows, empty
from ffengine.nn.layers import LocalLinear, as_laid_out
from ffengine.nn.network import LocalNet


def rows_of(net: LocalNet, samples: int) -> int:
    """Rows of a step on so many samples."""
    return 2 * samples if paired(net) else samples


@dataclass(frozen=True)
class InputRows:
    """A batch as its rows enter the first layer that runs, some of them at a time.

    Rows of pairs are those of all positives, then those of all negatives. Features of a frozen
    stack entered before, and pass as they are.

    Args:
        item: with its negatives, where the network pairs samples; samples alone pass as they are.
        scale: what label rows are multiplied by, the same for both halves.
    """

    net: LocalNet
    item: Batch | torch.Tensor
    scale: torch.Tensor | float = 1.0

    def of(self, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
        """(rows, *shape) of the layer's input, laid out; views of what needs no change."""
        net, item = self.net, self.item
        if isinstance(item, torch.Tensor):
            x = net.prepare(rows.of(item).to(dtype))
        elif item.features is not None:
            x = rows.of(item.features).to(dtype)
        elif paired(net):
            x = self._paired(rows, dtype)
        else:
            x = net.prepare(rows.of(item.x).to(dtype))
        return as_laid_out(x)

    def _paired(self, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
        """Positive then negative rows in `dtype`, labels encoded; no other copy is made."""
        net, item, encoding = self.net, self.item, self.net.encoding
        assert isinstance(item, Batch) and item.negatives is not None  # `input_rows` has drawn them
        parts = rows.parts(len(item.x))
        if encoding is None:  # without labels a negative is an image
            images = [(item.negatives if negative else item.x)[at] for negative, at in parts]
            return net.normalise_input(whole([x.to(dtype) for x in images]), ours=len(parts) > 1)
        out, start = empty(item.x, rows.count, encoding.shape, dtype), 0
        for negative, at in parts:
            labels, part = (item.negatives if negative else item.y)[at], item.x[at]
            here = out[start:start + len(part)]
            encoding.write(here, part, encoding.rows(labels, out) * self.scale)
            start += len(part)
        return net.normalise_input(out, ours=True)


def input_rows(ctx: StepContext, item: Batch | torch.Tensor, dtype: torch.dtype) -> InputRows:
    """The batch ready to enter: negatives are drawn where none were given, ctx.y becomes the
    layers' targets, and ctx.labels what a learned label channel shows.

    Raises:
        ValueError: rows that came encoded would train a label channel whose labels nobody told.
    """
    net = ctx.net
    if isinstance(item, torch.Tensor) or not paired(net):
        return InputRows(net, item)
    item = completed(ctx, item, dtype)
    if item.negatives is not None and label_channel.learned(net) is not None:
        ctx.labels = item.y, item.negatives
    if item.features is None:
        ctx.differ = differing_columns(net, item, dtype)
    set_targets(ctx, ctx.batch)
    encoding = net.encoding if item.features is None else None
    return InputRows(net, item, 1.0 if encoding is None else encoding.scale(item.x))


def entrance(ctx: StepContext, item: Batch | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The first layer's input for all rows of the batch, laid out; of the context as input_rows."""
    return input_rows(ctx, item, dtype).of(Rows(0, ctx.batch), dtype)


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
    """A batch of pairs with its negatives, drawn where none were given."""
    if item.negatives is not None:
        return item
    if item.features is not None:
        if label_channel.learned(ctx.net) is not None and 0 in ctx.whose().layers:
            raise ValueError("[train] a learned label channel expected samples, or features with "
                             "the negatives that they show, got features alone")
        return item
    return replace(item, negatives=drawn(ctx, item, dtype))


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
