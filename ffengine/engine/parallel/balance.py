"""Which layers each stage of a pipeline trains: the slowest stage as fast as can be.

A pipeline is as fast as its slowest stage, whatever the others do.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Sequence

from ffengine.engine.context import Turn
from ffengine.engine.inputs import rows_of
from ffengine.engine.memory.budget import megabytes
from ffengine.engine.memory.costs import Costs
from ffengine.engine.memory.curves import curves
from ffengine.engine.memory.plan import Plan
from ffengine.engine.memory.planner import Planner
from ffengine.engine.memory.plans import Job, part_of
from ffengine.engine.parallel.cutting import piece_of
from ffengine.engine.parallel.pipeline import Pipeline

#: (stage, its layers) -> they fit the memory of its device.
Fits = Callable[[int, range], bool]


def layer_seconds(job: Job, samples: int, planner: Planner, plan: Plan, *,
                  measure: bool) -> list[float]:
    """Seconds of every layer's turn on a batch, in the tiles of the network's plan.

    Args:
        planner: of the whole network; its model is used where nothing is measured.
        measure: time the layers on this machine.
    """
    depth = len(job.net.layers)
    tiles = {i: s.tile for s in plan.segments for i in s.layers}
    seconds = planner.seconds
    if measure:
        costs, turn = Costs(job, rows_of(job.net, samples)), Turn(tuple(range(depth)), depth)
        seconds = functools.partial(costs.seconds, turn=turn)
    found = [seconds(i, min(tiles[i], planner.sizes.batch)) for i in range(depth)]
    curves().save()
    return found


def balanced(seconds: Sequence[Sequence[float]], fits: Fits) -> list[range] | None:
    """The layers of every stage, None where no cuts fit.

    Args:
        seconds: of every layer, on the device of each stage.
        fits: whether layers fit a stage's memory.
    """
    stages, depth = len(seconds), len(seconds[0])

    @functools.cache
    def best(stage: int, start: int) -> tuple[float, float, tuple[int, ...]] | None:
        """(the slowest stage, the sum of squares, stops) of the layers from `start` on."""
        last, found = stage == stages - 1, None
        for stop in [depth] if last else range(start + 1, depth - (stages - stage - 2)):
            rest = (0.0, 0.0, ()) if last else best(stage + 1, stop)
            if rest is None or not fits(stage, range(start, stop)):
                continue
            mine = sum(seconds[stage][start:stop])
            made = max(mine, rest[0]), mine * mine + rest[1], (stop, *rest[2])
            found = made if found is None else min(found, made)
        return found

    made = best(0, 0)
    if made is None:
        return None
    stops = made[2]
    return [range(a, b) for a, b in zip((0, *stops[:-1]), stops, strict=True)]


def cuts(job: Job, planner: Planner, budgets: Sequence[int | None],
         seconds: Sequence[Sequence[float]], pipeline: Pipeline) -> list[range] | None:
    """The layers of every stage within its device's budget; those that were asked for, if they
    fit. None where nothing does."""
    fits = fitting(job, planner, budgets, pipeline.queue)
    wish = asked(pipeline)
    if wish is None:
        return balanced(seconds, fits)
    return wish if all(fits(stage, layers) for stage, layers in enumerate(wish)) else None


def asked(pipeline: Pipeline) -> list[range] | None:
    """The layers of every stage, where somebody says which."""
    if pipeline.layers is None:
        return None
    stops = list(itertools.accumulate(pipeline.layers))
    return [range(a, b) for a, b in zip((0, *stops[:-1]), stops, strict=True)]


def fitting(job: Job, planner: Planner, budgets: Sequence[int | None], queue: int) -> Fits:
    """Whether a plan of layers fits the budget of a stage."""
    @functools.cache
    def fits(stage: int, layers: range) -> bool:
        budget = budgets[stage]
        return budget is None or _part(job, planner, layers, queue).fits(budget)

    return fits


def unfit(job: Job, planner: Planner, budgets: Sequence[int | None], pipeline: Pipeline) -> str:
    """What would fit where `cuts` finds nothing: the stage that lacks most, in the cuts where it
    lacks least."""
    need = functools.cache(
        lambda layers: _part(job, planner, layers, pipeline.queue).smallest().peak_bytes)

    def lack(stage: int, layers: range) -> int:
        budget = budgets[stage]
        return 0 if budget is None else need(layers) - budget

    found = asked(pipeline)
    if found is None:
        depth, lacks = planner.depth, sorted({
            lack(s, range(a, b)) for s in range(len(budgets))
            for b in range(1, planner.depth + 1) for a in range(b)})
        even = [[1.0] * depth] * len(budgets)
        # the least that, added to every budget, lets some cuts fit
        least = lacks[bisect.bisect_left(lacks, True, key=lambda more: balanced(
            even, lambda s, layers: lack(s, layers) <= more) is not None)]
        found = balanced(even, lambda s, layers: lack(s, layers) <= least)
    assert found is not None
    stage = max(range(len(found)), key=lambda s: lack(s, found[s]))
    layers, budget = found[stage], budgets[stage]
    assert budget is not None
    return (f"[pipeline] no cuts into {len(budgets)} stages fit {megabytes(budget)}: stage {stage} "
            f"(layers {layers.start}-{layers.stop - 1}) needs "
            f"{megabytes(need(layers), enough=True)}")


def _part(job: Job, planner: Planner, layers: range, queue: int) -> Planner:
    return part_of(planner, job, piece_of(job.net, layers, queue))
