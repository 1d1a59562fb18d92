"""`ffengine profile`: training steps on random samples, and four files about them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ffengine import models
from ffengine.commands.devices import emulate, emulation
from ffengine.commands.folders import folder_for
from ffengine.commands.options import device_of, model_options
from ffengine.commands.train import sized
from ffengine.engine.memory.plans import Memory
from ffengine.engine.run.checkpoint import write_atomically
from ffengine.engine.trainer import Trainer
from ffengine.profile import page, plot, record, table, trace
from ffengine.profile.record import Start
from ffengine.profile.spans import Profile


def run_profile(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    if args.steps < 1:
        raise ValueError(f"[cli] --steps expected 1 or more, got {args.steps}")
    if not args.no_png:
        plot.check()
    emulated = emulate(args)
    trainer = make_trainer(args)
    starts = chosen(args, trainer)
    if args.out is not None and Path(args.out).exists() and not Path(args.out).is_dir():
        raise ValueError(f"[cli] --out expected a folder, got {args.out}")
    with folder_for(args.out, f"profile-{args.model.replace('/', '-')}") as out:
        made = record.profile(trainer, batch=trainer.settings.batch_size, steps=args.steps,
                              model=args.model, starts=starts)
        files = write(made, out, png=not args.no_png)
    text = table.text(made) + "\n\n" + "\n".join(f"wrote {path}" for path in files)
    values = {**made.values(), "files": [str(path) for path in files]}
    if emulated is not None:
        slow = max(made.phases, key=lambda phase: phase.measured["median"])
        said, values["device_profile"] = emulation(
            emulated, trainer, trainer.settings.batch_size, slow.measured["median"], slow.epoch)
        text += "\n\n" + said
    return text, values


def make_trainer(args: argparse.Namespace) -> Trainer:
    """The network with its recipe; refused are backpropagation and a budget nothing fits."""
    recipe, options = models.entry(args.model).recipe, model_options(args.model, args.options)
    recipe = sized(recipe, args)
    torch.manual_seed(0)
    net = models.create(args.model, **options)
    if not models.entry(args.model).local:
        raise ValueError(f"[profile] expected a model of layer-local training, got {args.model}, "
                         "trained by one loss; `ffengine bench fair` times and meters "
                         "backpropagation")
    return Trainer(net, recipe=recipe, batch_size=recipe.batch_size, progress=False,
                   backend=args.backend or "auto", precision=args.precision or "fp32",
                   memory_budget=args.memory_budget, device=device_of(args),
                   memory=Memory(args.states, args.weights, args.costs))


def chosen(args: argparse.Namespace, trainer: Trainer) -> list[Start]:
    """--phase or --epoch of the schedule; default every phase, in order."""
    found = record.phases(trainer)
    if args.epoch is not None:
        if args.phase is not None:
            raise ValueError("[cli] profile expected --phase or --epoch, got both")
        if not 0 <= args.epoch < trainer.epochs:
            raise ValueError(f"[cli] --epoch expected 0 to {trainer.epochs - 1}, got {args.epoch}")
        turns = [trainer.schedule.turn(args.epoch, iteration) for iteration in (0, 1)]
        return [s._replace(epoch=args.epoch) for s in found if s.turn in turns]
    if args.phase is None:
        return found
    if not 0 <= args.phase < len(found):
        known = "; ".join(f"{s.number}: {record.label(s.turn)}" for s in found)
        raise ValueError(f"[cli] --phase expected one of {known}; got {args.phase}")
    return [found[args.phase]]


def write(made: Profile, out: Path, png: bool) -> list[Path]:
    """profile.json, .html, .png and trace.json in the folder; their paths."""
    texts = {"profile.json": json.dumps(made.values()), "profile.html": page.page(made),
             "trace.json": json.dumps(trace.trace(made))}
    for name, text in texts.items():
        write_atomically(out / name, text.encode())
    if png:
        write_atomically(out / "profile.png", plot.png(made))
    return [out / name for name in (*texts, *["profile.png"] * png)]
