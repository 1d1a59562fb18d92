"""Overlapping local updates (Trifecta, sec. 4): a loss crosses one layer boundary, no more.

The layer that takes the loss updates itself and, through its own input gradient, the layer before
it. Of that layer only what its update needs is held: the input its weight saw, and a byte an
element that says where a gradient goes through relu and pool. Pre-activations live a tile of rows
at a time; batch statistics are taken before the tiles.

Buffers beside those of program.py: o{i} what the layer multiplies and adds, r{i} routes through
relu and pool, f{i} dL/da by the next layer's loss, that is of y{i + 1}; g{i} and p{i} sums of the
gradients of either loss, G{i} and P{i} the gradients.
"""

from __future__ import annotations

import functools
import math

import torch

from ffengine.engine.batch import paired
from ffengine.engine.compiling import Layers, framed
from ffengine.engine.program import Facts, Loop, Part, Program, Store
from ffengine.nn.layers import LocalLinear
from ffengine.nn.network import LocalNet

#: Pre-activations that live at once. A step of trifecta/shallow at batch 32 in fp32 holds 120, 99,
#: 89 and 86 MB with 16, 4, 2 and 1 MB of them, and takes 0.45, 0.46, 0.48 and 0.53 s. A GPU pays
#: fifteen launches a tile: 32 MB of them (predicted to be enough to fill it, not measured).
TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 23}


def compile_overlapping(net: LocalNet, facts: Facts) -> Program:
    """The program of a step whose losses train the layer before theirs too."""
    layers = Overlapped(net, facts)
    for i in range(facts.turn.depth):
        layers.turn(i)
    return framed(net, facts, layers.parts, {i: f"x{i + 1}" for i in range(facts.turn.depth)})


class Overlapped(Layers):
    """Writes the parts of layers whose losses overlap."""

    def __init__(self, net: LocalNet, facts: Facts) -> None:
        super().__init__(net, facts)
        self.parts: list[Part] = []
        #: (what its weight saw, its statistics) of the layer before, if the next loss trains it.
        self.held: tuple[str, str | None] | None = None
        #: The gradients of its own loss, if they wait for those of the next one.
        self.own: str | None = None

    def turn(self, i: int) -> None:
        """Layer i over the whole batch, and the update of the layer before."""
        net, wire, layer, turn = self.net, self.net.wires[i], self.net.layer(i), self.facts.turn
        takes, keeps = i in turn.layers, i + 1 in turn.layers
        crosses = takes and (self.held is not None or self.trains_labels(i))
        want_z = i + 1 < turn.depth or i in self.read
        addend = self.shortcut if wire.join == "add" and want_z else None
        z = ((f"z{i}" if addend else f"x{i + 1}"),) if want_z else ()
        u, statistics = self.entered(i, self.transformed(i))
        self.add("operands", i, f"o{i}", u=u)
        size = self.rows_of_a_tile(i, paired(net))
        # a dense layer in one tile: its gradients are larger than its maps, and are not formed
        # before what it multiplies has gone and the layer before has had its update
        late = isinstance(layer, LocalLinear) and size * (1 + paired(net)) >= self.facts.rows
        if takes and not late:
            self.add("gradient_sums", i, f"g{i}")
        seen = net.input_of(i, net.shapes[i])
        stores = [Store(name, layer.z_shape(seen)) for name in z]
        stores += [Store(f"r{i}", layer.z_shape(seen), dtype=torch.uint8)] * keeps
        stores += [Store(f"e{i}", seen)] * crosses
        self.flush()
        self.sweep(i, u, z, keeps=keeps, crosses=crosses)
        gradients = functools.partial(self.gradients, i, u, statistics, crosses=crosses)
        if takes and not late:
            gradients()
        self.tiles((u,), tuple(stores), size, pairs=paired(net))
        if crosses:
            self.cross(i, statistics, f"d{i}" if late else f"g{i}")
        if takes and late:
            self.add("gradient_sums", i, f"g{i}")
            gradients()
        if takes:
            self.add("gradient", i, f"G{i}", sums=f"g{i}")
        if takes and not (keeps and statistics):
            self.add("update_own", i, gradients=f"G{i}")
        self.own = f"G{i}" if takes and keeps and statistics else None
        self.held = (u, statistics) if keeps else None
        if addend:
            self.add("add", i, f"x{i + 1}", z=f"z{i}", shortcut=addend)
        self.after(i, want_z)
        self.flush()

    def sweep(self, i: int, u: str, z: tuple[str, ...], *, keeps: bool, crosses: bool) -> None:
        """A tile of the layer: features, routes for the update by the next loss, dL/da and dL/dx of
        its own."""
        self.add("forward", i, f"a{i}", u=u, operands=f"o{i}")
        if keeps:
            self.add("routes", i, f"r{i}", a=f"a{i}")
        if i not in self.facts.turn.layers:
            self.add("activate", i, *z, a=f"a{i}")
            return
        self.add("local_pass", i, f"d{i}", *z, a=f"a{i}")
        if crosses:
            self.add("input_gradient", i, f"e{i}", u=u, d=f"d{i}", operands=f"o{i}")

    def gradients(self, i: int, u: str, statistics: str | None, *, crosses: bool) -> None:
        """Adds a tile's, or all rows', to the gradients of layer i by its own loss."""
        norm = self.net.layer(i).pre_norm
        wanted = crosses and norm is not None and not norm.folded
        self.add("add_gradient", i, u=u, statistics=statistics, d=f"d{i}",
                 du=f"e{i}" if wanted else None, sums=f"g{i}")

    def cross(self, i: int, statistics: str | None, of: str) -> None:
        """The update of what stands before layer i by its loss, whose gradients are scaled as those
        of the buffer `of`."""
        self.add("through_norm", i, f"y{i}", du=f"e{i}", statistics=statistics)
        if self.held is None:
            self.add("update_labels", 0, dx=f"y{i}", of=of)
            return
        (u, before), k = self.held, i - 1
        self.add("gradient_sums", k, f"p{k}")
        self.flush()
        self.add("along_routes", k, f"f{k}", routes=f"r{k}", dz=f"y{i}", of=of)
        self.add("add_gradient", k, u=u, statistics=before, d=f"f{k}", sums=f"p{k}")
        self.tiles((u, f"r{k}", f"y{i}"), (), self.rows_of_a_tile(k, pairs=False), pairs=False)
        # at the weights that its own loss saw: before the update by that one
        self.add("gradient", k, f"P{k}", sums=f"p{k}")
        if self.own is not None:
            self.add("update_own", k, gradients=self.own)
        self.add("update_next", k, gradients=f"P{k}")

    def rows_of_a_tile(self, i: int, pairs: bool) -> int:
        """How many, or pairs of them, make TILE_ELEMENTS pre-activations of layer i; one at least.
        """
        layer = self.net.layer(i)
        row = (1 + pairs) * math.prod(layer.out_shape(self.net.input_of(i, self.net.shapes[i])))
        device = "cpu" if layer.weight.device.type == "cpu" else "cuda"
        return max(1, TILE_ELEMENTS[device] // row)

    def tiles(self, reads: tuple[str, ...], stores: tuple[Store, ...], size: int, *,
              pairs: bool) -> None:
        """The lines so far as tiles of so many rows or pairs."""
        made = {name for line in self.lines for name in line.writes}
        shares = dict.fromkeys(name for line in self.lines for _, name in line.reads
                               if name not in made and name not in reads)
        self.parts.append(Loop(
            self.take(), size, pairs, title="tiles", reads=reads, shares=tuple(shares),
            stores=stores))

    def flush(self) -> None:
        """The lines so far, as they are."""
        self.parts += self.take()
