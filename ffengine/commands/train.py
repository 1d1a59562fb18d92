"""`ffengine train`: data, network, trainer, test accuracy; and the baselines beside it."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ffengine import data, models
from ffengine.adapt.edits import restructure
from ffengine.commands.devices import emulate, emulation
from ffengine.commands.folders import folder_for
from ffengine.commands.options import (
    assignments,
    device_of,
    fitted_options,
    load_data,
    model_options,
    outline,
    saved_data_options,
    saved_options,
    scaled,
    shaped_like,
    words,
)
from ffengine.data import augment
from ffengine.data.batches import Augment
from ffengine.devices.catalog import Device
from ffengine.engine.memory.budget import megabytes, parse_bytes
from ffengine.engine.memory.plan import Plan
from ffengine.engine.memory.planning import Planning
from ffengine.engine.memory.plans import Job, Memory
from ffengine.engine.memory.precision_fallback import rung
from ffengine.engine.optim import round_weights
from ffengine.engine.run import checkpoint, process
from ffengine.engine.run.callbacks import Callback
from ffengine.engine.run.evaluation import first_samples
from ffengine.engine.run.recipe import Recipe
from ffengine.engine.run.settings import Settings
from ffengine.engine.schedules.schedule import of
from ffengine.engine.trainer import Trainer
from ffengine.env import instruction_set
from ffengine.ops import backends
from ffengine.words import count
from ffengine.words import plan as in_words


def run_train(args: argparse.Namespace) -> tuple[str, dict[str, Any] | None]:
    if args.stages is None:
        if args.timeout is not None:
            raise ValueError(f"[cli] --timeout {args.timeout:g} expected a run with --stages")
        return trained(args)
    from ffengine.commands import staged

    return staged.run(args, trained)


def trained(args: argparse.Namespace) -> tuple[str, dict[str, Any] | None]:
    """Train, as the flags say, on this process or on this rank of several."""
    found = checkpoint.load_run(args.resume) if args.resume else None
    if found is not None:
        take_from_run(args, found)
    if args.model is None or args.data is None:
        raise ValueError("[cli] train expected MODEL and --data, or --resume; models: "
                         f"{', '.join(models.names())}; data: "
                         f"{', '.join((*data.NAMES, *data.own.FORMS))}")
    seed = 0 if args.seed is None else args.seed
    emulated = emulate(args)
    recipe, options = training_recipe(args), model_options(args.model, args.options)
    if found is not None:
        options = {**saved_options(found), **options}
    data_options = scaled(args.model, args.data, assignments(args.data_options, "--data-set"))
    refuse_early(args, recipe, options, data_options)
    check_watch(args)
    check_out(args)
    splits = load_data(args.model, args.data, options, data_options, seed, args.data_root,
                       None if found is None else found.meta["notes"].get("classes"))
    if args.baselines and f"bp/{args.model}" not in models.names():
        raise ValueError("[cli] --baselines expected a model of local training with a twin, "
                         f"got {args.model}, which is an opponent itself")
    options = fitted_options(args.model, splits, options)
    trainer = make_trainer(args, within(recipe, len(splits.train)), options, data_options, seed,
                           structure=None if found is None else found.meta.get("structure"))
    trainer.notes |= told(splits, args, data_options)
    first = getattr(trainer, "first", True)  # of a pipeline's ranks one reads and writes
    with run_folder(args) if first else nullcontext() as out:
        trainer.write_into(out)
        return carried_out(args, trainer, splits, options, found, emulated, first=first)


def carried_out(args: argparse.Namespace, trainer: Trainer, splits: data.Splits,
                options: dict[str, Any], found: checkpoint.Checkpoint | None,
                emulated: Device | None, *, first: bool) -> tuple[str, dict[str, Any] | None]:
    """Train as it was announced, from `found` on, and beside the baselines; the run's report.

    first: of a pipeline's ranks the one that reads and writes.
    """
    if not args.augment or args.augment == "none":
        size, samples = trainer.settings.batch_size, len(splits.train)
        trainer.schedule.expect(trainer.planning, samples, size, shuffles(size, samples),
                                trainer.out)
    announce(args, trainer)
    if found is not None:
        trainer.resume(found.path)
    if not first:
        trainer.fit(())
        return "", None
    text, result = train_and_test(args, trainer, splits, augment.by_name(args.augment or "none"),
                                  watchers_of(args, splits))
    if args.stages is not None:
        from ffengine.commands import staged

        result["stages"] = staged.stages_of(trainer)
    if emulated is not None:
        size = trainer.settings.batch_size
        said, result["device_profile"] = emulation(
            emulated, trainer, size, size / max(result["images_per_second"], 1e-9))
        text += "\n" + said
    if args.baselines:
        from ffengine.commands.baselines import compare

        table, result["baselines"] = compare(args.model, options, splits, trainer, result,
                                             progress=not args.quiet)
        text += "\n\n" + table
    checkpoint.write_atomically(Path(trainer.out or ".") / "report.json",
                                json.dumps(result, indent=1).encode())
    return text, result


def refuse_early(args: argparse.Namespace, recipe: Recipe, options: dict[str, Any],
                 data_options: dict[str, Any]) -> None:
    """ValueError for a memory budget that cannot be met, where that is known without the data."""
    budget = parse_bytes(args.memory_budget)
    seen = outline(args.model, args.data, options, data_options)
    if budget is None or seen is None or args.stages or recipe.batch_size > seen.train:
        return
    fitted = shaped_like(args.model, fitted_options(args.model, seen, options))
    job = job_of(args, recipe, fitted)
    if job.schedule.planned:
        rung(job, recipe.batch_size, budget, fixed=bool(args.states or args.weights))


def told(splits: data.Splits, args: argparse.Namespace,
         data_options: dict[str, Any]) -> dict[str, Any]:
    """What a run keeps of its data, so that it is found, labelled and scaled alike from anywhere.
    """
    return {"data": data.own.settled(args.data, args.data_root), "data_label": splits.called,
            "data_options": words({**data_options, **splits.settled}),
            "classes": None if splits.classes is None else list(splits.classes)}


def job_of(args: argparse.Namespace, recipe: Recipe, options: dict[str, Any]) -> Job:
    """What is planned for: a network without memory, and how it trains."""
    settings = Settings.resolve(
        recipe, epochs=getattr(args, "epochs", None),
        precision=args.precision or "fp32", states=args.states or "fp32",
        weights=args.weights or "fp32")
    device, backend = device_of(args), args.backend or "auto"
    backends.resolve("plan", backend, device.type, settings.dtype)
    with torch.device("meta"):
        net = models.create(args.model, **options).to(settings.weight_dtype)
    if settings.weights == "bf16":
        round_weights(net)
    schedule = of(net, None)
    schedule.begin(net, settings.epochs)
    return Job(net, schedule, settings, device.type, backend)


def take_from_run(args: argparse.Namespace, found: checkpoint.Checkpoint) -> None:
    """What the command line leaves open comes from the run that goes on."""
    meta = found.meta
    if meta["model"] is None or "data" not in meta["notes"]:
        raise ValueError(f"[checkpoint] expected a run of `ffengine train`, got {found.path}")
    saved = meta["settings"]
    args.model = args.model or meta["model"]["name"]
    args.data = args.data or meta["notes"]["data"]
    args.out = args.out or str(found.path.parent)
    args.data_options = args.data_options or saved_data_options(meta["notes"])
    args.augment = args.augment or meta["notes"].get("augment", "none")
    args.backend = args.backend or meta["backend"]
    args.memory_budget = args.memory_budget or meta["memory_budget"]
    for name in ("seed", "precision", "epochs", "batch_size", "lr", "states", "weights"):
        if getattr(args, name) is None:
            setattr(args, name, saved.get(name))  # older runs have no states and weights


def training_recipe(args: argparse.Namespace) -> Recipe:
    """The model's recipe for the data set, with --batch-size; the trainer takes the rest."""
    return sized(models.entry(args.model).recipe_for(args.data), args)


def sized(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe with --batch-size."""
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"[cli] --batch-size expected 1 or more, got {args.batch_size}")
    return replace(recipe, batch_size=args.batch_size or recipe.batch_size)


def shuffles(batch_size: int, samples: int) -> bool:
    """A full batch keeps its order, and with it its permuted negatives."""
    return batch_size < samples


def within(recipe: Recipe, train: int) -> Recipe:
    """The recipe with a batch of at most the training set: full-batch recipes ask for more."""
    return replace(recipe, batch_size=min(recipe.batch_size, max(train, 1)))


def make_trainer(args: argparse.Namespace, recipe: Recipe, options: dict[str, Any],
                 data_options: dict[str, Any], seed: int, *,
                 structure: dict[str, Any] | None = None) -> Trainer:
    """Network and trainer; a budget that cannot be met is refused here.

    structure: of a run that was edited (adapt.edits.restructure).
    """
    torch.manual_seed(seed)
    net = models.create(args.model, **options)
    restructure(net, structure)
    make: Callable[..., Trainer] = Trainer
    if getattr(args, "stages", None) is not None:
        from ffengine.commands import staged

        make = functools.partial(staged.trainer_of, args)
    trainer = make(net, recipe=recipe, epochs=args.epochs, lr=args.lr,
                   batch_size=recipe.batch_size, backend=args.backend or "auto",
                   precision=args.precision or "fp32", memory_budget=args.memory_budget,
                   memory=Memory(args.states, args.weights, args.costs), seed=seed,
                   device=device_of(args), progress=not args.quiet)
    trainer.notes = {"data": args.data, "data_options": words(data_options),
                     "augment": getattr(args, "augment", None) or "none"}
    return trainer


def announce(args: argparse.Namespace, trainer: Trainer) -> None:
    """Say what is about to be trained."""
    if not args.quiet:
        parameters = sum(p.numel() for p in trainer.net.parameters())
        where = "" if trainer.out is None else f", into {trainer.out}"
        name = trainer.notes.get("data_label", args.data)
        print(f"{args.model} on {name}: {parameters:,} parameters, {epochs_text(trainer)}, plan "
              f"{plan_text(trainer.plan if trainer.schedule.planned else None)}{where}"
              f"{budget_text(trainer.planning)}{stages_text(trainer)}", file=sys.stderr)


def check_out(args: argparse.Namespace) -> None:
    """ValueError for a folder in which another run lives."""
    if args.out is not None and args.resume is None and (
            Path(args.out) / checkpoint.LATEST).exists():
        raise ValueError(f"[cli] --out expected a folder without a run, got {Path(args.out)}; "
                         f"--resume {Path(args.out)} goes on with it")


def run_folder(args: argparse.Namespace) -> AbstractContextManager[Path]:
    """--out, or a new folder under runs/."""
    return folder_for(args.out, f"{args.model.replace('/', '-')}-{data.own.slug(args.data)}")


def check_watch(args: argparse.Namespace) -> None:
    """ValueError for --watch words that name nothing, and for flags of it without it."""
    if args.watch is None:
        return
    from ffengine.analysis import watching

    watching.check(args.watch.split(","), args.watch_every)
    if args.watch_samples < 1:
        raise ValueError(f"[cli] --watch-samples expected 1 or more, got {args.watch_samples}")


def watchers_of(args: argparse.Namespace, splits: data.Splits) -> Sequence[Callback]:
    """The callbacks that --watch names; what looks at data takes the first test samples."""
    if args.watch is None:
        return ()
    from ffengine.analysis import watching

    shown = data.loader(splits.test, batch_size=args.watch_samples)
    return watching.watchers(args.watch.split(","), first_samples(shown, args.watch_samples),
                             args.watch_every)


def train_and_test(args: argparse.Namespace, trainer: Trainer, splits: data.Splits,
                   change: Augment | None = None,
                   callbacks: Sequence[Callback] = ()) -> tuple[str, dict[str, Any]]:
    """Fit, test, and say what came out."""
    (found,) = tested_at(args, trainer, splits, (trainer.epochs,), change, callbacks=callbacks)
    return found


def tested_at(args: argparse.Namespace, trainer: Trainer, splits: data.Splits,
              marks: Sequence[int], change: Augment | None = None,
              drop_last: bool = False, callbacks: Sequence[Callback] = (),
              ) -> Iterator[tuple[str, dict[str, Any]]]:
    """What came out after each of the epochs `marks`, in turn: (text, values)."""
    size, device = trainer.settings.batch_size, trainer.device
    train = data.loader(splits.train, batch_size=size, shuffle=shuffles(size, len(splits.train)),
                        seed=trainer.settings.seed, device=device, augment=change,
                        drop_last=drop_last)
    valid, test = (data.loader(part, batch_size=size, device=device)
                   for part in (splits.valid, splits.test))
    seconds = 0.0
    for mark in marks:
        began = time.perf_counter()
        trainer.fit(train, valid if len(splits.valid) else None, until=mark, callbacks=callbacks)
        seconds += time.perf_counter() - began
        result = values_of(args, trainer, splits, trainer.evaluate(test), seconds)
        yield report_of(trainer, result), result


def values_of(args: argparse.Namespace, trainer: Trainer, splits: data.Splits, correct: float,
              seconds: float) -> dict[str, Any]:
    """`--json` of a training run as it stands."""
    size, rows = trainer.settings.batch_size, trainer.history.rows
    return {
        "model": args.model, "data": args.data, "data_label": splits.called,
        "device": str(trainer.device), "instruction_set": instruction_set(),
        "backend": backends.resolve("train", trainer.backend, trainer.device.type, trainer.dtype),
        "precision": trainer.settings.precision, **budget_values(trainer.planning),
        "epochs": trainer.settings.epochs,
        "epochs_in_all": len(rows),
        "batch_size": size, "lr": trainer.settings.lr, "seed": trainer.settings.seed,
        "train_samples": len(splits.train), "test_accuracy": correct,
        "valid_accuracy": rows[-1].valid_accuracy if rows else None,
        "layer_range": list(trainer.net.layer_range), "seconds": seconds,
        "seconds_per_epoch": sum(r.seconds for r in rows) / max(len(rows), 1),
        "images_per_second": sum(r.images_per_second for r in rows) / max(len(rows), 1),
        "peak_bytes": trainer.peak_bytes or (rows[-1].peak_bytes if rows else 0),
        "floor_bytes": trainer.floor_bytes, "process_peak_bytes": process.high_water(),
        "out": str(trainer.out),
        "plan": plan_values(trainer.plan_for(size)) if trainer.schedule.planned else None}


def report_of(trainer: Trainer, result: dict[str, Any]) -> str:
    """The same for people."""
    plan = trainer.plan_for(trainer.settings.batch_size) if trainer.schedule.planned else None
    return (f"test accuracy {100 * result['test_accuracy']:.2f} % on {result['data_label']} after "
            f"{epochs_text(trainer)} in {result['seconds']:.1f} s "
            f"({result['images_per_second']:.0f} images/s on {result['device']}, back-end "
            f"{result['backend']}); peak {megabytes(result['peak_bytes'])}, of it "
            f"{megabytes(trainer.floor_bytes)} parameters and states; plan {plan_text(plan)}; the "
            f"process held {megabytes(result['process_peak_bytes'])} at most; run in {trainer.out}"
            f"{budget_text(trainer.planning)}{stages_text(trainer)}")


def stages_text(trainer: Trainer) -> str:
    """Further lines of a pipeline: a stage each."""
    if not hasattr(trainer, "stages"):
        return ""
    from ffengine.commands import staged

    return staged.stages_text(trainer)


def epochs_text(trainer: Trainer) -> str:
    """How many; and of how many a layer, where layers train one after the other."""
    each = trainer.settings.epochs
    more = "" if each == trainer.epochs else f" ({each} per layer)"
    return f"{count(trainer.epochs, 'epoch')}{more}"


def plan_values(plan: Plan) -> dict[str, Any]:
    return {"cuts": plan.cuts, "tile": plan.tile, "peak_bytes": plan.peak_bytes,
            "floor_bytes": plan.floor_bytes, "working_bytes": plan.working_bytes}


def budget_values(planning: Planning) -> dict[str, Any]:
    """What a memory budget took; seconds_per_step is null where modelled costs ranked the plans."""
    settings = planning.job.settings
    return {"memory_budget": planning.budget, "state_precision": settings.states,
            "weight_precision": settings.weights, "gave_up": planning.gave_up,
            "costs": planning.costs, "seconds_per_step": planning.seconds}


def budget_text(planning: Planning) -> str:
    """Further lines of a plan within a budget: how it was ranked, what it gave up."""
    if planning.budget is None:
        return ""
    step = "" if planning.seconds is None else f", {planning.seconds:.3g} s a step predicted"
    rows = [f"\n  within {megabytes(planning.budget)}, ranked by {planning.costs} costs{step}"]
    return "".join([*rows, *(f"\n  gave up: {what}" for what in planning.gave_up)])


def plan_text(plan: Plan | None) -> str:
    if plan is None:
        return "none"
    return (f"{megabytes(plan.peak_bytes)} ({in_words(plan.cuts, plan.tile, plan.batch)})")
