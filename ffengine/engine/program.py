"""The step as data: how a batch becomes an update, as a list of instructions on named buffers.

    encode (batch) -> x0
    zeros 0 -> g0
    for 8 rows of 128, layers 0 to 1:
        forward 0 (x0) -> a0
        local_pass 0 (a0) -> d0, x1                 d0: dL/da; x1 over a0
        update 0 (x0, d0, g0)                       adds up; the last tile steps
        ...
    for 128 rows of 128, layers 2 to 3:
        ...

`compile_step` writes the program of a network, a turn and a plan; `execute` runs it. A buffer is
freed by the last instruction that reads it: nobody says so, it is found here.

Buffers: x{i} input of layer i; v{i} the same, pooled or flattened; u{i} and n{i} what the layer's
own norm makes of it, and its statistics; a{i} pre-activation; d{i} dL/da and what else the sweep
leaves for the update; z{i} features before a concatenation, w{i} room for the concatenated map;
s{i} shortcut that branches off after layer i; h{i} all tiles of x{i + 1}, for a head; g{i}
gradients that tiles add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from ffengine.engine import heads, label_channel
from ffengine.engine.context import Turn
from ffengine.engine.plan import Plan, Run, one_tile
from ffengine.nn.layers import LocalLinear
from ffengine.nn.network import LocalNet
from ffengine.ops.config import Loss


@dataclass(frozen=True)
class Instruction:
    """One line: an op (engine/execute.py) of a layer or a head.

    reads: (role, buffer). writes: buffers, as the op gives them. frees: those of them all that
    nobody reads later.
    """

    op: str
    index: int
    reads: tuple[tuple[str, str], ...] = ()
    writes: tuple[str, ...] = ()
    frees: frozenset[str] = frozenset()


class Store(NamedTuple):
    """A whole-batch buffer of which every tile writes its rows: per-sample shape, the buffer whose
    memory it takes if any, and its dtype if it is not the maps'."""

    name: str
    shape: tuple[int, ...]
    over: str | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Segment:
    """Instructions that go over the batch a tile of rows at a time, or all at once.

    size: rows of a tile, or pairs of rows where positives and negatives are halves that stay
    together. run: of the plan, if it is one. title: what to call it. reads: whole-batch buffers,
    of which a tile sees its rows. shares: what every tile sees as it is, sums of gradients first of
    all. stores: the whole-batch maps it leaves. keeps: (a tile's buffer, the name under which all
    tiles' are kept).
    """

    lines: tuple[Instruction, ...]
    size: int
    pairs: bool = False
    run: Run | None = None
    title: str = "segment"
    reads: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    stores: tuple[Store, ...] = ()
    keeps: tuple[tuple[str, str], ...] = ()
    frees: frozenset[str] = frozenset()

    def whole(self, rows: int) -> bool:
        """One tile holds the batch."""
        return self.size * (1 + self.pairs) >= rows


Part = Instruction | Segment
#: What a layer does in a pass over the batch: train and give features, give the features that it
#: trains with in another pass, or train alone.
Mode = Literal["train", "pass", "alone"]


@dataclass(frozen=True)
class Program:
    """A step: what comes before the layers, their segments, and the heads that read them."""

    parts: tuple[Part, ...]
    rows: int

    def __deepcopy__(self, memo: object) -> Program:
        return self


@dataclass(frozen=True)
class Facts:
    """What a program depends on beside network and plan.

    rows: of the batch. first: the first layer that is run; those below gave the batch's features.
    roomy: as of the plan. micro: the batch is a piece of one whose gradients add up.
    masks_in_memory: kernels read dropout's step from memory.
    """

    turn: Turn
    rows: int
    first: int = 0
    roomy: bool = False
    micro: bool = False
    masks_in_memory: bool = False


def compile_step(net: LocalNet, plan: Plan, facts: Facts) -> Program:
    """The program of a step in which every layer of the turn trains on its own loss."""
    x, shortcut = f"x{facts.first}", None
    parts: list[Part] = []
    features: dict[int, str] = {}
    for run in covering(plan, range(facts.first, facts.turn.depth), facts.rows):
        made, end = segments(net, facts, run, x, shortcut)
        parts, x, shortcut = parts + made, end.x, end.shortcut
        features |= {i: f"x{i + 1}" if run.tile >= facts.rows else f"h{i}" for i in run.layers}
    return framed(net, facts, parts, features)


def framed(net: LocalNet, facts: Facts, layers: Sequence[Part],
           features: Mapping[int, str]) -> Program:
    """The program of these parts: the batch encoded before them; heads with a pass of their own
    trained before that, those that read the layers' `features` at the end."""
    turn = facts.turn
    alone = [h for h in turn.heads if heads.of(net, h).image == "neutral" or not turn.depth]
    parts: list[Part] = [Instruction("head_alone", h, (("batch", "batch"),)) for h in alone]
    if turn.depth:
        parts.append(Instruction("encode", 0, (("batch", "batch"),), (f"x{facts.first}",)))
    parts += layers
    parts += [Instruction("head", h, tuple((features[i],) * 2 for i in heads.of(net, h).layers))
              for h in turn.heads if turn.depth and heads.of(net, h).image == "pass"]
    return finished(parts, facts)


def finished(parts: Sequence[Part], facts: Facts) -> Program:
    """The parts, told what each of them frees.

    Raises:
        ValueError: one reads what nobody has written, or what is freed by then.
    """
    told = tuple(freed(parts, facts.rows)[0])
    check(told, facts.rows, {"batch"})
    return Program(told, facts.rows)


def covering(plan: Plan, layers: range, rows: int) -> list[Run]:
    """The plan's runs over these layers; those that it leaves out, being of another turn, go in one
    tile."""
    if not plan.runs:
        return list(one_tile(layers, rows).runs)
    before = range(layers.start, plan.runs[0].layers.start)
    after = range(plan.runs[-1].layers.stop, layers.stop)
    found = [*one_tile(before, rows).runs, *plan.runs, *one_tile(after, rows).runs]
    return [r for r in found if r.layers.start < layers.stop and r.layers.stop > layers.start]


def segments(net: LocalNet, facts: Facts, run: Run, x: str,
             shortcut: str | None) -> tuple[list[Part], Layers]:
    """A run's passes over the batch (one, or one for each layer that trains), and where the next
    run starts from."""
    turn, size = facts.turn, min(run.tile, facts.rows)
    layers = [i for i in run.layers if facts.first <= i < turn.depth]
    reads = (x,) if shortcut in (None, x) else (x, str(shortcut))
    parts: list[Part] = []
    end: Layers | None = None
    for upto, trained in passes(run, layers, turn):
        made = Layers(net, facts, x, shortcut)
        for i in upto:
            made.layer(i, size, "pass" if i not in trained else
                       "train" if upto is layers else "alone")
        sums = tuple(f"g{i}" for i in trained if i in turn.layers and made.adds_up(size))
        parts += [Instruction("zeros", int(name[1:]), (), (name,)) for name in sums]
        segment = Segment(made.take(), size, run=run, reads=reads, shares=sums)
        if end is None and size < facts.rows:
            segment = replace(segment, stores=stores(run, made, x, shortcut), keeps=tuple(
                (f"x{i + 1}", f"h{i}") for i in layers if i in made.read))
        parts.append(segment)
        end = end or made
    assert end is not None
    return parts, end


def stores(run: Run, end: Layers, x: str, shortcut: str | None) -> tuple[Store, ...]:
    """The whole-batch maps that the next run starts from, over those of this one where they fit."""
    if not end.more:
        return ()
    free = run.overwrite_x and int(x[1:]) - 1 not in end.read  # by a head, as it is
    found = [Store(end.x, run.out_shape, x if free else None)]
    if end.shortcut not in (None, end.x, x, shortcut):
        assert end.shortcut is not None and run.shortcut_shape is not None
        found.append(Store(end.shortcut, run.shortcut_shape,
                           shortcut if run.overwrite_shortcut else None))
    return tuple(found)


def passes(run: Run, layers: list[int], turn: Turn) -> list[tuple[list[int], list[int]]]:
    """(layers that the tiles go through, those of them that train), pass by pass.

    One by one, the last layer trains first: no layer's features have changed when it is run anew.
    """
    if not run.one_by_one:
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


class Layers:
    """Writes the instructions of layers, one after the other.

    x, shortcut: the buffers that the next one finds.
    """

    def __init__(self, net: LocalNet, facts: Facts, x: str, shortcut: str | None) -> None:
        self.net, self.facts, self.x, self.shortcut = net, facts, x, shortcut
        self.read = read_by_heads(net, facts.turn)
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
        x, self.more = self.x, i + 1 < turn.depth
        want_z = mode != "alone" and (self.more or i in self.read)
        addend, beside = (self.shortcut if wire.join == how and want_z else None
                          for how in ("add", "concat"))
        z = ((f"z{i}" if beside else f"x{i + 1}"),) if want_z else ()
        if self.transforms(i):
            x = f"v{i}"
            self.add("transform", i, x, x=self.x)
        if i not in turn.layers:
            self.add("infer", i, *z, x=x, shortcut=addend)
        elif mode == "pass":
            self.add("pass_on", i, *z, x=x, shortcut=addend)
        elif self.streams(i, tile) and not want_z:
            self.add("linear_step", i, x=x)
        else:
            room = None
            if beside and self.facts.roomy and net.propagate == "stale" and layer.couple is None:
                room, z = f"w{i}", (f"x{i + 1}",)
                self.add("place", i, room, shortcut=beside)
                beside = None
            self.train(i, tile, x, addend, room, z)
        if beside:
            self.add("concatenate", i, f"x{i + 1}", z=f"z{i}", shortcut=beside)
        self.after(i, want_z)

    def transforms(self, i: int) -> bool:
        """Layer i sees its input pooled, or as a row."""
        return self.net.wires[i].pool_before or (
            isinstance(self.net.layer(i), LocalLinear) and len(self.net.shapes[i]) > 1)

    def after(self, i: int, want_z: bool) -> None:
        """The buffers that layer i leaves."""
        self.x, wire = f"x{i + 1}", self.net.wires[i]
        if not want_z or not self.net.shortcut_live_after(i, joining(self.net, self.facts.turn)):
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
        u, statistics = x, None
        if self.net.layer(i).pre_norm is not None:
            u, statistics = f"u{i}", f"n{i}"
            self.add("enter", i, u, statistics, x=x)
        self.add("forward", i, f"a{i}", u=u)
        if updated:
            self.add("local_pass", i, f"d{i}", a=f"a{i}")
        else:
            self.add("local_pass", i, f"d{i}", *z, a=f"a{i}", shortcut=addend, room=room)
        if shown := self.trains_labels(i):
            self.add("train_labels", 0, "e0", u=u, statistics=statistics, d="d0")
        self.add("update", i, u=u, statistics=statistics, d=f"d{i}", du="e0" if shown else None,
                 sums=f"g{i}" if self.adds_up(tile) else None)
        if updated and z:
            self.add("pass_updated", i, *z, x=x, shortcut=addend)

    def streams(self, i: int, tile: int) -> bool:
        """A dense layer in one tile whose loss is known, which `linear_step` trains without its
        activations: worth it where they outweigh the gradient that it forms."""
        layer = self.net.layer(i)
        masks = layer.dropout > 0 and self.facts.masks_in_memory  # which linear_step has not
        plain = (layer.geometry is None and layer.pre_norm is None and layer.couple is None
                 and not masks and not self.trains_labels(i))
        return (plain and not self.facts.micro and tile == self.facts.rows
                and isinstance(layer.config.loss, Loss) and 2 * tile > layer.weight.shape[1])

    def trains_labels(self, i: int) -> bool:
        """The layer's loss trains a label channel too."""
        return i == 0 and label_channel.learned(self.net) is not None


def check(parts: Sequence[Part], rows: int, live: set[str]) -> None:
    """ValueError for a part that reads, frees or stores a buffer that is not there. `live`: those
    that are; afterwards, those that are left."""
    def there(part: Part, names: Iterable[str], what: str) -> None:
        for name in names:
            if name not in live:
                said = part.title if isinstance(part, Segment) else f"{part.op} {part.index}"
                raise ValueError(f"[program] {said} expected {name} to {what}, but there is none")

    for part in parts:
        if isinstance(part, Segment) and part.whole(rows):
            check(part.lines, rows, live)
            continue
        if isinstance(part, Segment):
            there(part, (*part.reads, *part.shares), "read")
            mine = {*part.reads, *part.shares}
            check(part.lines, rows, mine)
            left = {*(s.name for s in part.stores), *(name for name, _ in part.keeps)}
            if not left <= mine:
                raise ValueError(f"[program] {part.title} expected its tiles to leave "
                                 f"{', '.join(sorted(left - mine))}, but they do not")
            live |= {*(s.name for s in part.stores), *(to for _, to in part.keeps)}
        else:
            there(part, (name for _, name in part.reads), "read")
            live |= {*part.writes}
        there(part, part.frees, "free")
        live -= part.frees


def freed(parts: Sequence[Part], rows: int,
          wanted: frozenset[str] = frozenset()) -> tuple[list[Any], frozenset[str]]:
    """The parts, told what each frees (all that it reads or writes and nobody wants later), and
    what they want of those before them."""
    found: list[Part] = []
    for part in reversed(parts):
        if isinstance(part, Instruction):
            reads, writes = {name for _, name in part.reads}, {*part.writes}
        elif part.whole(rows):
            lines, wanted = freed(part.lines, rows, wanted)
            found.append(replace(part, lines=tuple(lines)))
            continue
        else:
            left = {name for name, *_ in part.stores} | {name for name, _ in part.keeps}
            lines, _ = freed(part.lines, rows, frozenset(left.union(part.shares)))
            part = replace(part, lines=tuple(lines))
            reads = {*part.reads, *part.shares}
            writes = {s.name for s in part.stores} | {to for _, to in part.keeps}
        found.append(replace(part, frees=frozenset((reads | writes) - wanted)))
        wanted = wanted - writes | reads
    return found[::-1], wanted
