"""The step as data: how a batch becomes an update, as a list of instructions on named buffers.

    zeros 0 -> g0
    for 8 rows of 128, layers 0 to 1:
        encode (batch) -> x0
        forward 0 (x0) -> a0
        local_pass 0 (a0) -> d0, x1                 d0: dL/da; x1 over a0
        update 0 (x0, d0, g0)                       adds up; the last tile steps
        ...
    for 128 rows of 128, layers 2 to 3:
        ...

`compile_step` (compiling.py) writes the program of a network, a turn and a plan; `execute` runs it.
A buffer is freed by the last instruction that reads it: nobody says so, `finished` finds it.

Buffers: x{i} input of layer i; v{i} the same, pooled or flattened; u{i} and n{i} what the layer's
own norm makes of it, and its statistics; a{i} pre-activation; d{i} dL/da and what else the sweep
leaves for the update; z{i} features before a concatenation, w{i} room for the concatenated map;
s{i} shortcut that branches off after layer i; h{i} all tiles of x{i + 1}, for a head; g{i}
gradients that tiles add up; e{i} and y{i} dL/d of what the weight sees and of the layer's input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from ffengine.engine.context import Turn
from ffengine.engine.memory.plan import Segment


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
class Loop:
    """Instructions that go over the batch a tile of rows at a time, or all at once.

    size: rows of a tile, or pairs of rows where positives and negatives are halves that stay
    together. segment: of the plan, if it is one. title: what to call it. reads: whole-batch
    buffers, of which a tile sees its rows. shares: what every tile sees as it is, sums of gradients
    first of all. stores: the whole-batch maps it leaves. keeps: (a tile's buffer, the name under
    which all tiles' are kept).
    """

    lines: tuple[Instruction, ...]
    size: int
    pairs: bool = False
    segment: Segment | None = None
    title: str = "segment"
    reads: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    stores: tuple[Store, ...] = ()
    keeps: tuple[tuple[str, str], ...] = ()
    frees: frozenset[str] = frozenset()

    def whole(self, rows: int) -> bool:
        """One tile holds the batch."""
        return self.size * (1 + self.pairs) >= rows

    @property
    def left(self) -> frozenset[str]:
        """A tile's buffers that it leaves."""
        return frozenset([s.name for s in self.stores] + [name for name, _ in self.keeps])

    @property
    def leaves(self) -> frozenset[str]:
        """Whole-batch buffers that the tiles make together."""
        return frozenset([s.name for s in self.stores] + [to for _, to in self.keeps])


Part = Instruction | Loop
#: What a layer does in a pass over the batch: train and give features, give the features that it
#: trains with in another pass, or train alone.
Mode = Literal["train", "pass", "alone"]


@dataclass(frozen=True)
class Program:
    """A step: what comes before the layers, their loops, and the heads that read them."""

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


def finished(parts: Sequence[Part], facts: Facts) -> Program:
    """The parts, told what each of them frees.

    Raises:
        ValueError: one reads what nobody has written, or what is freed by then.
    """
    told = tuple(freed(parts, facts.rows)[0])
    check(told, facts.rows, {"batch"})
    return Program(told, facts.rows)


def check(parts: Sequence[Part], rows: int, live: set[str]) -> None:
    """ValueError for a part that reads, frees or stores a buffer that is not there. `live`: those
    that are; afterwards, those that are left."""
    def there(part: Part, names: Iterable[str], what: str) -> None:
        for name in names:
            if name not in live:
                said = part.title if isinstance(part, Loop) else f"{part.op} {part.index}"
                raise ValueError(f"[program] {said} expected {name} to {what}, but there is none")

    for part in parts:
        if isinstance(part, Loop) and part.whole(rows):
            check(part.lines, rows, live)
            continue
        if isinstance(part, Loop):
            there(part, (*part.reads, *part.shares), "read")
            mine = {*part.reads, *part.shares}
            check(part.lines, rows, mine)
            if not part.left <= mine:
                raise ValueError(f"[program] {part.title} expected its tiles to leave "
                                 f"{', '.join(sorted(part.left - mine))}, but they do not")
            live |= part.leaves
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
            lines, _ = freed(part.lines, rows, part.left.union(part.shares))
            part = replace(part, lines=tuple(lines))
            reads, writes = {*part.reads, *part.shares}, {*part.leaves}
        found.append(replace(part, frees=frozenset((reads | writes) - wanted)))
        wanted = wanted - writes | reads
    return found[::-1], wanted
