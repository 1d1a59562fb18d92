"""Structural edits of a network in training: the optimizer's moments, the plan and the rest follow.

    smaller, edit = remove_units(trainer.net, 0, [3])
    reshape(trainer, edit)                      # trainer.net is edited in place and trains on
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from ffengine.adapt.record import Edit, apply_in_place
from ffengine.engine.clock import StepClock, clock_of
from ffengine.engine.memory.planning import Planning
from ffengine.engine.memory.plans import Job
from ffengine.engine.optim import LocalOptimizer, optimizer_of, round_weights, rounds_weights
from ffengine.engine.run.settings import LearningRate
from ffengine.engine.run.state import TrainingRun
from ffengine.ops.optim import OptimState
from ffengine.reference.state_formats import (
    SIGNED,
    UNSIGNED,
    decode,
    encode,
    encode_bf16,
    flat,
)

#: Half of a random word: codes and bf16 are rounded to the nearest.
HALF_WORD = 1 << 15


class Reshaped(TrainingRun, Protocol):
    """A trainer, and what of it an edit makes anew."""

    planning: Planning
    optimizer: LocalOptimizer
    clock: StepClock | None
    rate: LearningRate


def carry_states(states: Mapping[str, OptimState], edit: Edit,
                 optimizer: LocalOptimizer) -> None:
    """Fill an optimizer of the edited network from the states that there were before the edit.

    A unit keeps its moments and the number of steps; a new one starts with zeros. Formats below
    fp32 are decoded, edited and rounded to the nearest.

    Args:
        states: by the names that LocalOptimizer gives them.
        optimizer: of the network after the edit, with states of the same names.
    """
    for name, after in optimizer.states.items():
        before = states.get(name)
        if before is None:
            continue
        after.step = before.step
        weight = optimizer.named[name.split("@")[0]]
        parts = [p for p in edit.parts if p.name == name.split("@")[0]]
        for moment in ("m", "v"):
            moved = decoded(before, moment)
            if moved is None:
                continue
            for part in parts:
                moved = part.moved(moved, torch.zeros_like(part.added, dtype=moved.dtype))
            store(after, moment, moved, weight)


def decoded(state: OptimState, moment: str) -> torch.Tensor | None:
    """A moment in fp32 (fp64), in the weight's shape."""
    kept: torch.Tensor | None = getattr(state, moment)
    if kept is None or state.format == "fp32":
        return kept
    if state.format == "bf16":
        return kept.float()
    out, scale = torch.empty_like(kept, dtype=torch.float32), getattr(state, f"{moment}_scale")
    flat(out).copy_(decode(flat(kept), scale, *(SIGNED if moment == "m" else UNSIGNED)))
    return out


def store(state: OptimState, moment: str, value: torch.Tensor, weight: torch.Tensor) -> None:
    """Write a moment into a state, in the state's format and the weight's layout."""
    kept: torch.Tensor = getattr(state, moment)
    if state.format == "fp32":
        kept.copy_(value)
        return
    laid = torch.empty_like(weight, dtype=torch.float32, requires_grad=False).copy_(value)
    half = torch.full((laid.numel(),), HALF_WORD, dtype=torch.int64, device=laid.device)
    if state.format == "bf16":
        flat(kept).copy_(encode_bf16(flat(laid), half))
        return
    codes, scale = encode(flat(laid), half, *(SIGNED if moment == "m" else UNSIGNED))
    flat(kept).copy_(codes)
    getattr(state, f"{moment}_scale").copy_(scale)


def reshape(trainer: Reshaped, edit: Edit) -> None:
    """Make an edit in a trainer's network, in place, so that training goes on where it stood.

    Raises:
        ValueError: the edit is of another network; nothing has changed.
    """
    net, settings, states = trainer.net, trainer.settings, trainer.optimizer.states
    apply_in_place(net, edit)
    if settings.weights == "bf16":
        small = set(dict(net.named_parameters())) - rounds_weights(net)
        for name, parameter in net.named_parameters():
            if name in small and parameter.dtype is torch.bfloat16:
                parameter.data = parameter.data.float()
        round_weights(net)
    trainer.schedule.begin(net, settings.epochs)
    plan = trainer.planning.export()
    trainer.planning = Planning(
        Job(net, trainer.schedule, settings, trainer.device.type, trainer.backend),
        trainer.budget, micro_batch=trainer.micro_batch, costs="modelled")
    if plan is not None:  # the cuts and tiles that there were, if they fit the budget still
        trainer.planning.keep(plan)
    trainer.optimizer = optimizer_of(net, settings.optim(), seed=settings.seed,
                                     owners=trainer.schedule.owners(),
                                     active=trainer.schedule.active(trainer.epoch))
    carry_states(states, edit, trainer.optimizer)
    trainer.clock = clock_of(trainer.optimizer, trainer.device, trainer.schedule.updates)
    trainer.rate = LearningRate(trainer.optimizer, settings, trainer.rate.factory)
    trainer.rate.move_to(trainer.schedule.rate_epoch(trainer.epoch))
    if trainer.stored is not None:  # features of the layers as they were
        trainer.stored.close()
        trainer.stored = None
