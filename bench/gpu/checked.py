"""Whether a back-end's training step is right: asked once a run, before anything of it is timed."""

from __future__ import annotations

import gc

from bench.gpu.records import Row
from bench.gpu.session import Session
from bench.gpu.work import failed
from bench.gradients import check
from bench.problem import Problem


def problem_of(session: Session, backend: str, precision: str | None = None,
               deterministic: bool = True) -> Problem:
    """The run's network and batch, to be trained by a back-end."""
    model, options, batch, own = session.scale.network
    return Problem.of(model, batch, precision or own, session.scale.device, "adamw", backend,
                      deterministic, **options)


def gradients(session: Session, problem: Problem) -> Row:
    """{"check": "ok", "gradient_error": ...}, or the reason why nothing is timed: the gradients of
    every parameter on a few samples against fp64 (bench.gradients)."""
    def made() -> Row:
        try:
            with problem.rules():
                return {"check": "ok", "gradient_error": check(problem)}
        except Exception as reason:
            return failed(reason)
        finally:
            gc.collect()

    return session.kept(f"gradients-{problem.backend}-{problem.precision}", made)
