"""Micro-batches: a batch in pieces whose gradients add up; the last piece steps the optimizer.

What backpropagation calls gradient accumulation. Where no layer has batch statistics the tiles of
a plan give the whole batch's own gradients and need no network-wide buffers; where one has, every
piece is normalised by statistics of its own, so this is another update rule, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from ffengine.engine.accumulator import GradientAccumulator
from ffengine.engine.batch import Batch, joined, paired, whole
from ffengine.engine.context import BatchReport, StepContext
from ffengine.engine.schedules.schedule import Schedule
from ffengine.nn.network import LocalNet


def check(schedule: Schedule, net: LocalNet, size: int) -> None:
    """ValueError unless the schedule's steps can be taken in pieces of `size` samples."""
    if size < 1:
        raise ValueError(f"[micro_batch] expected 1 sample or more, got {size}")
    if not schedule.adds_up or net.propagate != "stale":
        raise ValueError("[micro_batch] expected features of the weights before the step and one "
                         f"update a batch, got {type(schedule).__name__} with propagate="
                         f"{net.propagate}")


def train(context: Callable[[Batch], StepContext], item: Batch, size: int,
          step: Callable[[StepContext, Batch], BatchReport]) -> BatchReport:
    """One update from a batch in pieces of `size` samples.

    Args:
        context: makes a piece's context. Its seed draws negatives and dropout, a piece at a time.
        step: trains on a piece.
    """
    total, sums = item.y.shape[0], GradientAccumulator()
    reports, shares, pairs = [], [], False
    for index, piece in enumerate(pieces(item, size)):
        ctx = context(piece)
        ctx.sums, ctx.seed = sums, ctx.seed + (index << 32)  # a mask and negatives of its own
        pairs = paired(ctx.net)
        sums.share = piece.y.shape[0] / total
        sums.last = (index + 1) * size >= total
        reports.append(step(ctx, piece))
        shares.append(sums.share)
    return merged(reports, shares, pairs)


def pieces(item: Batch, size: int) -> Iterator[Batch]:
    """Consecutive samples; what holds both halves' rows is cut in both."""
    total = item.y.shape[0]
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total))
        cut = replace(item, y=item.y[rows])
        cut.x = item.x[rows] if item.features is None else item.x
        cut.negatives = None if item.negatives is None else item.negatives[rows]
        for name in ("features", "below"):
            value = getattr(item, name)
            if value is not None:
                setattr(cut, name, whole([half[rows] for half in value.split(total)]))
        if item.features is not None:
            assert cut.features is not None
            cut.x = cut.features
        yield cut


def merged(reports: list[BatchReport], shares: list[float], pairs: bool) -> BatchReport:
    """One report of the whole batch: losses weighted, rows joined, positives first."""
    first = reports[0]

    def mean(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([v * share for v, share in zip(values, shares, strict=True)]).sum(0)

    def rows(name: str, i: int) -> torch.Tensor | None:
        parts = [getattr(r, name)[i] for r in reports]
        # a pair's loss is one value for both halves
        return None if parts[0] is None else joined(
            parts, pairs and parts[0].shape[0] == first_rows(reports[0], i))

    def first_rows(report: BatchReport, i: int) -> int:
        g = report.goodness[i]
        return 0 if g is None else g.shape[0]

    layers = range(len(first.losses))
    heads = []
    for made in zip(*(r.heads for r in reports), strict=True):
        present = [m for m in made if m is not None]
        heads.append((mean([m[0] for m in present]), whole([m[1] for m in present]))
                     if present else None)
    means = [[r.losses[i] for r in reports] for i in layers]
    return replace(
        first, losses=[None if any(v is None for v in m) else mean([v for v in m if v is not None])
                       for m in means],
        goodness=[rows("goodness", i) for i in layers],
        row_losses=[rows("row_losses", i) for i in layers], heads=heads,
        penalties={i: mean([r.penalties[i] for r in reports]) for i in first.penalties})
