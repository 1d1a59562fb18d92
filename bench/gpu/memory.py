"""Bytes as planned, metered and allocated; where a step's time goes; and a step in less memory.

Of ResNet-17, TinyCNN and FFNN side by side: meter and allocator within 5 % of the plan. Then what
`ffengine profile` says of the step, and the same step in the memory of another device: what was
predicted of it beside what it took.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bench.contenders import engine_contender
from bench.gpu.checked import problem_of
from bench.gpu.records import Row
from bench.gpu.scale import Network
from bench.gpu.session import Session
from bench.gpu.work import Job, worker
from bench.problem import Problem
from ffengine.commands.devices import emulation
from ffengine.devices import catalog
from ffengine.profile import record
from ffengine.profile.spans import Phase, Profile

#: Share of the plan that the meter may differ by, and the allocator exceed it by.
BOUND = 0.05
#: Timed steps of a profile.
STEPS = 5


def compared(session: Session, network: Network) -> Row:
    """A network's step by the plan, the meter and the allocator."""
    model, options, batch, precision = network
    problem = Problem.of(model, batch, precision, session.scale.device, **options)
    with problem.rules():
        contender = engine_contender(problem, model, problem.trainer(states="fp32"))
        contender.warm()
        found = contender.metered(problem.x, problem.y)
    assert contender.planned is not None
    planned = contender.planned()
    metered, allocated = (found[k] / planned - 1 for k in ("peak_bytes", "allocated_bytes"))
    right = abs(metered) <= BOUND and allocated <= BOUND
    text = (f"planned {planned / 1e6:.1f} MB, metered {100 * metered:+.2f} %, allocated "
            f"{100 * allocated:+.2f} %")
    return {"model": model, "batch": batch, "precision": precision, "planned_bytes": planned,
            **found, "check": "ok" if right else "failed", "text": text,
            **({} if right else {"error": f"{text}: expected within {100 * BOUND:.0f} %"})}


def profiled(session: Session, **trainer: Any) -> tuple[Profile, Any]:
    """(profile, trainer) of the run's network."""
    problem = problem_of(session, "auto")
    made = problem.trainer(states="fp32", **trainer)
    with problem.rules():
        return record.profile(made, batch=problem.batch, steps=STEPS, model=problem.model), made


def summed(phase: Phase) -> dict[str, Any]:
    """A phase's values without its single calls."""
    return {k: v for k, v in phase.values().items() if k not in ("spans", "samples")}


def profile(session: Session) -> Row:
    """Where a step's time and bytes go."""
    found, _ = profiled(session)
    (phase,) = found.phases
    total = phase.total()
    parts = ", ".join(f"{part} {1e3 * s:.2f}" for part, s in sorted(
        total.parts.items(), key=lambda pair: -pair[1]))
    joules = "" if phase.joules is None else f"; {phase.joules:.3g} J"
    return {"model": found.model, "backend": found.backend, "rates": found.rates,
            "phase": summed(phase), "text":
            f"{1e3 * phase.measured['median']:.2f} ms: {parts}; {100 * total.share:.0f} % of the "
            f"roofline{joules}"}


def emulated(session: Session) -> Row:
    """The step with the memory of another device: what was predicted, and what it took here."""
    device = catalog.load(session.scale.emulated)
    # plans by a model of costs: measuring them takes longer than all the rest
    found, trainer = profiled(session, memory_budget=device.usable_bytes, costs="modelled")
    (phase,) = found.phases
    seconds = phase.measured["median"]
    _, values = emulation(device, trainer, found.batch, seconds, phase.epoch)
    here = values["predicted_here"]
    expected = here["expected_seconds"]
    return {"device": device.name, "usable_bytes": device.usable_bytes,
            "allocated_bytes": phase.allocated_bytes, "peak_bytes": phase.peak.total,
            "measured_seconds": phase.measured, "predicted": here, "there": values["predicted"],
            "text": f"in {device.usable_bytes / 1e6:.0f} MB: measured {1e3 * seconds:.2f} ms; "
                    f"predicted here at least {1e3 * here['floor_seconds']:.2f}, expected "
                    f"{'-' if expected is None else format(1e3 * expected['median'], '.2f')}; on "
                    f"{device.name} at least {1e3 * values['predicted']['floor_seconds']:.2f}"}


def jobs(session: Session, args: argparse.Namespace) -> Iterator[Job]:
    def one(make: Callable[[], Row]) -> Callable[[], Iterable[Row]]:
        return lambda: [make()]

    for network in session.scale.memory:
        yield f"bytes {network[0]}", one(lambda n=network: compared(session, n))
    yield "profile", one(lambda: profile(session))
    yield f"memory of {session.scale.emulated}", one(lambda: emulated(session))


if __name__ == "__main__":
    sys.exit(worker(__doc__, jobs))
