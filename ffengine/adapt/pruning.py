"""One-shot pruning of whole neurons: the network that is left is smaller, nothing is masked.

    small = prune_units(net, "random", 4)          # a quarter of the parameter bytes
    small.net(x)

FFLib's paper, sec. 2.6, and its authors' code. Every layer keeps the same share of its units, the
largest with which bytes before / bytes after reaches the ratio; whatever reads a layer shrinks
along (adapt/edits.py). Nothing is trained afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ffengine.adapt.activity import goodness_parts, mean_activity
from ffengine.adapt.checks import layer_of, offsets_of
from ffengine.adapt.edits import remove_from_layers
from ffengine.adapt.record import Edit
from ffengine.nn import wiring
from ffengine.nn.checks import one_of
from ffengine.nn.maps import Samples
from ffengine.nn.network import LocalNet
from ffengine.nn.recurrent import RecurrentNet
from ffengine.nn.wiring import Unit, Wiring

#: A layer's units, the ones to keep first, when so many of them are kept.
Order = Callable[[int, int], list[int]]

#: method -> what is kept.
METHODS = {
    "random": "the first units of one permutation a layer",
    "activity": "the most active units",
    "last": "the same by the authors' name: the last in rising order of activity",
    "first": "the least active units",
    "ends": "half from each end of that order",
    "sum": "units of the largest sum of weights (FFRNN: of forward weights)",
    "threshold": "units with the most weights of a magnitude above the layer's threshold",
    "goodness": "units that add most to the separation of positive and negative goodness"}
#: Those that need samples.
BY_SAMPLES = ("activity", "last", "first", "ends", "goodness")


@dataclass(frozen=True)
class Pruned:
    """What pruning gave.

    net: the smaller network; the one that was pruned is left alone, and is this very one if no unit
    went. edit: that made it, or None. kept: of every layer the units that are left, by their
    numbers before, ascending. bytes_before, bytes_after: of all parameters.
    """

    net: LocalNet
    edit: Edit | None
    kept: dict[int, list[int]]
    bytes_before: int
    bytes_after: int

    @property
    def ratio(self) -> float:
        """Compression ratio (FFLib, eq. 13)."""
        return self.bytes_before / self.bytes_after


def prune_units(net: LocalNet, by: str, ratio: float, *, layers: Iterable[int] | None = None,
                samples: Samples | None = None, seed: int = 0, backend: str = "auto") -> Pruned:
    """Remove units of every layer until bytes before / bytes after is `ratio` or a little more.

    Every group keeps a unit. A layer that a shortcut ties to an earlier one loses what that loses.

    Args:
        by: of METHODS.
        ratio: 1 or more; 4 keeps about a quarter of the parameter bytes.
        layers: that lose units; default all.
        samples: batches (x, y) that activity and goodness are measured on.
        seed: of random permutations, and of wrong labels. One seed's sets are nested: what a higher
            ratio keeps, a lower one keeps too (but for threshold).

    Raises:
        ValueError: an unknown method, no such layer, a ratio below 1 or one that would leave a
            layer without units, no samples for a method that needs them, a network whose units
            cannot be removed.
    """
    one_of("prune", "method", by, tuple(METHODS))
    if not (isinstance(ratio, (int, float)) and math.isfinite(ratio) and ratio >= 1):
        raise ValueError(f"[prune] a compression ratio expected a number of 1 or more, got {ratio}")
    depth = range(len(net.layers))
    which = list(depth) if layers is None else sorted({layer_of(net, i) for i in layers})
    if not which:
        raise ValueError("[prune] expected one layer or more to prune, got none")
    found = wiring.of(net)
    tied = found.tied()
    free = [i for i in which if not any(
        j < i and j in which for u in range(found.units[i]) for j, _ in tied.get((i, u), ()))]
    order = order_of(net, by, samples, seed, backend)
    gone = _least(net, found, free, order, ratio)
    kept = {i: [u for u in range(found.units[i]) if (i, u) not in gone] for i in depth}
    lost = {i: sorted(u for j, u in gone if j == i) for i in free}
    small, edit = net, None
    if gone:
        small, edit = remove_from_layers(net, {i: units for i, units in lost.items() if units})
    return Pruned(small, edit, kept, parameter_bytes(net), parameter_bytes(small))


def parameter_bytes(net: LocalNet) -> int:
    """Of all parameters, as they are kept."""
    return sum(p.numel() * p.element_size() for p in net.parameters())


def _least(net: LocalNet, found: Wiring, free: Sequence[int], order: Order,
           ratio: float) -> set[Unit]:
    """The fewest units whose removal reaches the ratio."""
    tied, widest = found.tied(), max(found.units[i] for i in free)
    # a convolution in channel groups wants as many units of each
    blocks = {run.layer: axis.blocks for axis in found.axes if axis.blocks > 1
              for run in axis.runs if run.layer is not None}

    def gone(share: int) -> set[Unit]:
        out: set[Unit] = set()
        for i in free:
            keep = found.units[i] * share // widest
            for u in (_dropped_evenly(order(i, keep), keep, blocks[i]) if i in blocks else
                      _dropped(order(i, keep), keep, offsets_of(net, i))):
                out.update(tied.get((i, u), [(i, u)]))
        return out

    def reached(share: int) -> float:
        return parameter_bytes(net) / bytes_without(net, found, gone(share))

    if reached(1) < ratio:
        raise ValueError(f"[prune] a compression ratio expected at most {reached(1):.4g}, which "
                         f"leaves every layer a unit a group, got {ratio:g}")
    low, high = 1, widest + 1  # low reaches the ratio, high would be more than all units
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reached(middle) >= ratio else (low, middle)
    return gone(low)


def _dropped(ranked: list[int], keep: int, offsets: tuple[int, ...]) -> set[int]:
    """Units of a layer that go when it keeps `keep`, and one a group at least."""
    place = {u: at for at, u in enumerate(ranked)}
    best = {min(range(a, b), key=place.__getitem__) for a, b in pairwise(offsets)}
    rest = [u for u in ranked if u not in best]
    return set(rest[max(0, keep - len(best)):])


def _dropped_evenly(ranked: list[int], keep: int, blocks: int) -> set[int]:
    """The same with as many units kept in each of `blocks` equal runs of units, one at least."""
    size = len(ranked) // blocks
    each = max(1, keep // blocks)
    return {u for b in range(blocks) for u in [u for u in ranked if u // size == b][each:]}


def bytes_without(net: LocalNet, found: Wiring, gone: set[Unit]) -> int:
    """Parameter bytes of the network once these units are gone, from its wiring alone."""
    lost = [0] * len(found.units)
    for i, _ in gone:
        lost[i] += 1
    sizes = {name: list(p.shape) for name, p in net.named_parameters()}
    for axis in found.axes:
        if axis.name in sizes:
            less = sum(run.repeat * lost[run.layer] for run in axis.runs if run.layer is not None)
            sizes[axis.name][axis.dim] -= less // (axis.blocks if axis.dim else 1)
    return sum(math.prod(sizes[name]) * p.element_size() for name, p in net.named_parameters())


def order_of(net: LocalNet, by: str, samples: Samples | None = None, seed: int = 0,
             backend: str = "auto") -> Order:
    """The order in which a method keeps a layer's units; arguments as prune_units."""
    if by in BY_SAMPLES and samples is None:
        raise ValueError(f"[prune] {by} expected samples to rank units by, got none")
    if by == "threshold":
        return lambda i, keep: _above_threshold(net.layer(i).weight, keep)
    if by == "random":
        generator = torch.Generator().manual_seed(seed)
        fixed = [torch.randperm(net.layer(i).units, generator=generator, device="cpu").tolist()
                 for i in range(len(net.layers))]
    elif by == "sum":
        fixed = [descending(forward_weight(net, i).flatten(1).double().sum(1))
                 for i in range(len(net.layers))]
    elif by == "goodness":
        assert samples is not None
        fixed = [descending(part) for part in goodness_parts(net, samples, seed, backend)]
    else:
        assert samples is not None
        rising = [mean.argsort(stable=True).tolist()
                  for mean in mean_activity(net, samples, backend)]
        fixed = [row if by == "first" else both_ends(row) if by == "ends" else row[::-1]
                 for row in rising]
    return lambda i, keep: fixed[i]


def descending(score: torch.Tensor) -> list[int]:
    """Units by falling score; the lower number first on ties."""
    found: list[int] = score.argsort(descending=True, stable=True).tolist()
    return found


def both_ends(row: list[int]) -> list[int]:
    """Last, first, last but one, second, ...: any beginning of it is half from either end."""
    return [row[at // 2] if at % 2 else row[-1 - at // 2] for at in range(len(row))]


def forward_weight(net: LocalNet, i: int) -> torch.Tensor:
    """Layer i's weight, without the backward one that lies beside it in an FFRNN."""
    weight = net.layer(i).weight.detach()
    if not isinstance(net, RecurrentNet):
        return weight
    return weight[:, :net.layer(i - 1).units if i else math.prod(net.in_shape)]


def _above_threshold(weight: torch.Tensor, keep: int) -> list[int]:
    """By the number of a unit's weights that survive when the layer keeps the keep / C of its
    weights that are largest in magnitude (the authors' threshold; they zero the others)."""
    size = weight.detach().abs().flatten(1)
    survivors = max(1, keep * size.shape[1])
    threshold = size.flatten().kthvalue(size.numel() - survivors + 1).values
    count = (size >= threshold).sum(1).double()
    return descending(count + size.double().sum(1) / (1 + size.double().sum()))
