"""A recorded step laid out in time: spans, roofline floors, and memory between the marks."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from ffengine.devices import rates
from ffengine.profile.costs import Cost
from ffengine.profile.recorder import Recorder
from ffengine.profile.spans import Phase, Sample, Span

#: Rows from which a product's rate no longer grows (measured on 2 cores: 576 x 64, fp32 82, 135,
#: 140, 102 and bf16 110, 486, 627, 653 GFLOP/s at 256, 4096, 16384, 65536 rows).
MOST_ROWS = 16384
#: (marks so far, live bytes by kind), in order.
Levels = list[tuple[int, tuple[int, ...]]]


def assemble(phase: Phase, structure: Recorder, runs: list[list[float]],
              device: torch.device) -> None:
    """Fill in times (medians of the gaps between marks), floors and memory."""
    clock = [0.0]
    for i in range(1, len(structure.marks)):
        clock.append(clock[-1] + statistics.median(run[i] - run[i - 1] for run in runs))
    totals = [run[-1] for run in runs]
    phase.measured = {"median": statistics.median(totals), "min": min(totals), "max": max(totals)}
    phase.samples = list(_placed(structure.levels, clock))
    peaks = _Peaks(structure.levels, len(clock))
    for span, cost, (first, last) in zip(phase.spans, structure.costs, structure.bounds,
                                         strict=True):
        span.begin, span.end = clock[first], clock[last]
        span.own += span.seconds
        if span.parent >= 0:
            phase.spans[span.parent].own -= span.seconds
        span.peak_bytes = peaks.within(first, last)
        if cost is not None:
            _costed(span, cost, device)


class _Peaks:
    """Most bytes live between two marks."""

    def __init__(self, levels: Levels, marks: int) -> None:
        self._gap, now = [0] * (marks + 1), 0
        following = iter([*levels, (marks + 1, ())])
        at, level = next(following)
        for i in range(marks + 1):
            self._gap[i] = now
            while at == i:
                now = sum(level)
                self._gap[i] = max(self._gap[i], now)
                at, level = next(following)

    def within(self, first: int, last: int) -> int:
        return max(self._gap[first + 1:last + 1], default=0)


def _placed(levels: Levels, clock: list[float]) -> Iterator[Sample]:
    """Memory levels at their times: evenly between the marks they came between."""
    counts: dict[int, int] = {}
    for at, _ in levels:
        counts[at] = counts.get(at, 0) + 1
    seen: dict[int, int] = {}
    for at, level in levels:
        seen[at] = seen.get(at, 0) + 1
        if at == 0:  # before the step: only where it starts from counts
            if seen[at] == counts[at]:
                yield Sample(0.0, level)
        elif at < len(clock):
            share = seen[at] / (counts[at] + 1)
            yield Sample(clock[at - 1] + share * (clock[at] - clock[at - 1]), level)


def _costed(span: Span, cost: Cost, device: torch.device) -> None:
    """Bytes, FLOP and the roofline of the call at its own size and dtype."""
    span.bytes, span.flops = cost.bytes, cost.flops
    by_bytes, by_flops = cost.bytes / rates.copy_rate(device), 0.0
    if cost.flops and cost.product is not None:
        rows, inner, out = (max(n, 1) for n in cost.product)
        rows = min(rows, MOST_ROWS)
        # forward and weight gradient are the same arithmetic: the better product's rate
        best = max(rates.product_rate(*shape, cost.dtype, device)
                   for shape in ((rows, inner, out), (out, rows, inner)))
        by_flops = cost.flops / best
    span.floor = max(by_bytes, by_flops)
    span.bound = ("arithmetic" if by_flops > by_bytes else "bytes") if span.floor else ""
