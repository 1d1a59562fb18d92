"""Accuracy against compression: how much of a network can be pruned away (FFLib, fig. 19)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ffengine.adapt.pruning import prune_units
from ffengine.nn.maps import Samples
from ffengine.nn.network import LocalNet

#: Methods that a seed changes: the others are measured once.
DRAWN = ("random", "goodness")


@dataclass(frozen=True)
class Point:
    """One pruned network. accuracy: 0 to 1. ratio: asked for; compression: bytes before / after.
    units: left in every layer."""

    seed: int
    ratio: float
    compression: float
    bytes: int
    units: tuple[int, ...]
    accuracy: float


@dataclass(frozen=True)
class Spread:
    """Of the accuracies at one ratio. deviation: the sample's, 0 of one network."""

    ratio: float
    compression: float
    count: int
    mean: float
    deviation: float
    least: float
    most: float


def curve(net: LocalNet, by: str, ratios: Sequence[float], seeds: Sequence[int],
          accuracy: Callable[[LocalNet], float], *, layers: Sequence[int] | None = None,
          samples: Samples | None = None, backend: str = "auto") -> Iterator[Point]:
    """The network pruned to every ratio with every seed, one after the other; it is left alone.

    Args:
        by, layers, samples: of adapt.pruning.prune_units, whose ValueErrors this raises.
        seeds: of methods that draw; the others take the first alone.
        accuracy: of a network, 0 to 1.
    """
    for seed in seeds if by in DRAWN else seeds[:1]:
        for ratio in ratios:
            made = prune_units(net, by, ratio, layers=layers, samples=samples, seed=seed,
                               backend=backend)
            yield Point(seed, ratio, made.ratio, made.bytes_after,
                        tuple(len(kept) for kept in made.kept.values()), accuracy(made.net))


def spread(points: Sequence[Point]) -> list[Spread]:
    """Mean, deviation and extremes at each ratio, over networks and seeds."""
    found = []
    for ratio in sorted({p.ratio for p in points}):
        here = [p for p in points if p.ratio == ratio]
        values = [p.accuracy for p in here]
        found.append(Spread(
            ratio, statistics.fmean(p.compression for p in here), len(here),
            statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0,
            min(values), max(values)))
    return found
