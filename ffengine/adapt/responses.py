"""How a layer's neurons respond to the classes: what growth and degeneration decide by.

A neuron's response to a sample is what it adds to its set's goodness: h, or h² where goodness is of
squares, the mean over a channel's pixels (support neurons, sec. 3.3 and 3.5).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

import torch

from ffengine.adapt.checks import layer_of, offsets_of
from ffengine.engine.run.evaluation import share_by_class
from ffengine.nn.layers import LocalLayer
from ffengine.nn.maps import Samples, over_pixels
from ffengine.nn.network import LocalNet
from ffengine.ops.config import Norm


@dataclass(frozen=True)
class Survey:
    """What one pass over labelled samples says of a layer.

    Attributes:
        responses: fp64 (classes, units), mean response of every neuron to the class's samples; 0
            where a class has none.
        labels: int64 (N,), right: bool (N,), whether the layer's goodness tells the label (its
            super-class), in the order of the samples.
        groups: int64 (classes,), the set of each class.
    """

    responses: torch.Tensor
    labels: torch.Tensor
    right: torch.Tensor
    groups: torch.Tensor

    def accuracy(self) -> list[float | None]:
        """Share of each class's samples that the layer alone gets right; None without samples."""
        return share_by_class(self.labels, self.right, len(self.groups))

    def own(self, offsets: tuple[int, ...]) -> torch.Tensor:
        """(units,) mean response of every neuron to the samples of its own set's classes."""
        counts = torch.bincount(self.labels, minlength=len(self.groups)).double()
        out = []
        for group, (start, end) in enumerate(pairwise(offsets)):
            weight = counts * (self.groups == group)
            mean = weight @ self.responses[:, start:end] / weight.sum().clamp_min(1)
            out.append(mean)
        return torch.cat(out)


def sets_of(net: LocalNet, layer: int) -> torch.Tensor:
    """int64 (classes,): each class's set in a layer.

    Raises:
        ValueError: the layer has no set for each class (or super-class): its goodness tells
            positive from negative samples, or its groups are others.
    """
    held = net.layer(layer_of(net, layer))
    groups = len(offsets_of(net, layer)) - 1
    sets = torch.arange(net.num_classes) if held.label_map is None else held.label_map.cpu()
    if net.encoding is not None or groups != int(sets.max()) + 1 or len(sets) != net.num_classes:
        raise ValueError(f"[adapt] layer {layer} expected a set of neurons for each of the "
                         f"{net.num_classes} classes, got {groups}")
    return sets


def below(net: LocalNet, layer: int, x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """A layer's input, of samples x (N, *in_shape)."""
    x = net.prepare(x)
    if layer:
        last: deque[torch.Tensor] = deque(maxlen=1)
        net.run(x, end=layer - 1, backend=backend, features=last)
        x = last[0]
    return net.transform(layer, x)


def unit_responses(held: LocalLayer, h: torch.Tensor) -> torch.Tensor:
    """(N, units) fp64 of features h before their normalisation."""
    e = h.double() if held.config.goodness == "mean" else h.double().square()
    return over_pixels(e)


def survey(net: LocalNet, layer: int, samples: Samples, backend: str = "auto") -> Survey:
    """Responses and hits of a layer on batches (x, y) on the network's device.

    Raises:
        ValueError: no such layer, no set for each class, no samples.
    """
    groups, classes = sets_of(net, layer), net.num_classes
    held, weight = net.layer(layer), net.layer(layer).weight
    total = torch.zeros(classes, held.units, dtype=torch.float64, device=weight.device)
    labels, right = [], []
    with torch.no_grad():
        for x, y in samples:
            x, y = x.to(weight.device), y.to(weight.device)
            h, g = held.infer(below(net, layer, x, backend), norm=Norm("none"), backend=backend)
            assert h is not None
            total.index_add_(0, y, unit_responses(held, h))
            right.append((g.argmax(1) == groups.to(y.device)[y]).cpu())
            labels.append(y.cpu())
    if not labels:
        raise ValueError("[adapt] expected at least one batch of samples, got none")
    seen = torch.cat(labels)
    counts = torch.bincount(seen, minlength=classes).clamp_min(1)
    return Survey(total.cpu() / counts[:, None], seen, torch.cat(right), groups)

