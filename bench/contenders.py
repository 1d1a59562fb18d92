"""The contenders of a fair table: one network, one batch, one optimizer, one dtype, many ways to
step.

A contender owns its network (same initial weights), steps on call, and says what memory it holds.
What a step is, where layers train in phases (layer-wise, interleaved, overlapping schedules): one
batch in every phase, seconds summed with the phase's share of the epochs that the recipe counts. A
layer-wise schedule so compares an epoch of every layer with one epoch of backpropagation.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.authors import authors_step
from bench.machine import synchronize
from bench.problem import Problem, turns
from ffengine.baselines.steps import BackpropStep, UnfusedStep, backprop_recipes, pieces
from ffengine.data import loader
from ffengine.data.image_set import ImageSet
from ffengine.engine.batch import Batch
from ffengine.engine.memory.meter import MemoryMeter, allocator_events
from ffengine.engine.memory.plans import phase_starts
from ffengine.engine.trainer import Trainer
from ffengine.nn.differentiable import batch_statistics

#: Micro-batches that show a step's peak: the first leaves gradients, the second computes beside
#: them, the rest repeat it.
PIECES = 3
#: What rows say whose pieces are normalised by statistics of their own.
OTHER_STATISTICS = "other batch statistics"
#: A budget that no plan reaches: the fastest plan there is.
UNBOUNDED = 1 << 60


def nbytes(t: torch.Tensor) -> int:
    return t.untyped_storage().nbytes()


def nothing() -> None:
    """A phase that needs no entering."""


@dataclass
class Phase:
    """One batch of one phase: enter() untimed, then run(); `weight` of its seconds in a step.

    show: a run on less of the batch that holds as much memory, where there is one.
    """

    run: Callable[[], Any]
    weight: float = 1.0
    enter: Callable[[], Any] = nothing
    show: Callable[[], Any] | None = None


@dataclass
class Contender:
    """One row: what its step does, and which tensors live before and after it."""

    name: str
    kind: str
    phases: Sequence[Phase]
    tensors: Callable[[], dict[str, list[torch.Tensor]]]
    planned: Callable[[], int] | None = None
    note: str = ""
    channels_last: bool = False

    def seconds(self) -> float:
        """A step's time: every phase once, weighted."""
        total = 0.0
        for phase in self.phases:
            phase.enter()
            total += phase.weight * timed(phase.run)
        return total

    def warm(self) -> None:
        """Bring states to life, and whatever is compiled or measured at a first call."""
        for phase in self.phases:
            phase.enter()
            (phase.show or phase.run)()

    def glance(self) -> float:
        """Seconds of the part of a step that shows its memory: layouts are compared by it."""
        shown = 0.0
        for phase in self.phases:
            phase.enter()
            shown += phase.weight * timed(phase.show or phase.run)
        return shown

    def metered(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, int]:
        """Peak bytes of a step, their split, and the same by the allocator's own count."""
        worst: dict[str, int] = {"peak_bytes": 0}
        allocated = 0
        for phase in self.phases:
            phase.enter()
            gc.collect()  # what an earlier phase kept is not this one's
            show, tensors = phase.show or phase.run, self.tensors()
            feature = [*tensors.pop("batch", [x, y]), *tensors.pop("feature", [])]
            with MemoryMeter(**tensors, feature=feature) as meter:
                show()
            if meter.report.peak_bytes > worst["peak_bytes"]:
                worst = {"peak_bytes": meter.report.peak_bytes, **meter.report.at_peak}
            held = [*(t for group in tensors.values() for t in group), *feature]
            allocated = max(allocated, allocated_bytes(show, held))
        return {**worst, "allocated_bytes": allocated}


def timed(call: Callable[[], Any]) -> float:
    synchronize()
    start = machine.clock()
    call()
    synchronize()
    return machine.clock() - start


def allocated_bytes(call: Callable[[], Any], held: list[torch.Tensor]) -> int:
    """Peak of a call with what is held before it, as the allocator counts; kernels' private
    buffers are not in it on a CPU."""
    known = sum({t.untyped_storage().data_ptr(): nbytes(t) for t in held}.values())
    if held[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - known
        call()
        return torch.cuda.max_memory_allocated() - others
    with allocator_events() as events:
        call()
    return events.peak + known


#: Makes a contender, on its own copy of the network.
Builder = Callable[[], Contender]
Named = tuple[str, Builder]


def engine_contenders(problem: Problem, budget: int | None) -> Iterator[Named]:
    """Ours: (name, builder) of the default plan, the fastest, one for a budget, the smallest.

    Plans that equal an earlier one are left out. Networks with batch statistics have micro-batches
    of ours too, against backpropagation's; layer-wise ones stages that read stored features.
    """
    default = problem.trainer()
    planners = [default.planning.planner(problem.batch, epoch)
                for epoch in phase_starts(default.schedule)]
    wanted: dict[str, dict[str, Any]] = {"ffengine": {}}
    tiles = any(len(p.tiles) > 1 for p in planners)  # else there is one plan
    if tiles:
        wanted["ffengine, fastest"] = {"memory_budget": UNBOUNDED}
    if budget is not None:
        wanted[f"ffengine, {budget / 1e6:g} MB"] = {"memory_budget": budget}
    if tiles:
        least = max(p.smallest().peak_bytes for p in planners)
        wanted["ffengine, smallest"] = {"memory_budget": least}
    if any(default.net.layer(i).uses_batch_statistics for i in range(len(default.net.layers))):
        wanted |= {f"ffengine, {name}": {"micro_batch": size}
                   for size, name in pieces(problem.batch).items()}
    known: set[Any] = set()
    for name, changed in wanted.items():
        try:
            # one optimizer, one precision of its states, whatever the budget
            trainer = problem.trainer(states="fp32", **changed)
        except ValueError as refused:
            yield name, functools.partial(refuse, refused)
            continue
        # the plan stays; contenders share one allocator, which knows whose bytes are whose no more
        trainer.budget = None
        key = (trainer.micro_batch, tuple((epoch, tuple(plan.cuts), tuple(plan.tile))
                                          for epoch, plan in trainer.planning.plans(
                                              problem.batch).phases))
        if key not in known:
            known.add(key)
            yield name, functools.partial(engine_contender, problem, name, trainer)
    if default.schedule.by_stages and any(
            default.schedule.keeps_input(default.schedule.stage(epoch), shuffle=False)
            for _, epoch, _ in turns(default.schedule)):
        name = "ffengine, features stored"
        yield name, functools.partial(engine_contender, problem, name, default, stored=True)


def budget_contender(problem: Problem, name: str, budget: int) -> Contender:
    """Ours under one more budget, in bytes."""
    trainer = problem.trainer(states="fp32", memory_budget=budget)
    trainer.budget = None
    return engine_contender(problem, name, trainer)


def refuse(reason: ValueError) -> Contender:
    """A contender that cannot be built: the row says why."""
    raise reason


def one_batch(problem: Problem) -> Any:
    """A loader of the problem's one batch."""
    channels = problem.x.shape[1]
    images = ImageSet(problem.x, problem.y, (0.0,) * channels, (1.0,) * channels)
    return loader(images, batch_size=problem.batch)


def engine_contender(problem: Problem, name: str, trainer: Trainer,
                     stored: bool = False) -> Contender:
    """A trainer's steps. stored: a stage reads kept features, as `fit` does where they fit."""
    whole = Batch(problem.x, problem.y)
    reads: dict[str, Any] = {"item": whole, "epoch": None}
    several = turns(trainer.schedule)

    def phase(weight: float, epoch: int, iteration: int) -> Phase:
        def run() -> Any:
            return trainer.step(reads["item"], epoch=epoch, iteration=iteration)

        def enter() -> None:
            if len(several) == 1:
                return
            before, reads["epoch"] = reads["epoch"], epoch
            trainer.optimizer.activate(trainer.schedule.active(epoch))
            if stored:
                trainer.epoch, trainer.iteration = epoch, 0
                found = next(iter(trainer.schedule.loader(trainer, one_batch(problem), epoch)))
                reads["item"] = found if isinstance(found, Batch) else whole
            if before != epoch:
                run()  # a phase's states are new: first touch is not a step's time

        return Phase(run, weight, enter)

    def tensors() -> dict[str, list[torch.Tensor]]:
        held = [] if trainer.stored is None else trainer.stored.tensors()
        batch = [problem.x, problem.y] if reads["item"] is whole else [reads["item"].x]
        return {"parameter": [p.detach() for p in trainer.net.parameters()],
                "state": trainer.optimizer.state_tensors(), "feature": held, "batch": batch}

    return Contender(name, "ffengine", [phase(*turn) for turn in several], tensors,
                planned=lambda: trainer.plan_for(problem.batch).peak_bytes,
                note="" if trainer.micro_batch is None else OTHER_STATISTICS)


def eager_contenders(problem: Problem, compiled: bool) -> Iterator[Named]:
    """The step as published (autograd a layer), and an expert's; or, where a step is more than
    layers in turn, the engine's rule on its reference back-end."""
    options: dict[str, dict[str, Any]] = {
        "eager step": {}, "eager step, expert": {"channels_last": True, "fused": True}}
    try:
        unfused(problem)
    except ValueError:
        yield "reference back-end", lambda: replace(engine_contender(
            problem, "reference back-end", replace(problem, backend="reference").trainer()),
            kind="eager", planned=None, note="our rule in plain PyTorch")
        return
    for name, how in options.items():
        yield name, lambda n=name, h=how: eager_contender(problem, n, unfused(problem, **h))
    if compiled:
        yield "eager step, torch.compile", lambda: compiled_eager(problem)


def unfused(problem: Problem, **how: Any) -> UnfusedStep:
    return UnfusedStep(problem.network(), problem.optim, problem.dtype, epochs=problem.epochs,
                       **how)


def eager_contender(problem: Problem, name: str, step: UnfusedStep) -> Contender:
    phases = [Phase(lambda e=epoch, i=iteration: step.step(problem.x, problem.y, epoch=e,
                                                           iteration=i), weight)
              for weight, epoch, iteration in turns(step.schedule)]
    return Contender(name, "eager", phases, step.tensors)


def compiled_eager(problem: Problem) -> Contender:
    """torch.compile of the expert's eager step, a layer's turn a graph."""
    # each layer is its own graph; the default limit would send the ninth back to eager
    torch._dynamo.config.recompile_limit = 256
    step = unfused(problem, channels_last=True, fused=True)
    step.turn = torch.compile(step.turn, dynamic=False)  # type: ignore[method-assign]
    return eager_contender(problem, "eager step, torch.compile", step)


def backprop_contenders(problem: Problem, only: str | None,
                        compiled: bool) -> Iterator[tuple[str, list[Builder]]]:
    """Every backpropagation recipe of the twin: (name, builders of both layouts)."""
    layouts = (False, True) if problem.x.dim() == 4 and _convolves(problem) else (False,)
    recipes = [r for r in backprop_recipes(problem.batch) if only in (None, r[0])]
    for name, options in recipes:
        yield name, [lambda n=name, o=options, c=last: backprop_contender(problem, n, c, **o)
                     for last in layouts]
    if compiled:
        yield "bp plain, torch.compile", [
            lambda c=last: backprop_contender(problem, "bp plain, torch.compile", c,
                                              compiler="inductor")
            for last in layouts]


def _convolves(problem: Problem) -> bool:
    return any(p.dim() == 4 for p in problem.network().parameters())


def backprop_contender(problem: Problem, name: str, channels_last: bool, *,
                  compiler: str | None = None, **options: Any) -> Contender:
    """A step of the twin. compiler: of torch.compile, where its forward and backward go by that."""
    step = BackpropStep(problem.network(f"bp/{problem.model}"), problem.optim, problem.dtype,
                        channels_last=channels_last, **options)
    step.net.train()
    if compiler is not None:
        step.forward = torch.compile(  # type: ignore[method-assign]
            step.forward, dynamic=False, backend=compiler)
    x, y, show = problem.x, problem.y, None
    note = ""
    if step.micro_batch is not None and batch_statistics(step.net):
        note = OTHER_STATISTICS
    if step.micro_batch is not None and PIECES * step.micro_batch < len(x):
        some = slice(0, PIECES * step.micro_batch)
        show = lambda: step.step(x[some], y[some])  # noqa: E731
    phase = Phase(lambda: step.step(x, y), show=show)
    return Contender(name, "bp", [phase], step.tensors, note=note, channels_last=channels_last)


def authors_contender(problem: Problem, checkout: Path) -> Contender:
    """The authors' published step, from a checkout of their code."""
    made = authors_step(problem.model, problem.network(), checkout, problem.x, problem.y,
                        problem.optim, problem.dtype)
    return Contender("authors' step", "authors",
                [Phase(run, 1 / len(made.runs)) for run in made.runs], made.tensors,
                note=made.note)
