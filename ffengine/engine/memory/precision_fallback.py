"""What a memory budget is met with: slower plans first, then fewer bits, one rung at a time.

    optimizer states in fp32 -> bf16 -> 8-bit blocks -> (precision bf16) weights in bf16 too

The first rung on which a plan fits is taken, and on it the fastest plan by measured costs. What was
given up for the budget is said in words.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from ffengine.engine.inputs import rows_of
from ffengine.engine.memory.budget import megabytes
from ffengine.engine.memory.costs import Costs
from ffengine.engine.memory.curves import curves
from ffengine.engine.memory.planner import Planner
from ffengine.engine.memory.plans import Job, TrainingPlan, phase_starts, planner_for
from ffengine.engine.optim import floor_bytes, round_weights
from ffengine.engine.run.settings import Settings

#: (states, weights) in the order they are tried.
LADDER = (("fp32", "fp32"), ("bf16", "fp32"), ("8bit", "fp32"), ("8bit", "bf16"))
SPOKEN = {"fp32": "fp32", "bf16": "bf16", "8bit": "8-bit blocks"}
#: A plan this close to the fastest one's time gives nothing up.
CLOSE = 1.005

log = logging.getLogger("ffengine")


@dataclass(frozen=True)
class Choice:
    """Plans within a budget, and what they took.

    job: with the precisions of the rung. costs: what ranked the plans. gave_up: sentences.
    seconds: a step's predicted seconds, the mean over the run's epochs; None by modelled costs,
        which only rank.
    """

    job: Job
    plans: TrainingPlan
    costs: Literal["measured", "modelled"]
    gave_up: tuple[str, ...] = ()
    seconds: float | None = None


def choose(job: Job, samples: int, budget: int | None, *, fixed: bool = False, held: int = 0,
           micro: bool = False, measure: bool = True) -> Choice:
    """The fastest plans within `budget` bytes on the highest rung that has any.

    Args:
        measure: time the layers on this machine; else a model ranks, which is always the same.
        fixed: the job's precisions are the caller's wish: no other rung is tried.
        held: bytes that lie in memory beside every step.
        micro: a step is a piece of a larger batch, whose gradients add up.

    Raises:
        ValueError: nothing fits; the smallest that could is named, with its precisions.
    """
    if budget is None:
        planners = _planners(job, samples, held, micro)
        return Choice(job, _unbounded(planners, job.device), "modelled")
    at, planners = rung(job, samples, budget, fixed=fixed, held=held, micro=micro)
    if job.device == "cuda":
        at, planners = _with_room(at, samples, budget, planners, held, micro)
    found = _fastest(at, budget, planners, _measured(at, samples, planners) if measure else None)
    # what the caller wished for is not given up
    return found if fixed else replace(found, gave_up=(*saved_bits(at), *found.gave_up))


def rung(job: Job, samples: int, budget: int, *, fixed: bool = False,
         held: int = 0, micro: bool = False) -> tuple[Job, dict[int, Planner]]:
    """The job with the precisions of the highest rung on which a plan fits, and its planners by
    the first epoch of their phase; arguments and ValueError as `choose`."""
    tried: list[tuple[int, Settings]] = []
    for settings in rungs(job.settings, fixed):
        at = _with(job, settings)
        planners = _planners(at, samples, held, micro)
        need = max(p.smallest().peak_bytes for p in planners.values())
        if need <= budget:
            return at, planners
        tried.append((need, settings))
    need, settings = min(tried, key=lambda row: row[0])
    raise ValueError(
        f"[plan] no plan fits {megabytes(budget)}: the smallest needs "
        f"{megabytes(need, enough=True)} at batch {samples}, with {precisions(settings)}")


def rungs(settings: Settings, fixed: bool) -> Iterator[Settings]:
    """The settings with the precisions of every rung that may be stood on."""
    if fixed or settings.precision == "fp64":
        yield settings
        return
    for states, weights in LADDER:
        if weights == "fp32" or settings.precision == "bf16":
            yield replace(settings, states=states, weights=weights)


def precisions(settings: Settings) -> str:
    """In words."""
    if settings.precision == "fp64":
        return "states and weights in fp64"
    return (f"optimizer states in {SPOKEN[settings.states]} and weights in "
            f"{SPOKEN[settings.weights]}")


def _with(job: Job, settings: Settings) -> Job:
    """The job on a rung: its network without memory, weights in the rung's precision."""
    memo: dict[int, object] = {}
    for t in (*job.net.parameters(), *job.net.buffers()):
        bare = torch.empty_like(t, device="meta")
        memo[id(t)] = nn.Parameter(bare, t.requires_grad) if isinstance(t, nn.Parameter) else bare
    net, schedule = copy.deepcopy((job.net, job.schedule), memo)
    if settings.weights == "bf16":
        round_weights(net)
    return replace(job, net=net, schedule=schedule, settings=settings)


def _planners(job: Job, samples: int, held: int, micro: bool) -> dict[int, Planner]:
    """A planner a phase, by its first epoch."""
    return {e: planner_for(job, samples, e, held=held, micro=micro)
            for e in phase_starts(job.schedule)}


def _unbounded(planners: dict[int, Planner], device: str) -> TrainingPlan:
    """Without a budget: on a GPU, whose launches cost more than its memory traffic, one tile (500
    launches of a ResNet-17 step at batch 128 become about 210, predicted 8 -> 4 ms, not measured
    yet); else the smallest plan of nearly the fastest's time."""
    if device != "cuda":
        return _best(planners, None)
    return TrainingPlan(tuple((epoch, p.one_tile()) for epoch, p in planners.items()))


def _with_room(job: Job, samples: int, budget: int, planners: dict[int, Planner], held: int,
               micro: bool) -> tuple[Job, dict[int, Planner]]:
    """The roomy job, if its fastest plans fit beside what it keeps; else the one it is."""
    roomy = replace(job, roomy=True)
    found = _planners(roomy, samples, held, micro)
    fits = all(p.fastest().peak_bytes <= budget for p in found.values())
    return (roomy, found) if fits else (job, planners)


def _best(planners: dict[int, Planner], budget: int | None) -> TrainingPlan:
    return TrainingPlan(tuple((epoch, p.best(budget)) for epoch, p in planners.items()))


def _fastest(job: Job, budget: int, planners: dict[int, Planner],
             measured: dict[int, Planner] | None) -> Choice:
    """The fastest plans of a rung on which some fit."""
    made = measured or planners
    plans = _best(made, budget)
    free = TrainingPlan(tuple((epoch, p.fastest()) for epoch, p in made.items()))
    spent, least = (mean_seconds(p, job.schedule.total) for p in (plans, free))
    given = []
    if free.peak_bytes > budget and spent > CLOSE * least:
        given.append(f"the fastest plan needs {megabytes(free.peak_bytes)}: this one takes "
                     f"{spent / least:.2f} x its time")
    return Choice(job, plans, "measured" if measured else "modelled", tuple(given),
                  spent if measured else None)


def _measured(job: Job, samples: int, planners: dict[int, Planner]) -> dict[int, Planner] | None:
    """The planners, ranking by measured costs; None where a layer cannot be timed."""
    costs = Costs(job, rows_of(job.net, samples))
    made: dict[int, Planner] = {}
    try:
        for epoch, planner in planners.items():
            seconds = costs.at(epoch)
            if seconds is None:
                return None
            made[epoch] = planner.by(seconds)
            made[epoch].fastest()
    except RuntimeError as error:  # the device ran out of memory, say
        log.warning("[costs] a layer could not be timed, a model ranks the plans: %s", error)
        return None
    finally:
        curves().save()
    return made


def mean_seconds(plans: TrainingPlan, epochs: int) -> float:
    """A step's seconds, the mean over the run's epochs."""
    starts = [start for start, _ in plans.phases]
    ends = [*starts[1:], max(epochs, starts[-1] + 1)]
    total = sum(plan.seconds * (end - start)
                for (start, plan), end in zip(plans.phases, ends, strict=True))
    return total / (ends[-1] - starts[0])


def saved_bits(job: Job) -> list[str]:
    """What precisions below fp32 gave up, with the bytes that it saves."""
    settings, schedule = job.settings, job.schedule
    wide = replace(settings, states="fp32").optim()
    phases, owners = schedule.phases(), schedule.owners()
    floors = [floor_bytes(job.net, optim, phases, owners) for optim in (wide, settings.optim())]
    given = []
    if floors[1] < floors[0]:
        given.append(f"optimizer states in {SPOKEN[settings.states]} instead of fp32: saves "
                     f"{megabytes(floors[0] - floors[1])}")
    half = sum(2 * p.numel() for p in job.net.parameters() if p.dtype is torch.bfloat16)
    if half:
        given.append("weights in bf16, rounded stochastically, instead of fp32: saves "
                     f"{megabytes(half)}")
    return given
