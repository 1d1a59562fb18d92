"""Where a layer's units are found in a network: every tensor axis that runs over them, and ties.

An axis is a sequence of runs: units of a layer in their order, `repeat` positions each (a channel
of a flattened map is as many columns as the map has pixels), or positions that belong to no unit
(the image, a label). A shortcut that adds maps ties channels: they exist together or not at all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ffengine.nn.heads import LinearHead
from ffengine.nn.layers import LocalLayer, LocalLinear
from ffengine.nn.network import LocalNet
from ffengine.nn.recurrent import RecurrentNet
from ffengine.nn.resnet import ResNet

#: A layer's own tensors, whose first axis runs over its units.
OWN = ("weight", "bias", "norm_weight", "norm_bias", "running_mean", "running_var")
#: An input norm's tensors, whose first axis runs over what the layer sees.
INPUT_NORM = ("weight", "bias", "running_mean", "running_var")
#: A layer and one of its units.
Unit = tuple[int, int]


class Run(NamedTuple):
    """`repeat` positions for each unit of a layer; with layer None, `repeat` that are no unit's."""

    layer: int | None
    repeat: int = 1


Runs = tuple[Run, ...]
#: What a head reads.
Reader = Callable[[LinearHead], Runs]


@dataclass(frozen=True)
class Axis:
    """Axis `dim` of the tensor `name` of the network's state_dict.

    read: by a layer or a head whose weight this is; else a unit's own, or of a norm on it. blocks:
    channel groups of a convolution, every one of which keeps as many positions as the others.
    """

    name: str
    dim: int
    runs: Runs
    read: bool = False
    blocks: int = 1


@dataclass
class Wiring:
    """Of a network.

    units: of every layer. ties: pairs of maps that a shortcut adds.
    """

    units: list[int]
    axes: list[Axis] = field(default_factory=list)
    ties: list[tuple[Runs, Runs]] = field(default_factory=list)

    def spread(self, runs: Runs) -> Iterator[Unit | None]:
        """The unit at every position of an axis, None where there is none."""
        for layer, repeat in runs:
            if layer is None:
                yield from (None for _ in range(repeat))
            else:
                yield from ((layer, u) for u in range(self.units[layer]) for _ in range(repeat))

    def tied(self) -> dict[Unit, list[Unit]]:
        """Every unit that a shortcut ties to others -> all of them, itself included."""
        together: dict[Unit, list[Unit]] = {}
        for one, other in self.ties:
            for a, b in zip(self.spread(one), self.spread(other), strict=True):
                if a is None or b is None or b in together.get(a, ()):
                    continue
                merged = [*together.get(a, [a]), *together.get(b, [b])]
                together.update(dict.fromkeys(merged, merged))
        return together


def of(net: LocalNet) -> Wiring:
    """The wiring of a network of local layers.

    Raises:
        ValueError: its layers are not all there is (an opponent's ResNet).
    """
    if isinstance(net, ResNet):
        raise ValueError("[wiring] expected a network of local layers, got a "
                         f"{type(net).__name__}, whose blocks are none")
    found = Wiring([net.layer(i).weight.shape[0] for i in range(len(net.layers))])
    seen, given = inputs(net, found)
    for i, runs in enumerate(seen):
        _own(net, i, found)
        layer = net.layer(i)
        found.axes.append(Axis(f"layers.{i}.weight", 1, runs, read=True, blocks=blocks_of(layer)))
        if layer.pre_norm is not None:
            found.axes += [Axis(f"layers.{i}.pre_norm.{name}", 0, runs) for name in INPUT_NORM
                           if getattr(layer.pre_norm, name) is not None]
    for j, head in enumerate(net.heads):
        assert isinstance(head, LinearHead)
        found.axes.append(Axis(f"heads.{j}.weight", 1, given(head), read=True))
    return found


def blocks_of(layer: LocalLayer) -> int:
    """Channel groups of a layer's convolution."""
    return 1 if layer.geometry is None else layer.geometry.groups


def _own(net: LocalNet, i: int, found: Wiring) -> None:
    layer = net.layer(i)
    found.axes += [Axis(f"layers.{i}.{name}", 0, (Run(i),), blocks=blocks_of(layer))
                   for name in OWN if getattr(layer, name) is not None]
    if isinstance(net, RecurrentNet):
        found.axes.append(Axis(f"hidden_{i}", 1, (Run(i),)))


@functools.singledispatch
def inputs(net: LocalNet, found: Wiring) -> tuple[list[Runs], Reader]:
    """(the runs of every layer's input, a function that gives those of a head's); fills `ties`."""
    maps: list[Runs] = [(Run(None, net.shapes[0][0]),)]
    seen: list[Runs] = []
    shortcut: Runs = ()
    for i, wire in enumerate(net.wires):
        seen.append(_entering(net, i, maps[-1]))
        out: Runs = (Run(i),)
        if wire.join == "add":
            found.ties.append((out, shortcut))
        elif wire.join == "concat":
            out = (*out, *shortcut)
        shortcut = out if wire.branch else shortcut
        maps.append(out)

    def read(head: LinearHead) -> Runs:
        runs: list[Run] = []
        for i in head.layers:
            of_map = maps[i + 1] if head.features == "z" else (Run(i),)
            runs += flat(of_map, math.prod(net.shapes[i + 1][1:]))
        return tuple(runs)

    return seen, read


def _entering(net: LocalNet, i: int, runs: Runs) -> Runs:
    """What layer i's weight sees of the map that arrives."""
    shape = net.shapes[i]
    if net.wires[i].pool_before:
        shape = (shape[0], *(s // 2 for s in shape[1:]))
    return flat(runs, math.prod(shape[1:])) if isinstance(net.layer(i), LocalLinear) else runs


def flat(runs: Sequence[Run], pixels: int) -> Runs:
    """The runs of a map whose channels are flattened to as many columns as it has pixels."""
    return tuple(Run(layer, repeat * pixels) for layer, repeat in runs)


@inputs.register
def _(net: RecurrentNet, found: Wiring) -> tuple[list[Runs], Reader]:
    around: list[Run] = [Run(None, math.prod(net.in_shape)),
                         *(Run(i) for i in range(len(net.layers))), Run(None, net.num_classes)]
    seen: list[Runs] = [(around[i], around[i + 2]) for i in range(len(net.layers))]
    return seen, lambda head: tuple(around[1:-1])
