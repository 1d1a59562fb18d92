"""A stage's program: the piece of the network's between what it receives and what it sends.

    receive 3 (batch) -> s2, x3
    ...                                 the layers' own lines, as one process has them
    send 5 (x6, s2)                     what later layers read

Whatever buffer is written before a cut and read after it travels: maps, live shortcuts, features
that a head of a later stage reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ffengine.engine import heads
from ffengine.engine.program import Facts, Instruction, Part, Program, finished
from ffengine.nn.chain import halved
from ffengine.nn.network import LocalNet

#: Ops whose index is a head's.
OF_HEADS = ("head", "head_alone", "gram")


@dataclass(frozen=True)
class Piece:
    """The part of a network that one stage of a pipeline trains.

    layers: consecutive ones. heads: those that read none of a later stage, but one of this. queue:
    batches that wait for the stage at most.
    """

    layers: range
    heads: tuple[int, ...] = ()
    queue: int = 2

    def holds(self, name: str) -> bool:
        """The parameter (or state, or buffer) of this name is the stage's. What belongs to no
        layer and no head stands before the layers."""
        kind, _, rest = name.partition(".")
        if kind not in ("layers", "heads"):
            return self.layers.start == 0
        return int(rest.split(".")[0]) in (self.layers if kind == "layers" else self.heads)


def piece_of(net: LocalNet, layers: range, queue: int = 2) -> Piece:
    """The piece of these layers."""
    mine = tuple(h for h in range(len(net.heads)) if max(heads.of(net, h).layers) in layers)
    return Piece(layers, mine, queue)


def staged(program: Program, net: LocalNet, facts: Facts, piece: Piece) -> Program:
    """The piece's program, of the whole network's.

    Raises:
        ValueError: tiles go through layers of two stages.
    """
    sides: dict[int, list[Part]] = {-1: [], 0: [], 1: []}
    for part in program.parts:
        for side, mine in split(part, net, facts.rows, piece.layers):
            sides[side].append(mine)
    before, own, after = ([traffic(part, facts.rows) for part in sides[k]] for k in (-1, 0, 1))
    ahead, later = writes(before), reads(after)
    arriving = sorted(ahead & (reads(own) | later))
    leaving = sorted((ahead | writes(own)) & later)
    first, last = piece.layers.start, piece.layers.stop - 1
    parts = sides[0]
    if sides[-1] and first:
        parts = [Instruction("receive", first, (("batch", "batch"),), tuple(arriving)), *parts]
    if sides[1]:
        parts = [*parts, Instruction("send", last, tuple((travels_as(n), n) for n in leaving))]
    return finished(parts, facts)


def split(part: Part, net: LocalNet, rows: int, layers: range) -> Iterator[tuple[int, Part]]:
    """(-1 before the layers | 0 of them | 1 after them, the part's lines there)."""
    def side(line: Instruction) -> int:
        i = max(heads.of(net, line.index).layers) if line.op in OF_HEADS else line.index
        return (i >= layers.stop) - (i < layers.start)

    if isinstance(part, Instruction):
        yield side(part), part
        return
    found = {k: tuple(line for line in part.lines if side(line) == k) for k in (-1, 0, 1)}
    found = {k: lines for k, lines in found.items() if lines}
    if len(found) > 1 and not part.whole(rows):
        raise ValueError(f"[pipeline] {part.title} expected tiles of one stage's layers, "
                         f"{layers.start} to {layers.stop - 1}, got some of others")
    for k, lines in found.items():
        yield k, replace(part, lines=lines)


Traffic = tuple[set[str], set[str]]


def traffic(part: Part, rows: int) -> Traffic:
    """(buffers that a part reads of others, those that it writes for them)."""
    if isinstance(part, Instruction):
        return {name for _, name in part.reads}, {*part.writes}
    if not part.whole(rows):
        return {*part.reads, *part.shares}, {*part.leaves}
    inner = [traffic(line, rows) for line in part.lines]
    return reads(inner), writes(inner)


def reads(parts: Iterable[Traffic]) -> set[str]:
    return {name for found, _ in parts for name in found}


def writes(parts: Iterable[Traffic]) -> set[str]:
    return {name for _, found in parts for name in found}


def travels_as(buffer: str) -> str:
    """What the next stage calls a buffer: all tiles of a map are the map."""
    return f"x{int(buffer[1:]) + 1}" if buffer[0] == "h" else buffer


def shape_of(net: LocalNet, buffer: str) -> tuple[int, ...]:
    """Per-sample shape of a buffer that travels: a map, or a shortcut of half its size."""
    if buffer[0] == "x":
        return net.shapes[int(buffer[1:])]
    return halved(net.shapes[int(buffer[1:]) + 1])

