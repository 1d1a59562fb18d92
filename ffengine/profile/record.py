"""Run training steps and note what they do: a metered step for structure, others for time.

The metered step is slower, so its own times are not used: it tells which calls there are, in which
order, what they cost and how live memory changes between their begins and ends. The same begins and
ends, timed in steps without the meter, then carry the clock; memory changes between two of them are
spread evenly, for the meter knows their order and size but not the moment inside a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ffengine.devices import energy, rates
from ffengine.engine.batch import Batch, label_count
from ffengine.engine.context import StepContext, Turn
from ffengine.engine.inputs import rows_of
from ffengine.engine.memory import meter
from ffengine.engine.memory.plan import Plan
from ffengine.engine.trainer import Trainer
from ffengine.ops import backends
from ffengine.ops.memory_accounting import listening
from ffengine.profile.recorder import ROOT, Recorder
from ffengine.profile.spans import Phase, Profile
from ffengine.profile.timeline import assemble
from ffengine.profile.watch import watching


class Start(NamedTuple):
    """A phase of the schedule: its number, where it first comes, and whose turn it is."""

    number: int
    epoch: int
    iteration: int
    turn: Turn


def profile(trainer: Trainer, *, batch: int, steps: int = 5, model: str = "network",
            starts: Sequence[Start] | None = None) -> Profile:
    """Profile training steps of `trainer` on random samples; its weights train meanwhile.

    Args:
        batch: samples of a step.
        steps: timed steps of every phase; medians are kept.
        starts: which of `phases(trainer)`; default all of them.

    Raises:
        ValueError: the network is trained by backpropagation, which has no layer-local steps.
    """
    if not trainer.schedule.planned:
        raise ValueError("[profile] expected a network of layer-local training, got one trained "
                         "by backpropagation")
    item = _samples(trainer, batch)
    found = [_phase(trainer, start, item, steps)
             for start in (phases(trainer) if starts is None else starts)]
    device, dtype = trainer.device, trainer.dtype
    machine = rates.machine_rates(dtype, device)
    return Profile(
        model=model, batch=batch, rows=rows_of(trainer.net, batch),
        precision=trainer.settings.precision,
        backend=backends.resolve("profile", trainer.backend, device.type, dtype),
        device=str(device), steps=steps, budget=trainer.budget,
        shapes=list(trainer.net.shapes), phases=found,
        rates={"bytes_per_second": machine.bytes_per_second,
               "flops_per_second": machine.flops_per_second[dtype],
               "launch_seconds": machine.launch_seconds})


def phases(trainer: Trainer) -> list[Start]:
    """Where each different turn of the schedule first comes."""
    found: dict[Turn, Start] = {}
    for epoch in range(trainer.epochs):
        for iteration in (0, 1):
            turn = trainer.schedule.turn(epoch, iteration)
            found.setdefault(turn, Start(len(found), epoch, iteration, turn))
    return list(found.values())


def label(turn: Turn) -> str:
    """Whose turn it is, in words."""
    def said(numbers: tuple[int, ...], what: str) -> str:
        run = numbers == tuple(range(numbers[0], numbers[-1] + 1))
        names = f"{numbers[0]}-{numbers[-1]}" if run and len(numbers) > 1 else (
            ", ".join(map(str, numbers)))
        return f"{what}{'s' if len(numbers) > 1 else ''} {names}"

    words = [said(n, what) for n, what in ((turn.layers, "layer"), (turn.heads, "head")) if n]
    return " and ".join(words) or "nothing"


def _samples(trainer: Trainer, batch: int) -> Batch:
    """Random samples and labels of the network's shape, the same in every step."""
    source = torch.Generator().manual_seed(trainer.settings.seed)
    x = torch.rand(batch, *trainer.net.in_shape, generator=source)
    y = torch.randint(label_count(trainer.net), (batch,), generator=source)
    return Batch(x.to(trainer.device), y.to(trainer.device))


def _phase(trainer: Trainer, start: Start, item: Batch, steps: int) -> Phase:
    """One phase: steps to warm up, timed steps, then the metered one."""
    def step(recorder: Recorder | None = None) -> None:
        if recorder is None:
            trainer.step(item, epoch=start.epoch, iteration=start.iteration)
            return
        with watching(recorder), _rooted(trainer, recorder):
            trainer.step(item, epoch=start.epoch, iteration=start.iteration)

    step()
    allocated = _allocated(trainer, step)
    timed = [Recorder(trainer, metered=False) for _ in range(steps)]
    for recorder in timed:
        step(recorder)
    joules = energy.joules(step, trainer.device)
    trainer.meter_next()
    step()  # the meter measures the library's own temporaries once, at their first call
    structure = Recorder(trainer, metered=True)
    trainer.meter_next()
    with listening(structure.memory, meter.listeners):
        step(structure)
    if any(r.order != structure.order for r in timed):
        raise ValueError("[profile] expected steps that make the same calls, got different ones")
    assert structure.plan is not None
    phase = Phase(start.number, label(start.turn), start.epoch, start.iteration, start.turn.layers,
                  structure.plan, structure.spans, [], {}, allocated, joules)
    assemble(phase, structure, [r.times() for r in timed], trainer.device)
    return phase


def _allocated(trainer: Trainer, step: Callable[[], Any]) -> int | None:
    """What the CUDA allocator held at most in a step."""
    if trainer.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(trainer.device)
    step()
    torch.cuda.synchronize(trainer.device)
    return int(torch.cuda.max_memory_allocated(trainer.device))


class _rooted:
    """The schedule's training of a batch as the span that holds all others."""

    def __init__(self, trainer: Trainer, recorder: Recorder) -> None:
        self.schedule: Any = trainer.schedule
        self.recorder = recorder

    def __enter__(self) -> None:
        train, recorder = self.schedule.train, self.recorder

        def rooted(ctx: StepContext, item: Batch, plan: Plan, dtype: torch.dtype) -> Any:
            recorder.plan = plan
            recorder.open(ROOT, ())
            report = train(ctx, item, plan, dtype)
            recorder.close(ROOT, report, (), {})
            return report

        self.schedule.train = rooted

    def __exit__(self, *exc: object) -> None:
        del self.schedule.train
