"""Which plan: the cuts and tiles that are fastest within a number of bytes.

A segment's peak follows from what its layers' turns hold, which a dry run tells (dry_run.py); the
best plan is a shortest path over the positions of cuts.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

from ffengine.engine.memory.plan import Arriving, Plan, Segment
from ffengine.engine.memory.shapes import NetSizes

#: Seconds a layer's turn costs beside its arithmetic, and what memory traffic and arithmetic cost;
#: measured on 2 cores with AVX-512 (bench/fair.py). They only rank plans.
TURN_SECONDS = 1.2e-4
BYTES_PER_SECOND = 8e9
FLOPS_PER_SECOND = {2: 1.2e12, 4: 2.2e11, 8: 5e10}
#: Pixels at which a product reaches half of its full rate.
HALF_RATE_PIXELS = 48
#: (layer, tile) -> seconds of the layer's turns over the whole batch.
Seconds = Callable[[int, int], float]


class Planner:
    """Chooses cuts and tiles for one network, phase, batch and dtype.

    Args:
        sizes: what every layer holds, from ffengine.engine.memory.shapes.
        seconds: measured costs; default a model of them.
    """

    def __init__(self, sizes: NetSizes, seconds: Seconds | None = None) -> None:
        self.sizes, self.seconds = sizes, seconds or functools.partial(modelled_seconds, sizes)
        n = max(sizes.batch, 1)
        whole = all(sizes.takes_all(i) for i in sizes.span)
        self.tiles = [*([] if whole else [2**k for k in range(n.bit_length()) if 2**k < n]), n]
        self.first, self.depth = sizes.span.start, sizes.span.stop
        #: Of a part of the network: its own floor, and bytes that lie beside every step.
        self._floor: int | None = None
        self._beside = 0

    def part(self, layers: range, floor: int, beside: int = 0) -> Planner:
        """The planner of some of the layers, which have a device of their own.

        Args:
            floor: bytes of their parameters and states.
            beside: what lies there all the while: batches that wait.
        """
        made = copy.copy(self)
        made.first, made.depth, made._floor, made._beside = (
            layers.start, layers.stop, floor, beside)
        return made

    def by(self, seconds: Seconds) -> Planner:
        """The same planner, ranking by these costs."""
        made = copy.copy(self)
        made.seconds = seconds
        made.__dict__.pop("_segments", None)
        return made

    @property
    def floor_bytes(self) -> int:
        """Parameters and optimizer states."""
        return self.sizes.floor_bytes if self._floor is None else self._floor

    @functools.cached_property
    def _segments(self) -> dict[tuple[int, int], list[Segment]]:
        """Every segment that a plan may be made of, by its first layer and the one after its
        last."""
        found: dict[tuple[int, int], list[Segment]] = {}
        span = range(self.first, self.depth)
        for start in span if self.sizes.cuts else span[:1]:
            for tile, one_by_one in itertools.product(self.tiles, (False, True)):
                for segment in self._segments_from(start, tile, one_by_one=one_by_one):
                    found.setdefault((start, segment.layers.stop), []).append(segment)
        return {at: _fastest_first(segments) for at, segments in found.items()}

    def fixed(self, cuts: Sequence[int], tile: int | Sequence[int],
              one_by_one: Sequence[bool] | bool = False) -> Plan:
        """The plan with these cuts (layer indices a cut follows) and tile or tiles, as asked."""
        stops = [c + 1 for c in cuts] + [self.depth]
        if self.first == self.depth:
            return self._plan([])
        if cuts and not self.sizes.cuts:
            raise ValueError("[plan] cuts expected none, as layers of one turn share more than "
                             f"their maps, got {list(cuts)}")
        if sorted(set(stops)) != stops or stops[0] < 1:
            raise ValueError(f"[plan] cuts must rise within 0..{self.depth - 2}, got {list(cuts)}")
        tiles = [tile] * len(stops) if isinstance(tile, int) else list(tile)
        if len(tiles) != len(stops) or min(tiles) < 1:
            raise ValueError(f"[plan] expected one tile >= 1 for each of {len(stops)} segments, "
                             f"got {tiles}")
        segments, start, n = [], self.first, max(self.sizes.batch, 1)
        alone = [one_by_one] * len(stops) if isinstance(one_by_one, bool) else one_by_one
        for stop, size, one in zip(stops, tiles, alone, strict=True):
            size = min(size, n)
            one = one and size < n and stop - start > 1
            found = [s for s in self._segments_from(start, size, stop, one)
                     if s.layers.stop == stop]
            if not found:
                raise ValueError(f"[plan] layers {start} to {stop - 1} expected tiles of "
                                 f"the whole batch, {n}, got {size}")
            segments.append(found[0])
            start = stop
        return self._plan(segments)

    def clipped(self, cuts: Sequence[int], tile: Sequence[int], one_by_one: Sequence[bool]) -> Plan:
        """`fixed`, of cuts and tiles of the whole network, as far as they are of these layers."""
        if self._floor is None:
            return self.fixed(cuts, tile, one_by_one)
        stops = [*(c + 1 for c in cuts), self.sizes.span.stop]
        return self._mine(list(map(range, [self.sizes.span.start, *stops], stops)), tile,
                          one_by_one)

    def like(self, plan: Plan) -> Plan:
        """The cuts and tiles of another phase's or batch size's plan, where they fit in this one.
        """
        if not self.sizes.cuts:
            tiles = (s.tile for s in plan.segments if self._overlaps(s.layers))
            return self.fixed([], min(tiles, default=1))
        return self._mine([s.layers for s in plan.segments], [s.tile for s in plan.segments],
                          [s.one_by_one for s in plan.segments])

    def _mine(self, layers: Sequence[range], tile: Sequence[int],
              one_by_one: Sequence[bool]) -> Plan:
        """`fixed`, of those segments that have layers of this planner's."""
        mine = [k for k, of in enumerate(layers) if self._overlaps(of)]
        return self.fixed([layers[k].stop - 1 for k in mine[:-1]], [tile[k] for k in mine] or 1,
                          [one_by_one[k] for k in mine] or False)

    def _overlaps(self, layers: range) -> bool:
        """Some of these layers are this planner's."""
        return layers.stop > self.first and layers.start < self.depth

    def best(self, budget: int | None = None) -> Plan:
        """The fastest plan within `budget` bytes.

        Without a budget: the smallest plan whose modelled time is within 5 % of the fastest.

        Raises:
            ValueError: no plan fits; the smallest that could is named.
        """
        if budget is not None:
            plan = self._fastest(budget)
            if plan is None:
                raise ValueError(f"[plan] no plan fits {budget / 1e6:.1f} MB: the smallest needs "
                                 f"{self.smallest().peak_bytes / 1e6:.1f} MB at batch "
                                 f"{self.sizes.batch}")
            return plan
        limit = 1.05 * self.fastest().seconds
        return self._bisect(lambda plan: plan is not None and plan.seconds <= limit)

    def one_tile(self) -> Plan:
        """The plan with the fewest turns."""
        return self.fixed([], max(self.sizes.batch, 1))

    def fastest(self) -> Plan:
        """The plan with the least modelled time, whatever it holds."""
        plan = self._fastest(None)
        assert plan is not None
        return plan

    def fits(self, budget: int) -> bool:
        """Some plan holds at most so many bytes."""
        return self._fastest(budget) is not None

    def smallest(self) -> Plan:
        """The plan with the lowest peak."""
        return self._bisect(lambda plan: plan is not None)

    def _bisect(self, good: Callable[[Plan | None], bool]) -> Plan:
        """Plan under the smallest budget that is still good; budgets are the segments' own peaks.
        """
        peaks = sorted({self._around(), *(
            s.peak_bytes for segments in self._segments.values() for s in segments)})
        low, high = 0, len(peaks) - 1
        while low < high:
            middle = (low + high) // 2
            if good(self._fastest(peaks[middle] + self.floor_bytes + self._beside)):
                high = middle
            else:
                low = middle + 1
        plan = self._fastest(peaks[low] + self.floor_bytes + self._beside)
        assert plan is not None
        return plan

    def _around(self) -> int:
        """What a step holds whatever its segments are, beside the floor."""
        return self.sizes.step_bytes if self.sizes.one_step else self.sizes.entrance.peak

    def _fastest(self, budget: int | None) -> Plan | None:
        """Shortest path over cut positions, by seconds."""
        room = math.inf if budget is None else budget - self.floor_bytes - self._beside
        if self._around() > room:
            return None
        best: dict[int, tuple[float, list[Segment]]] = {self.first: (0.0, [])}
        for stop in range(self.first + 1, self.depth + 1):
            for start in range(self.first, stop):
                segments = self._segments.get((start, stop), ()) if start in best else ()
                segment = next((r for r in segments if r.peak_bytes <= room), None)
                if segment is None:
                    continue
                total = best[start][0] + segment.seconds
                if stop not in best or total < best[stop][0]:
                    best[stop] = (total, [*best[start][1], segment])
        return self._plan(best[self.depth][1]) if self.depth in best else None

    def _plan(self, segments: list[Segment]) -> Plan:
        floor = self.floor_bytes
        peak = max([self._around(), *(segment.peak_bytes for segment in segments)]) + self._beside
        return Plan(tuple(segments), self.sizes.batch, floor, peak + floor, self.sizes.main.roomy)

    def _segments_from(self, start: int, tile: int, stop: int | None = None,
                       one_by_one: bool = False) -> list[Segment]:
        """Every segment that begins at layer `start` with this tile, peaks computed incrementally.
        """
        if one_by_one and tile >= self.sizes.batch:
            return []
        walk, segments = _Walk(self.sizes, start, tile, self.seconds, one_by_one), []
        for i in range(start, stop or self.depth):
            if tile < self.sizes.batch and self.sizes.takes_all(i):
                break
            walk.layer(i)
            if i > start or not one_by_one:
                segments.append(walk.segment(range(start, i + 1)))
        return segments


def _fastest_first(segments: list[Segment]) -> list[Segment]:
    """Segments of the same layers, each smaller than every faster one."""
    kept: list[Segment] = []
    for segment in sorted(segments, key=lambda r: (r.seconds, r.peak_bytes)):
        if not kept or segment.peak_bytes < kept[-1].peak_bytes:
            kept.append(segment)
    return kept


class _Walk:
    """Live bytes of a segment: one tile after the other through layers from `start` on."""

    def __init__(self, sizes: NetSizes, start: int, tile: int, seconds: Seconds,
                 one_by_one: bool = False) -> None:
        self.sizes, self.start, self.tile, self.costs = sizes, start, tile, seconds
        self.one_by_one, self.turns = one_by_one, math.ceil(sizes.batch / tile)
        #: Of the layers so far when they are only passed, in bytes and in seconds.
        self.passed, self.again = 0, 0.0
        #: Peaks of the passes in which the layers so far train alone.
        self.below: list[int] = []
        self.whole = tile >= sizes.batch
        self.arriving = None if sizes.one_step else self._first()
        self.peak = self.grads = self.kept = 0
        self.seconds = 0.0

    def _first(self) -> Arriving:
        """The first segment encodes its rows; in one tile the maps themselves travel; else the tile
        is a view of them."""
        if self.start == self.sizes.span.start:
            return Arriving("encoded")
        first = self.sizes.layers[self.start]
        shortcut = first.shortcut_in_shape is not None
        if not self.whole:
            return Arriving("held", "held" if shortcut else None)
        word: Literal["x", "own"] = "x" if first.shortcut_in_is_x else "own"
        return Arriving("own", word if shortcut else None)

    def layer(self, i: int) -> None:
        cost = self.costs(i, self.tile)
        self.seconds += cost + self.again * self.one_by_one
        self.again += cost / 2  # the product that makes a; the gradient's is as large
        if self.arriving is None:
            return
        made, gradient = self.sizes.turn(i, self.tile, self.arriving), self.sizes.gradient_bytes(i)
        if self.one_by_one:
            # what it and the layers before it keep is not there yet: `_peak` adds that of all
            alone, passing = (self.sizes.turn(i, self.tile, self.arriving, mode)
                              for mode in ("alone", "pass"))
            beside = gradient - self.turns * self.kept
            self.peak = max([beside + max(self.passed, made.peak) - made.kept, *self.below])
            self.below.append(beside + max(self.passed, alone.peak) - alone.kept)
            self.passed = max(self.passed, passing.peak)
        else:
            self.peak = max(self.peak, self.kept + made.peak)
            self.grads += gradient
        self.kept += made.kept
        self.arriving = made.leaving

    def segment(self, layers: range) -> Segment:
        sizes = self.sizes
        first, last_layer = sizes.layers[layers.start], sizes.layers[layers.stop - 1]
        last = layers.stop == sizes.span.stop
        carried = not any(sizes.layers[i].branch for i in layers)
        kept = last_layer.shortcut_live_after
        new_shortcut = kept and not last_layer.shortcut_out_is_x
        keep_alias = first.shortcut_in_is_x and new_shortcut and carried
        # the first segment has no map of all rows, and one by one its input is read once more
        ours = layers.start > sizes.span.start and not self.one_by_one
        over_x = ours and not keep_alias and last_layer.out_shape == first.x_shape
        over_s = new_shortcut and (carried or (
            not self.one_by_one and not first.shortcut_in_is_x
            and first.shortcut_in_shape == last_layer.shortcut_out_shape))
        peak = sizes.step_bytes if sizes.one_step else self._peak(
            over_x, over_s, last, new_shortcut, layers)
        return Segment(layers, self.tile, last_layer.out_shape,
                       last_layer.shortcut_out_shape if kept else None,
                       last_layer.shortcut_out_is_x, over_x, over_s, last, peak, self.seconds,
                       self.one_by_one)

    def _peak(self, over_x: bool, over_s: bool, last: bool, new_shortcut: bool,
              layers: range) -> int:
        """Beside the floor, in the last tile: what all layers keep of the others exists then."""
        sizes, batch = self.sizes, self.sizes.batch
        first, last_layer = sizes.layers[layers.start], sizes.layers[layers.stop - 1]
        peak = sizes.entrance.base + sizes.kept_bytes[layers.start] + self.peak
        if self.whole:
            return peak
        # the maps before the cut, those after it that are not written over them, and gradients
        before = 0 if layers.start == sizes.span.start else batch * (
            first.x_bytes + (0 if first.shortcut_in_is_x else first.shortcut_in_bytes))
        after = 0 if last or over_x else last_layer.out_bytes
        if new_shortcut and not over_s and not last:
            after += last_layer.shortcut_out_bytes
        others = self.turns - 1 + self.one_by_one
        return peak + before + batch * after + self.grads + others * self.kept


def modelled_seconds(sizes: NetSizes, i: int, tile: int) -> float:
    """Seconds of layer i's turns over the whole batch, tile by tile."""
    s, turns = sizes.layers[i], math.ceil(max(sizes.batch, 1) / tile)
    slow = 1 + HALF_RATE_PIXELS / max(tile * s.pixels, 1)
    # weights are read and reordered each turn; a buffer is read and written
    traffic = s.weight_bytes * (3 if turns == 1 else 5)
    return (turns * (TURN_SECONDS + traffic / BYTES_PER_SECOND)
            + sizes.batch * s.flops * slow / FLOPS_PER_SECOND[sizes.itemsize])
