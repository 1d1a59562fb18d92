"""The memory plan: where the network is cut into segments, and how many samples a tile holds.

Inside a segment sample tiles go depth-first through its layers and add to the segment's weight
gradients; only at a cut does the whole batch's map (and a live shortcut) exist. planner.py chooses
plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Arriving(NamedTuple):
    """How a layer finds its maps: "own", the turn's to free; "held", somebody else's too; "encoded"
    where it makes its input of the batch. A shortcut may be the map "x" itself, or None."""

    x: Literal["own", "held", "encoded"]
    shortcut: Literal["own", "held", "x"] | None = None


class TurnBytes(NamedTuple):
    """Of a layer's turn on a tile, its own maps counted and held ones not."""

    peak: int
    #: Lives on after the turn beside the maps: losses, goodness, features that a head reads.
    kept: int
    leaving: Arriving


class Entrance(NamedTuple):
    """Of a step's parts outside its segments, parameters and states not counted."""

    #: While the segments go on: samples, targets, results of heads.
    base: int
    #: The most that is live before the first segment and after the last.
    peak: int


@dataclass(frozen=True)
class Segment:
    """Consecutive layers trained tile by tile; `tile >= batch` is one tile without buffers."""

    layers: range
    tile: int
    out_shape: tuple[int, ...]
    shortcut_shape: tuple[int, ...] | None
    shortcut_is_x: bool
    overwrite_x: bool
    overwrite_shortcut: bool
    last: bool
    peak_bytes: int
    seconds: float
    #: The layers train one after the other, the last one first, in passes of their own: one
    #: layer's gradient is summed at a time, and those before it are run anew.
    one_by_one: bool = False


@dataclass(frozen=True)
class Plan:
    """Segments in order. Bytes are of a whole training step; seconds only rank plans."""

    segments: tuple[Segment, ...]
    batch: int
    floor_bytes: int
    peak_bytes: int
    #: Bytes are spent on fewer launches: 16-bit copies of weights live on between steps, and a
    #: layer writes its features into the map of their concatenation.
    roomy: bool = False

    @property
    def working_bytes(self) -> int:
        return self.peak_bytes - self.floor_bytes

    @property
    def seconds(self) -> float:
        return sum(segment.seconds for segment in self.segments)

    @property
    def cuts(self) -> list[int]:
        """Layers after which the whole batch's map exists."""
        return [segment.layers.stop - 1 for segment in self.segments[:-1]]

    @property
    def tile(self) -> list[int]:
        """Samples a tile, per segment."""
        return [min(segment.tile, self.batch) for segment in self.segments]

    @property
    def one_by_one(self) -> list[bool]:
        """Segments that train a layer at a time, the last first."""
        return [segment.one_by_one for segment in self.segments]


def one_tile(span: range, batch: int) -> Plan:
    """The layers of a span in one segment and one tile; its bytes are not known yet."""
    segment = Segment(span, max(batch, 1), (), None, False, False, False, True, 0, 0.0)
    return Plan((segment,) if span else (), batch, 0, 0)
