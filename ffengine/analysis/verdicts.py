"""What the layers' goodness says of samples: right or wrong, alone and together, in one pass.

Of a sample, g+ is the goodness of its class's set (of its label, where labels are tried), g- the
mean of the others; separation is g+ - g- (Trifecta, fig. 3). Counts and sums are kept, no sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ffengine.adapt.sip import best_range, range_hits
from ffengine.engine.run.evaluation import right_by
from ffengine.engine.schedules.backprop import Backprop
from ffengine.nn.maps import Samples
from ffengine.nn.network import LocalNet
from ffengine.nn.recurrent import RecurrentNet


@dataclass
class LayerVerdict:
    """One layer's goodness: accuracy alone (0 to 1), means of g+ and g-, the largest value."""

    accuracy: float
    positive: float
    negative: float
    largest: float
    on_superclasses: bool

    @property
    def separation(self) -> float:
        return self.positive - self.negative


@dataclass
class Verdicts:
    """confusion: (classes, classes) int64 counts, true class a row, predicted a column. layers:
    empty where the layers' goodness tells no classes (backpropagation twins with a head). ranges:
    (L, L) accuracy of goodness summed over layers start (row) to end, 0 below the diagonal; None
    where a head reads the network or its layers tell different classes."""

    confusion: torch.Tensor
    layers: list[LayerVerdict] = field(default_factory=list)
    ranges: torch.Tensor | None = None

    @property
    def samples(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return int(self.confusion.trace()) / self.samples

    def class_accuracy(self) -> list[float]:
        """By class; NaN for one without samples."""
        return (self.confusion.diagonal().double() / self.confusion.sum(1)).tolist()

    def best_range(self) -> tuple[int, int]:
        """What SIP would choose (DeeperForward, sec. 3.4)."""
        if self.ranges is None:
            raise ValueError("[analyze] sip expected a network whose layers' goodness is summed, "
                             "got one that a head reads, or with layers on super-classes")
        return best_range((self.ranges * self.samples).round().long())


def tells_classes(net: LocalNet) -> bool:
    """Layers' goodness has a column for each class (or super-class), by sets of neurons or by
    labels tried; not so in twins that a head reads, nor in fixed blocks below heads (CaFo)."""
    if isinstance(net.schedule, Backprop) and net.readout.source != "goodness":
        return False
    if net.encoding is not None or isinstance(net, RecurrentNet):
        return True
    for layer in (net.layer(i) for i in range(len(net.layers))):
        groups = len(layer.config.offsets(layer.weight.shape[0])) - 1
        labels = net.num_classes if layer.label_map is None else int(layer.label_map.max()) + 1
        if groups < labels:
            return False
    return True


def judge(net: LocalNet, samples: Samples, *, backend: str = "auto") -> Verdicts:
    """Over (x, y) batches.

    Raises:
        ValueError: no samples.
    """
    net.eval()
    counts = _Counts(net)
    for x, y in samples:
        with torch.no_grad():
            counts.add(x, y, backend)
    if counts.samples == 0:
        raise ValueError("[analyze] expected one sample or more, got none")
    return counts.verdicts()


class _Counts:
    """Sums over the samples so far."""

    def __init__(self, net: LocalNet) -> None:
        self.net, self.samples = net, 0
        self.told = tells_classes(net)
        depth = len(net.layers)
        self.confusion = torch.zeros(net.num_classes, net.num_classes, dtype=torch.int64)
        self.hits = torch.zeros(depth, dtype=torch.int64)
        self.sums = torch.zeros(depth, 2, dtype=torch.float64)
        self.largest = torch.full((depth,), -torch.inf, dtype=torch.float64)
        summed = self.told and net.readout.source == "goodness" and all(
            net.layer(i).label_map is None for i in range(depth))
        self.ranges = torch.zeros(depth, depth, dtype=torch.int64) if summed else None

    def add(self, x: torch.Tensor, y: torch.Tensor, backend: str) -> None:
        net, (start, end) = self.net, self.net.layer_range
        goodness = net.goodness(x, backend=backend) if self.told else []
        by_goodness = self.told and net.readout.source == "goodness"
        scores = net.readout.of_goodness(goodness[start:end + 1]) if by_goodness else (
            net.scores(x, backend=backend))
        pairs = (y * net.num_classes + scores.argmax(1)).cpu()
        self.confusion += torch.bincount(pairs, minlength=net.num_classes**2).view_as(
            self.confusion)
        for i, g in enumerate(goodness):
            self._layer(i, g, y)
        if self.ranges is not None:
            alone = torch.stack([net.readout.of_goodness([g]) for g in goodness])
            self.ranges += range_hits(alone, y).cpu()
        self.samples += y.shape[0]

    def _layer(self, i: int, g: torch.Tensor, y: torch.Tensor) -> None:
        own = g.gather(1, self.net.layer(i).labels(y)[:, None]).double().sum()
        rest = (g.double().sum() - own) / max(g.shape[1] - 1, 1)
        self.hits[i] += int(right_by(self.net, i, g, y).sum())
        self.sums[i] += torch.stack([own, rest]).cpu()
        self.largest[i] = max(float(self.largest[i]), float(g.max()))

    def verdicts(self) -> Verdicts:
        n = self.samples
        layers = [LayerVerdict(int(self.hits[i]) / n, float(self.sums[i, 0]) / n,
                               float(self.sums[i, 1]) / n, float(self.largest[i]),
                               self.net.layer(i).label_map is not None)
                  for i in range(len(self.hits))] if self.told else []
        return Verdicts(self.confusion, layers,
                        None if self.ranges is None else self.ranges.double() / n)
