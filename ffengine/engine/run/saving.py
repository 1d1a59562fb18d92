"""What a trainer writes into a checkpoint, and how it goes on from one."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from typing import Any, NoReturn

import torch

from ffengine.adapt.edits import structure_edit
from ffengine.adapt.record import Edit, invert
from ffengine.adapt.training import Reshaped, reshape
from ffengine.engine.run import checkpoint
from ffengine.engine.run.history import EpochSums, History
from ffengine.engine.run.state import TrainingRun
from ffengine.engine.run.stopping import TrainingInterrupted
from ffengine.version import __version__


def tensors(trainer: TrainingRun) -> dict[str, torch.Tensor]:
    """Weights, layer range, optimizer states and torch's generator, by name."""
    states, _ = trainer.optimizer.export_state()
    return {**{f"net.{k}": t for k, t in trainer.net.state_dict().items()},
            **{f"optimizer.{k}": t for k, t in states.items()}, "shuffle": trainer.shuffle_state()}


def description(trainer: TrainingRun) -> dict[str, Any]:
    """Everything else, as plain values."""
    net = trainer.net
    return {
        "versions": {"ffengine": __version__, "torch": torch.__version__,
                     "python": platform.python_version()},
        "model": None if net.origin is None else {
            "name": net.origin[0], "options": net.origin[1]},
        "architecture": checkpoint.architecture(net),
        "structure": checkpoint.structure(net),
        "settings": asdict(trainer.settings),
        "backend": trainer.backend,
        "memory_budget": trainer.budget,
        "plan": trainer.planning.export(),
        "notes": trainer.notes,
        "optimizer": trainer.optimizer.export_state()[1],
        "lr": trainer.rate.now,
        "layer_range": net.layer_range,
        "best_accuracy": trainer.best_accuracy,
        "position": {"epoch": trainer.epoch, "iteration": trainer.iteration,
                     "steps": trainer.steps, "sums": trainer.sums.export(),
                     "ended": trainer.ended},
    }


def claim(trainer: TrainingRun) -> None:
    """Before anything is written into the run folder: a run that stands there is gone on with, by
    `resume`, or it stays.

    Raises:
        ValueError: the folder holds a run that this trainer neither wrote nor resumed.
    """
    if trainer.out is None or trainer.claimed == trainer.out:
        return
    if (trainer.out / checkpoint.LATEST).exists():
        raise ValueError(f"[trainer] out expected a folder without a run, got {trainer.out}; "
                         f"resume({str(trainer.out)!r}) goes on with it")
    trainer.claimed = trainer.out


def interrupted(trainer: TrainingRun, signal: int) -> NoReturn:
    """The end of a run that `signal` asked to stop: with a run folder its checkpoint is written."""
    where = f"epoch {trainer.epoch}, batch {trainer.iteration}"
    trainer.finite.check()
    trainer.history.keep_steps()
    kept = f"; checkpoint {trainer.save()}" if trainer.out is not None else ""
    raise TrainingInterrupted(f"[train] interrupted at {where}{kept}", signal)


def check_options(trainer: TrainingRun, found: checkpoint.Checkpoint) -> None:
    """ValueError naming the first option of a named model that the saved one had otherwise."""
    origin, saved = trainer.net.origin, found.meta["model"]
    if origin is None or saved is None:
        return
    mine = json.loads(json.dumps(origin[1], default=str))
    for name in sorted({*mine, *saved["options"]}):
        if mine.get(name) != saved["options"].get(name):
            raise ValueError(f"[checkpoint] expected option {name}={mine.get(name)}, got "
                             f"{saved['options'].get(name)} in {found.path}")


def restore(trainer: Reshaped, found: checkpoint.Checkpoint) -> None:
    """Put the trainer where the checkpoint stands; everything is checked before anything moves.

    The named model of a run whose structure was edited takes that structure first.
    """
    edit = edit_since_built(trainer, found)
    if edit is None:
        _restore(trainer, found)
        return
    reshape(trainer, edit)
    try:
        _restore(trainer, found)
    except ValueError:
        reshape(trainer, invert(edit))
        raise


def edit_since_built(trainer: Reshaped, found: checkpoint.Checkpoint) -> Edit | None:
    """What was edited in the checkpoint's network since the very model of this trainer was built.
    """
    mine, saved = trainer.net.origin, found.meta["model"]
    if mine is None or saved is None or mine[0] != saved["name"] or (
            json.loads(json.dumps(mine[1], default=str)) != saved["options"]):
        return None
    return structure_edit(trainer.net, found.meta.get("structure"))


def _restore(trainer: Reshaped, found: checkpoint.Checkpoint) -> None:
    meta, where = found.meta, found.meta["position"]
    checkpoint.check_architecture(found, trainer.net)
    trainer.settings.check_same(meta["settings"], found.path)
    check_options(trainer, found)
    if trainer.schedule.by_stages and meta["settings"]["epochs"] != trainer.settings.epochs:
        raise ValueError(f"[checkpoint] expected {trainer.settings.epochs} epochs a layer, got "
                         f"{meta['settings']['epochs']} in {found.path}")
    trainer.optimizer.activate(trainer.schedule.active(where["epoch"]))
    checkpoint.check_tensors(found, tensors(trainer))
    trainer.net.load_state_dict(found.part("net"))
    trainer.optimizer.import_state(found.part("optimizer"), meta["optimizer"])
    trainer.epoch, trainer.iteration = where["epoch"], where["iteration"]
    trainer.steps, trainer.best_accuracy = where["steps"], meta["best_accuracy"]
    trainer.sums, trainer.ended = EpochSums(where["sums"]), where["ended"]
    if not trainer.schedule.resumes_within:  # what the epoch had gathered is not in the file
        trainer.steps, trainer.iteration = trainer.steps - trainer.iteration, 0
        trainer.sums = EpochSums()
    if trainer.out is not None and found.path.parent.resolve() == trainer.out.resolve():
        trainer.claimed = trainer.out
    trainer.history = History(trainer.out, before=trainer.epoch, steps=trainer.steps)
    torch.set_rng_state(found.tensors["shuffle"])
    trainer.rate.rewind()
    trainer.rate.move_to(trainer.schedule.rate_epoch(trainer.epoch))
    if meta["plan"] is not None:  # other tiles would add up in another order
        trainer.planning.keep(meta["plan"])
