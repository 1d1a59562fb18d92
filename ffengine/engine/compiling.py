"""Compiles a step in which every layer of the turn trains on its own loss (program.py).

A plan's segments become loops over tiles of the batch; heads stand around them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ffengine.engine import heads, label_channel
from ffengine.engine.batch import paired
from ffengine.engine.context import Turn
from ffengine.engine.memory.plan import Plan, Segment, one_tile
from ffengine.engine.program import (
    Facts,
    Instruction,
    Loop,
    Mode,
    Part,
    Program,
    Store,
    finished,
)
from ffengine.nn.layers import LocalLinear
from ffengine.nn.network import LocalNet
from ffengine.ops.config import Loss


def compile_step(net: LocalNet, plan: Plan, facts: Facts,
                 writer: type[Layers] | None = None) -> Program:
    """The program of a step in which every layer of the turn trains on its own loss.

    Args:
        writer: of a layer's lines, default Layers.
    """
    x: str | None = None
    shortcut: str | None = None
    parts: list[Part] = []
    features: dict[int, str] = {}
    for segment in covering(plan, range(facts.first, facts.turn.depth), facts.rows):
        made, end = segments(net, facts, segment, x, shortcut, writer or Layers)
        x, shortcut, whole = end.x, end.shortcut, segment.tile >= facts.rows
        parts += [*made, *(part for i in segment.layers for part in end.closing(i, whole))]
        features |= {i: f"x{i + 1}" if whole else f"h{i}" for i in segment.layers}
    return framed(net, facts, parts, features)


def framed(net: LocalNet, facts: Facts, layers: Sequence[Part],
           features: Mapping[int, str]) -> Program:
    """The program of these parts: pairs made before them, and heads with a pass of their own
    trained before that; those that read the layers' `features` at the end."""
    turn = facts.turn
    alone = [h for h in turn.heads if heads.of(net, h).image == "neutral" or not turn.depth]
    parts: list[Part] = [Instruction("head_alone", h, (("batch", "batch"),)) for h in alone]
    if turn.depth and paired(net):
        parts.append(Instruction("pair", facts.first, (("batch", "batch"),), ("pairs",)))
    parts += layers
    parts += [Instruction("head", h, tuple((features[i],) * 2 for i in heads.of(net, h).layers))
              for h in turn.heads if turn.depth and heads.of(net, h).image == "pass"]
    return finished(parts, facts)


def covering(plan: Plan, layers: range, rows: int) -> list[Segment]:
    """The plan's segments over these layers; those that it leaves out, being of another turn, go in
    one tile."""
    if not plan.segments:
        return list(one_tile(layers, rows).segments)
    before = range(layers.start, plan.segments[0].layers.start)
    after = range(plan.segments[-1].layers.stop, layers.stop)
    found = [*one_tile(before, rows).segments, *plan.segments, *one_tile(after, rows).segments]
    return [r for r in found if r.layers.start < layers.stop and r.layers.stop > layers.start]


def segments(net: LocalNet, facts: Facts, segment: Segment, x: str | None, shortcut: str | None,
             writer: type[Layers]) -> tuple[list[Part], Layers]:
    """A segment's passes over the batch (one, or one for each layer that trains), and where the
    next segment starts from."""
    turn, size = facts.turn, min(segment.tile, facts.rows)
    layers = [i for i in segment.layers if facts.first <= i < turn.depth]
    reads = tuple(dict.fromkeys(name for name in (x, shortcut) if name is not None))
    shares = (source(net),) if x is None else ()
    parts: list[Part] = []
    end: Layers | None = None
    for upto, trained in passes(segment, layers, turn):
        made = writer(net, facts, x, shortcut)
        for i in upto:
            made.layer(i, size, "pass" if i not in trained else
                       "train" if upto is layers else "alone")
        sums = tuple(f"g{i}" for i in trained if i in turn.layers and made.adds_up(size))
        parts += [Instruction("zeros", int(name[1:]), (), (name,)) for name in sums]
        loop = Loop(made.take(), size, segment=segment, reads=reads, shares=(*shares, *sums))
        if end is None and size < facts.rows:
            loop = replace(loop, stores=stores(segment, made, x, shortcut), keeps=tuple(
                pair for i in layers for pair in made.keeps(i)))
        parts.append(loop)
        end = end or made
    assert end is not None
    return parts, end


def stores(segment: Segment, end: Layers, x: str | None,
           shortcut: str | None) -> tuple[Store, ...]:
    """The whole-batch maps that the next segment starts from, over those of this one where they
    fit."""
    if not end.more:
        return ()
    # which a head may read as it is
    free = segment.overwrite_x and x is not None and int(x[1:]) - 1 not in end.read
    assert end.x is not None
    found = [Store(end.x, segment.out_shape, x if free else None)]
    if end.shortcut not in (None, end.x, x, shortcut):
        assert end.shortcut is not None and segment.shortcut_shape is not None
        found.append(Store(end.shortcut, segment.shortcut_shape,
                           shortcut if segment.overwrite_shortcut else None))
    return tuple(found)


def passes(segment: Segment, layers: list[int], turn: Turn) -> list[tuple[list[int], list[int]]]:
    """(layers that the tiles go through, those of them that train), pass by pass.

    One by one, the last layer trains first: no layer's features have changed when it is run anew.
    """
    if not segment.one_by_one:
        return [(layers, layers)]
    below = [(layers[:k + 1], [layers[k]]) for k in range(len(layers) - 2, -1, -1)
             if layers[k] in turn.layers]
    return [(layers, layers[-1:]), *below]


def read_by_heads(net: LocalNet, turn: Turn) -> set[int]:
    """Layers whose features a head in training reads in this pass."""
    return {i for h in turn.heads for i in heads.of(net, h).layers
            if heads.of(net, h).image == "pass"}


def joining(net: LocalNet, turn: Turn) -> int:
    """How many layers may join a shortcut: the last one does not if nobody reads its features."""
    return turn.depth - (turn.depth - 1 not in read_by_heads(net, turn))


def source(net: LocalNet) -> str:
    """The buffer whose rows are encoded."""
    return "pairs" if paired(net) else "batch"


class Layers:
    """Writes the instructions of layers, one after the other.

    x, shortcut: the buffers that the next one finds; without x it encodes its input first.
    """

    #: A plan may cut between two layers: what the later one finds is x and shortcut alone.
    cuts = True

    def __init__(self, net: LocalNet, facts: Facts, x: str | None = None,
                 shortcut: str | None = None) -> None:
        self.net, self.facts, self.x, self.shortcut = net, facts, x, shortcut
        self.read, self.joining = read_by_heads(net, facts.turn), joining(net, facts.turn)
        self.lines: list[Instruction] = []
        #: The turn goes on after the last layer so far.
        self.more = True

    def add(self, op: str, i: int, *writes: str, **reads: str | None) -> None:
        """Write a line."""
        given = tuple((role, name) for role, name in reads.items() if name is not None)
        self.lines.append(Instruction(op, i, given, writes))

    def take(self) -> tuple[Instruction, ...]:
        """The lines so far, and begin anew."""
        lines, self.lines = tuple(self.lines), []
        return lines

    def layer(self, i: int, tile: int, mode: Mode = "train") -> None:
        """One layer's whole turn on a tile of so many rows."""
        net, wire, layer, turn = self.net, self.net.wires[i], self.net.layer(i), self.facts.turn
        self.more = i + 1 < turn.depth
        want_z = mode != "alone" and (self.more or i in self.read)
        addend, beside = (self.shortcut if wire.join == how and want_z else None
                          for how in ("add", "concat"))
        z = ((f"z{i}" if beside else f"x{i + 1}"),) if want_z else ()
        x = self.transformed(i)
        if i not in turn.layers:
            self.add("infer", i, *z, *self.at_rest(i), x=x, shortcut=addend)
        elif mode == "pass":
            self.add("pass_on", i, *z, x=x, shortcut=addend)
        elif self.streams(i, tile) and not want_z:
            self.add("linear_step", i, x=x, g0=self.term(i))
        else:
            room = None
            if (beside and self.facts.roomy and net.propagate == "stale"
                    and layer.batch_coupling is None):
                room, z = f"w{i}", (f"x{i + 1}",)
                self.add("place", i, room, shortcut=beside)
                beside = None
            self.train(i, tile, x, addend, room, z)
        if beside:
            self.add("concatenate", i, f"x{i + 1}", z=f"z{i}", shortcut=beside)
        self.after(i, want_z)

    def encode(self, i: int) -> str:
        """Layer i's input, made of the batch where no layer before it has given it."""
        if self.x is None:
            self.x = f"x{i}"
            self.add("encode", i, self.x, batch=source(self.net))
        return self.x

    def transformed(self, i: int) -> str:
        """Layer i's input, pooled or as a row where it sees it so."""
        x = self.encode(i)
        row = isinstance(self.net.layer(i), LocalLinear) and len(self.net.shapes[i]) > 1
        if not (row or self.net.wires[i].pool_before):
            return x
        self.add("transform", i, f"v{i}", x=x)
        return f"v{i}"

    def keeps(self, i: int) -> list[tuple[str, str]]:
        """Buffers of a tile that outlive it after layer i, and what all tiles' are called then."""
        return [(f"x{i + 1}", f"h{i}")] if i in self.read else []

    def at_rest(self, i: int) -> tuple[str, ...]:
        """What a layer at rest leaves beside its features."""
        return ()

    def term(self, i: int) -> str | None:
        """A buffer that is added to layer i's goodness."""
        return None

    def closing(self, i: int, whole: bool) -> list[Part]:
        """What follows layer i when all rows have gone through it, in one tile or in several."""
        return []

    def entered(self, i: int, x: str) -> tuple[str, str | None]:
        """What the weight of layer i sees of x, and the statistics of its own norm."""
        if self.net.layer(i).pre_norm is None:
            return x, None
        self.add("enter", i, f"u{i}", f"n{i}", x=x)
        return f"u{i}", f"n{i}"

    def after(self, i: int, want_z: bool) -> None:
        """The buffers that layer i leaves."""
        self.x, wire = f"x{i + 1}", self.net.wires[i]
        if not want_z or not self.net.shortcut_live_after(i, self.joining):
            self.shortcut = None
        elif wire.branch:
            self.shortcut = f"s{i}" if wire.branch_pool else self.x
            if wire.branch_pool:
                self.add("branch", i, f"s{i}", x=self.x)

    def adds_up(self, tile: int) -> bool:
        """The tiles' gradients do, in buffers of this program."""
        return tile < self.facts.rows and not self.facts.micro

    def train(self, i: int, tile: int, x: str, addend: str | None, room: str | None,
              z: tuple[str, ...]) -> None:
        """x -> a -> sweep -> update, and z of the weights before it, or after it."""
        updated = self.net.propagate == "updated"
        u, statistics = self.entered(i, x)
        g0 = self.term(i)
        self.add("forward", i, f"a{i}", u=u)
        if updated:
            self.add("local_pass", i, f"d{i}", a=f"a{i}", g0=g0)
        else:
            self.add("local_pass", i, f"d{i}", *z, a=f"a{i}", shortcut=addend, room=room, g0=g0)
        norm, du = self.net.layer(i).pre_norm, None
        if self.trains_labels(i):
            self.add("input_gradient", i, f"e{i}", u=u, d=f"d{i}")
            self.add("through_norm", i, f"y{i}", du=f"e{i}", statistics=statistics)
            self.add("update_labels", i, dx=f"y{i}", of=f"d{i}")
            du = None if norm is None or norm.folded else f"e{i}"  # which the norm's update wants
        self.add("update", i, u=u, statistics=statistics, d=f"d{i}", du=du,
                 sums=f"g{i}" if self.adds_up(tile) else None)
        if updated and z:
            self.add("pass_updated", i, *z, x=x, shortcut=addend)

    def streams(self, i: int, tile: int) -> bool:
        """A dense layer in one tile whose loss is known, which `linear_step` trains without its
        activations: worth it where they outweigh the gradient that it forms."""
        layer = self.net.layer(i)
        masks = layer.dropout > 0 and self.facts.masks_in_memory  # which linear_step has not
        plain = (layer.geometry is None and layer.pre_norm is None and layer.batch_coupling is None
                 and not masks and not self.trains_labels(i))
        return (plain and not self.facts.micro and tile == self.facts.rows
                and isinstance(layer.config.loss, Loss) and 2 * tile > layer.weight.shape[1])

    def trains_labels(self, i: int) -> bool:
        """The layer's loss trains a label channel too."""
        return i == 0 and label_channel.learned(self.net) is not None
