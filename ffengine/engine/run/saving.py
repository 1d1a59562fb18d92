"""What a trainer writes into a checkpoint, and how it goes on from one."""

from __future__ import annotations

import json
import logging
import platform
from dataclasses import asdict
from typing import Any, NoReturn

import torch

from ffengine.adapt.edits import structure_edit
from ffengine.adapt.record import Edit, apply_in_place
from ffengine.adapt.training import Reshaped, reshape
from ffengine.engine.memory.planning import Planning
from ffengine.engine.memory.plans import Job
from ffengine.engine.optim import LocalOptimizer, optimizer_of, outline
from ffengine.engine.run import checkpoint, fingerprint, header
from ffengine.engine.run.history import EpochSums, History
from ffengine.engine.run.state import TrainingRun
from ffengine.engine.run.stopping import TrainingInterrupted, TrainingStopped, not_finite
from ffengine.engine.schedules.schedule import Schedule
from ffengine.nn.network import LocalNet
from ffengine.ops import backends
from ffengine.version import __version__

log = logging.getLogger("ffengine")
#: A scheduler is replayed epoch by epoch: beyond this it would take minutes.
MOST_REPLAYED = 1_000_000


def check_finite(trainer: TrainingRun) -> None:
    """TrainingStopped if the losses noted so far, or what a checkpoint would hold, are not finite:
    an update may be bad whose loss, of the weights before it, was not."""
    trainer.finite.check()
    piece = trainer.schedule.piece  # others look at theirs
    held = {name: t for name, t in tensors(trainer).items()
            if piece is None or piece.holds(name.partition(".")[2])}
    if (bad := not_finite(held)) is not None:
        raise TrainingStopped(
            f"[train] {bad.removeprefix('net.')} holds NaN or infinity after {trainer.steps} steps "
            f"(epoch {trainer.epoch}): expected finite numbers; try a lower --lr or a wider "
            "--precision")


def tensors(trainer: TrainingRun) -> dict[str, torch.Tensor]:
    """Weights, layer range, optimizer states and torch's generator, by name."""
    return {**named_tensors(trainer.net, trainer.optimizer), "shuffle": trainer.shuffle_state()}


def named_tensors(net: LocalNet, optimizer: LocalOptimizer) -> dict[str, torch.Tensor]:
    """Those of a network and of its optimizer."""
    return {**{f"net.{k}": t for k, t in net.state_dict().items()},
            **{f"optimizer.{k}": t for k, t in optimizer.export_state()[0].items()}}


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
        "used": used(trainer),
        "threads": torch.get_num_threads(),
        "micro_batch": trainer.micro_batch,
        "functions": fingerprint.functions(net, trainer.rate.factory),
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
    check_free(trainer)
    trainer.claimed = trainer.out


def check_free(trainer: TrainingRun) -> None:
    """ValueError unless the run folder is this trainer's to write into."""
    if trainer.out is not None and trainer.claimed != trainer.out and (
            trainer.out / checkpoint.LATEST).exists():
        raise ValueError(f"[trainer] out expected a folder without a run, got {trainer.out}; "
                         f"resume({str(trainer.out)!r}) goes on with it")


def interrupted(trainer: TrainingRun, signal: int) -> NoReturn:
    """The end of a run that `signal` asked to stop: with a run folder its checkpoint is written."""
    where = f"epoch {trainer.epoch}, batch {trainer.iteration}"
    check_finite(trainer)
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


def used(trainer: TrainingRun) -> dict[str, str]:
    """Where a step runs, and by whose kernels."""
    kind = trainer.device.type
    return {"backend": backends.resolve("trainer", trainer.backend, kind, trainer.dtype),
            "device": kind}


def check_run(trainer: TrainingRun, found: checkpoint.Checkpoint) -> None:
    """ValueError for a run that would go on by another rule; a warning where it is the rule's
    sums that are taken in another order."""
    meta = found.meta
    trainer.settings.check_same(meta["settings"], found.path)
    check_options(trainer, found)
    if trainer.schedule.by_stages and meta["settings"]["epochs"] != trainer.settings.epochs:
        raise ValueError(f"[checkpoint] expected {trainer.settings.epochs} epochs a layer, got "
                         f"{meta['settings']['epochs']} in {found.path}")
    if meta.get("micro_batch", trainer.micro_batch) != trainer.micro_batch:
        raise ValueError(f"[checkpoint] expected micro_batch={trainer.micro_batch}, got "
                         f"{meta['micro_batch']} in {found.path}")
    mine = used(trainer)
    saved = meta.get("used", mine)
    if saved["device"] == mine["device"] and saved["backend"] != mine["backend"]:
        raise ValueError(f"[checkpoint] expected backend {mine['backend']}, got "
                         f"{saved['backend']} in {found.path}")
    if "functions" in meta:
        fingerprint.check(fingerprint.functions(trainer.net, trainer.rate.factory),
                          meta["functions"], found.path)
    threads = torch.get_num_threads()
    for what, here, there in (("device", mine["device"], saved["device"]),
                              ("threads", threads, meta.get("threads", threads))):
        if here != there:
            log.warning("[checkpoint] going on with %s %s where the run had %s: sums are taken in "
                        "another order, so it will not be the same bit for bit", what, here, there)


def check_position(trainer: TrainingRun, found: checkpoint.Checkpoint) -> None:
    """ValueError for a place that no run gets to."""
    where, total = found.meta["position"], trainer.schedule.total
    # every epoch has a step, but for those that a caller's own loop skipped
    most = total if trainer.schedule.by_stages else max(total, where["steps"])
    if trainer.rate.factory is not None:
        most = min(most, MOST_REPLAYED)
    if where["epoch"] > most:
        raise ValueError(f"[checkpoint] position.epoch expected 0..{most}, got {where['epoch']} in "
                         f"{found.path}")
    if not trainer.schedule.resumes_within and where["iteration"] > where["steps"]:
        raise ValueError(f"[checkpoint] position.iteration expected 0..{where['steps']}, got "
                         f"{where['iteration']} in {found.path}")
    losses = where["sums"].get("losses")
    if losses is not None and len(losses) != len(trainer.net.layers):
        raise ValueError(f"[checkpoint] position.sums.losses expected {len(trainer.net.layers)} "
                         f"numbers, got {len(losses)} in {found.path}")


def restore(trainer: Reshaped, found: checkpoint.Checkpoint) -> None:
    """Put the trainer where the checkpoint stands; everything is checked before anything moves.

    The named model of a run whose structure was edited takes that structure first.
    """
    here = trainer.out is not None and found.path.parent.resolve() == trainer.out.resolve()
    if not here:
        check_free(trainer)
    header.check(found.meta, found.tensors, found.path)
    edit, seen = edit_since_built(trainer, found), outline(trainer.net)
    if edit is not None:
        apply_in_place(seen, edit)
    checkpoint.check_architecture(found, seen)
    check_run(trainer, found)
    check_position(trainer, found)
    check_fit(trainer, found, seen)
    where = found.meta["position"]
    within = trainer.schedule.resumes_within  # else what the epoch had gathered is not in the file
    steps = where["steps"] if within else where["steps"] - where["iteration"]
    history = History(trainer.out, before=where["epoch"], steps=steps)
    if edit is not None:
        reshape(trainer, edit)
    trainer.optimizer.activate(trainer.schedule.active(where["epoch"]))
    trainer.net.load_state_dict(found.part("net"))
    trainer.optimizer.import_state(found.part("optimizer"), found.meta["optimizer"], found.path)
    trainer.epoch, trainer.steps = where["epoch"], steps
    trainer.iteration = where["iteration"] if within else 0
    trainer.sums = EpochSums(where["sums"] if within else None)
    trainer.best_accuracy, trainer.ended = found.meta["best_accuracy"], where["ended"]
    trainer.history, trainer.claimed = history, trainer.out if here else trainer.claimed
    torch.set_rng_state(found.tensors["shuffle"])
    trainer.rate.rewind()
    trainer.rate.move_to(trainer.schedule.rate_epoch(trainer.epoch))
    if found.meta["plan"] is not None:  # other tiles would add up in another order
        trainer.planning.keep(found.meta["plan"])


def edit_since_built(trainer: Reshaped, found: checkpoint.Checkpoint) -> Edit | None:
    """What was edited in the checkpoint's network since the very model of this trainer was built.
    """
    mine, saved = trainer.net.origin, found.meta["model"]
    if mine is None or saved is None or mine[0] != saved["name"] or (
            json.loads(json.dumps(mine[1], default=str)) != saved["options"]):
        return None
    return structure_edit(trainer.net, found.meta.get("structure"))


def check_fit(trainer: Reshaped, found: checkpoint.Checkpoint, net: LocalNet) -> None:
    """ValueError unless network, states, plan and generator take what the checkpoint holds.

    net: `outline` of the trainer's, as it will be.
    """
    meta, settings = found.meta, trainer.settings
    schedule = trainer.schedule.of(trainer.schedule.piece)
    schedule.net = net
    optimizer = optimizer_of(net, settings.optim(), owners=schedule.owners(),
                             active=schedule.active(meta["position"]["epoch"]))
    checkpoint.check_tensors(found, {**named_tensors(net, optimizer),
                                     "shuffle": torch.get_rng_state()})
    optimizer.check_state(meta["optimizer"], found.path)
    checkpoint.check_range(found, net)
    check_plan(trainer, found, net, schedule)
    try:
        torch.Generator().set_state(found.tensors["shuffle"])
    except RuntimeError as error:
        raise ValueError(f"[checkpoint] expected the state of torch's generator, got an error "
                         f"({str(error).splitlines()[0]}) in {found.path}") from None


def check_plan(trainer: Reshaped, found: checkpoint.Checkpoint, net: LocalNet,
               schedule: Schedule) -> None:
    """ValueError unless the checkpoint's cuts and tiles are of this network."""
    saved = found.meta["plan"]
    if saved is None:
        return
    job = Job(net, schedule, trainer.settings, trainer.device.type, trainer.backend)
    planning = Planning(job, trainer.budget, micro_batch=trainer.micro_batch, costs="modelled")
    try:
        planning.exported(saved)
    except (ValueError, IndexError) as error:
        raise ValueError(f"[checkpoint] plan expected one of this network, got an error "
                         f"({error}) in {found.path}") from None
