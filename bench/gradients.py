"""Are the engine's gradients as close to fp64 as plain PyTorch's? Asked before any timing."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from bench.problem import EPS, Problem, turns
from ffengine.engine.batch import Batch
from ffengine.engine.context import StepContext
from ffengine.engine.inputs import rows_of
from ffengine.engine.trainer import Trainer

#: Samples of the check.
CHECKED = 4
#: Runs of plain PyTorch that say how far rounding takes it.
DRAWS = 3
#: Sets of samples that decide where the first is in doubt.
SETS = 4


def check(problem: Problem) -> float:
    """The engine's gradients in every phase, on a few samples, against fp64: the worst error.

    ValueError, and so no times, unless each is at most twice as far from fp64 as the same rule in
    plain PyTorch in the same dtype (relative, over each parameter's gradient), plus rounding. One
    run of that is one draw of its rounding: the largest of a few counts, inputs moved by theirs.
    A unit that lies within rounding of zero is on or off by luck: what is off on some samples is
    an error only if it is off on most of a few other sets of samples too.
    """
    worst, doubtful = 0.0, {}
    for key, (error, allowed) in errors(problem, 0).items():
        worst = max(worst, error)
        if not error <= allowed:
            doubtful[key] = error
    others = [errors(problem, k) for k in range(1, SETS)] if doubtful else []
    for key, error in doubtful.items():
        again = [made[key] for made in others]
        if sum(not e <= allowed for e, allowed in again) * 2 >= SETS - 1:
            raise ValueError(f"[bench] the gradient of {key[1]} in epoch {key[0]} is off by "
                             f"{error:.2e} (allowed {again[0][1]:.2e}): no times printed")
    return worst


def errors(problem: Problem, part: int) -> dict[tuple[int, str], tuple[float, float]]:
    """(phase, parameter) -> (our relative error, what is allowed), on one set of samples."""
    start = part * CHECKED % max(problem.batch - CHECKED + 1, 1)
    rows = slice(start, start + CHECKED)
    few = replace(problem, batch=CHECKED, x=problem.x[rows], y=problem.y[rows],
                  optim=replace(problem.optim, lr=0.0, weight_decay=0.0))
    trainer = few.trainer()
    ours = gradients(trainer, few.x, few.y, problem.backend)
    eps, source = EPS[problem.precision], torch.Generator().manual_seed(1)
    plain = []
    for _ in range(DRAWS):
        rounding = eps * (2 * torch.rand(few.x.shape, generator=source) - 1)
        plain.append(gradients(trainer, few.x * (1 + rounding.to(few.x.device)), few.y,
                               "reference"))
    # under the same plan: the reference's own would be searched for longer than it runs
    plain64 = replace(few, backend="reference").trainer("fp64", batch_size=None)
    plain64.planning.keep(trainer.planning.export())
    exact = gradients(plain64, few.x, few.y, "reference")
    found = {}
    for key, true in exact.items():
        size = float(true.norm()) or 1.0
        error, *draws = (float((g[key].double() - true).norm()) / size for g in (ours, *plain))
        found[key] = error, 2 * max(draws) + 64 * eps
    return found


def gradients(trainer: Trainer, x: torch.Tensor, y: torch.Tensor,
              backend: str) -> dict[tuple[int, str], torch.Tensor]:
    """(epoch of a phase, parameter) -> gradient at the initial weights, on the host.

    The trainer's rate is zero: nothing moves between phases, frames and losses. Running statistics
    do, and are put back.
    """
    net, before = trainer.net, copy.deepcopy(trainer.net.state_dict())
    found: dict[tuple[int, str], torch.Tensor] = {}
    for _, epoch, iteration in turns(trainer.schedule):
        trainer.optimizer.activate(trainer.schedule.active(epoch))
        grads = {place(n): torch.full_like(p, float("nan")) for n, p in net.named_parameters()}
        ctx = StepContext(net, trainer.optimizer, y, rows_of(net, len(x)), 0, 0, backend,
                          trainer.schedule.turn(epoch, iteration), grads=grads)
        trainer.schedule.train(ctx, Batch(x, y), trainer.planning.plans(len(x)).at(epoch),
                               trainer.dtype)
        found |= {(epoch, ".".join(map(str, where))): g.cpu() for where, g in grads.items()
                  if not g.isnan().all()}
    net.load_state_dict(before)
    return found


def place(name: str) -> tuple[int | str, str]:
    """Where a step hands out the gradient of a parameter (StepContext.grads)."""
    first, _, rest = name.partition(".")
    if first == "layers":
        index, _, rest = rest.partition(".")
        return int(index), rest
    if first == "heads":
        index, _, rest = rest.partition(".")
        return f"heads.{index}", rest
    return (first, rest) if rest else ("net", name)
