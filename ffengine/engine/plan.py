"""The memory plan: where to cut the network into runs, and how many samples a tile holds.

Inside a run sample tiles go depth-first through its layers and add to the run's weight gradients;
only at a cut does the whole batch's map (and a live shortcut) exist. `peak` is computed from
shapes by walking the same allocations in the same order as ffengine.engine.step makes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ffengine.engine.shapes import LayerSizes, NetSizes

#: Seconds a layer's turn costs beside its arithmetic, and what memory traffic and arithmetic cost;
#: measured on 2 cores with AVX-512 (bench/fair.py). They only rank plans.
TURN_SECONDS = 1.2e-4
BYTES_PER_SECOND = 8e9
FLOPS_PER_SECOND = {2: 1.2e12, 4: 2.2e11, 8: 5e10}
#: Pixels at which a product reaches half of its full rate.
HALF_RATE_PIXELS = 48


@dataclass(frozen=True)
class Run:
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


@dataclass(frozen=True)
class Plan:
    """Runs in order. Bytes are of a whole training step; seconds only rank plans."""

    runs: tuple[Run, ...]
    batch: int
    floor_bytes: int
    peak_bytes: int

    @property
    def working_bytes(self) -> int:
        return self.peak_bytes - self.floor_bytes

    @property
    def seconds(self) -> float:
        return sum(run.seconds for run in self.runs)

    @property
    def cuts(self) -> list[int]:
        """Layers after which the whole batch's map exists."""
        return [run.layers.stop - 1 for run in self.runs[:-1]]

    @property
    def tile(self) -> list[int]:
        """Samples a tile, per run."""
        return [min(run.tile, self.batch) for run in self.runs]


class Planner:
    """Chooses cuts and tiles for one network, batch and dtype.

    Args:
        sizes: what every layer holds, from ffengine.engine.shapes.
    """

    def __init__(self, sizes: NetSizes) -> None:
        self.sizes = sizes
        n = max(sizes.batch, 1)
        # pairs, batch statistics and updated features want the whole batch in one tile
        small = [] if sizes.whole else [2**k for k in range(int(math.log2(n)) + 1) if 2**k < n]
        self.tiles = [*small, n]
        self.depth = len(sizes.layers)
        self._runs: dict[tuple[int, int], list[Run]] = {}
        for start in range(self.depth):
            for tile in self.tiles:
                for run in self._runs_from(start, tile):
                    self._runs.setdefault((start, run.layers.stop), []).append(run)

    def fixed(self, cuts: Sequence[int], tile: int | Sequence[int]) -> Plan:
        """The plan with these cuts (layer indices a cut follows) and tile or tiles, as asked."""
        stops = [c + 1 for c in cuts] + [self.depth]
        if sorted(set(stops)) != stops or stops[0] < 1:
            raise ValueError(f"[plan] cuts must rise within 0..{self.depth - 2}, got {list(cuts)}")
        tiles = [tile] * len(stops) if isinstance(tile, int) else list(tile)
        if len(tiles) != len(stops) or min(tiles) < 1:
            raise ValueError(f"[plan] expected one tile >= 1 for each of {len(stops)} runs, "
                             f"got {tiles}")
        runs, start, n = [], 0, max(self.sizes.batch, 1)
        if self.sizes.whole and min(tiles) < n:
            raise ValueError(f"[plan] this network expected tiles of the whole batch, {n}, "
                             f"got {tiles}")
        for stop, size in zip(stops, tiles, strict=True):
            size = min(size, n)
            runs.append(next(r for r in self._runs_from(start, size) if r.layers.stop == stop))
            start = stop
        return self._plan(runs)

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

    def fastest(self) -> Plan:
        """The plan with the least modelled time, whatever it holds."""
        plan = self._fastest(None)
        assert plan is not None
        return plan

    def smallest(self) -> Plan:
        """The plan with the lowest peak."""
        return self._bisect(lambda plan: plan is not None)

    def _bisect(self, good: Callable[[Plan | None], bool]) -> Plan:
        """Plan under the smallest budget that is still good; budgets are the runs' own peaks."""
        peaks = sorted({r.peak_bytes for runs in self._runs.values() for r in runs})
        low, high = 0, len(peaks) - 1
        while low < high:
            middle = (low + high) // 2
            if good(self._fastest(peaks[middle] + self.sizes.floor_bytes)):
                high = middle
            else:
                low = middle + 1
        plan = self._fastest(peaks[low] + self.sizes.floor_bytes)
        assert plan is not None
        return plan

    def _fastest(self, budget: int | None) -> Plan | None:
        """Shortest path over cut positions, by modelled seconds."""
        room = math.inf if budget is None else budget - self.sizes.floor_bytes
        best: list[tuple[float, list[Run]] | None] = [None] * (self.depth + 1)
        best[0] = (0.0, [])
        for stop in range(1, self.depth + 1):
            for start in range(stop):
                before = best[start]
                if before is None:
                    continue
                fitting = [r for r in self._runs.get((start, stop), ()) if r.peak_bytes <= room]
                if not fitting:
                    continue
                run = min(fitting, key=lambda r: (r.seconds, r.peak_bytes))
                total = before[0] + run.seconds
                here = best[stop]
                if here is None or total < here[0]:
                    best[stop] = (total, [*before[1], run])
        end = best[self.depth]
        return None if end is None else self._plan(end[1])

    def _plan(self, runs: list[Run]) -> Plan:
        peak = max(run.peak_bytes for run in runs) + self.sizes.floor_bytes
        return Plan(tuple(runs), self.sizes.batch, self.sizes.floor_bytes, peak)

    def _runs_from(self, start: int, tile: int) -> list[Run]:
        """Every run that begins at layer `start` with this tile, peaks computed incrementally."""
        sizes, runs = self.sizes, []
        walk = _Walk(sizes, start, tile)
        for stop in range(start + 1, self.depth + 1):
            walk.layer(sizes.layers[stop - 1])
            runs.append(walk.run(range(start, stop)))
        return runs


class _Walk:
    """Live bytes of one tile going through a run, in the order of engine.step.layer_step."""

    def __init__(self, sizes: NetSizes, start: int, tile: int) -> None:
        self.sizes, self.start, self.tile = sizes, start, tile
        self.whole = tile >= sizes.batch
        first = sizes.layers[start]
        # In one tile the maps themselves travel; else the tile is a view and costs nothing.
        n = tile if self.whole else 0
        self.x = n * first.x_bytes
        self.shortcut = 0 if first.shortcut_in_is_x else n * first.shortcut_in_bytes
        self.aliased = first.shortcut_in_is_x
        self.peak = 0
        self.grads = 0
        # the step's report keeps every layer's goodness; a tiled run peaks in its last tile, when
        # that of all its layers exists
        self.report = sizes.batch * sum(s.goodness_bytes for s in sizes.layers[:start])
        self.kept = 0
        self.seconds = 0.0
        self.boundary = 0

    def _note(self, *more: int) -> None:
        self.peak = max(self.peak, self.report + self.x + self.shortcut + sum(more))

    def layer(self, s: LayerSizes) -> None:
        n = self.tile
        if self.whole:
            self.report += n * s.goodness_bytes
        else:
            self.kept += self.sizes.batch * s.goodness_bytes
        x, held = self.x, 0
        if s.transform_bytes:
            self._note(n * s.transform_bytes)
            x, held = n * s.transform_bytes, self.x if self.aliased else 0
            self.x = 0
        elif self.aliased:
            x, held, self.x = 0, self.x, 0
        else:
            self.x = 0
        a = n * s.a_bytes
        small = n * s.small_bytes
        x += n * s.enter_bytes
        self._note(held, x, a, s.forward_scratch(n))
        z = n * s.pooled_bytes
        if self.sizes.crosses:  # what the layer before kept, dx, dz and two temporaries of theirs
            held += self.boundary + 4 * n * s.x_bytes
            self.boundary = n * (s.enter_bytes + s.a_bytes)
        other = 0 if s.da_over_a else z or a  # beside da
        self._note(held, x, a, a if other else 0, z, small, s.pass_scratch(n))
        self._note(held, x, a, other, small, s.update_scratch(n, self.whole))
        if self.aliased:  # the map lives on as the shortcut alone
            self.shortcut, self.aliased = held, False
        z = n * s.z_bytes
        if s.join == "concat":
            self._note(z, n * s.out_bytes)
            z = n * s.out_bytes
        if s.join != "none":
            self._note(z, n * s.pooled_branch_bytes)
            self.shortcut = 0
        elif s.pooled_branch_bytes:
            self._note(z, n * s.pooled_branch_bytes)
        self.x = z
        if s.branch:
            self.aliased = not s.pooled_branch_bytes
            self.shortcut = n * s.pooled_branch_bytes
        elif not s.shortcut_live_after:
            self.shortcut = 0
        self._note()
        self.grads += s.weight_bytes
        self.seconds += self._layer_seconds(s)

    def _layer_seconds(self, s: LayerSizes) -> float:
        turns = math.ceil(max(self.sizes.batch, 1) / self.tile)
        rate = FLOPS_PER_SECOND[self.sizes.itemsize]
        slow = 1 + HALF_RATE_PIXELS / max(self.tile * s.pixels, 1)
        # weights are read and reordered each turn; a buffer is read and written
        traffic = s.weight_bytes * (3 if self.whole else 5)
        return (turns * (TURN_SECONDS + traffic / BYTES_PER_SECOND)
                + self.sizes.batch * s.flops * slow / rate)

    def run(self, layers: range) -> Run:
        sizes, batch = self.sizes, self.sizes.batch
        first, last_layer = sizes.layers[layers.start], sizes.layers[layers.stop - 1]
        last = layers.stop == len(sizes.layers)
        carried = not any(sizes.layers[i].branch for i in layers)
        kept = last_layer.shortcut_live_after
        new_shortcut = kept and not last_layer.shortcut_out_is_x
        keep_alias = first.shortcut_in_is_x and new_shortcut and carried
        # the first run may be looking at the caller's own batch
        ours = layers.start > 0 or sizes.copies_input
        over_x = ours and not keep_alias and last_layer.out_shape == first.x_shape
        over_s = new_shortcut and (keep_alias or (
            not first.shortcut_in_is_x
            and first.shortcut_in_shape == last_layer.shortcut_out_shape))
        peak = self.peak
        if not self.whole:
            # the maps before the cut, those after it that are not written over them, and gradients
            before = first.x_bytes + (0 if first.shortcut_in_is_x else first.shortcut_in_bytes)
            after = 0 if last or over_x else last_layer.out_bytes
            if new_shortcut and not over_s and not last:
                after += last_layer.shortcut_out_bytes
            peak += batch * (before + after) + self.grads + self.kept
        return Run(layers, self.tile, last_layer.out_shape,
                   last_layer.shortcut_out_shape if kept and not last else None,
                   last_layer.shortcut_out_is_x, over_x, over_s, last,
                   peak + sizes.input_bytes, self.seconds)
