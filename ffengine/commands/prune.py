"""`ffengine prune`: neurons that a trained run loses, down to a share of its parameter bytes."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ffengine.adapt.pruning import BY_SAMPLES, METHODS, prune_units
from ffengine.commands.edited import EditedRun, open_edited
from ffengine.engine.run.evaluation import first_samples, samples_of
from ffengine.nn.checks import one_of


def run_prune(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    one_of("prune", "--by", args.by, tuple(METHODS))
    if not (math.isfinite(args.ratio) and args.ratio >= 1):
        raise ValueError(f"[prune] --ratio expected a number of 1 or more, got {args.ratio}")
    if args.samples < 1:
        raise ValueError(f"[prune] --samples expected 1 or more, got {args.samples}")
    run = open_edited(args)
    trainer = run.trainer
    before = [trainer.net.layer(i).units for i in range(len(trainer.net.layers))]
    made = prune_units(trainer.net, args.by, args.ratio, layers=args.layers, seed=args.seed,
                       samples=ranked_on(run, args), backend=trainer.backend)
    if made.edit is not None:
        run.edit(made.edit)
    units = [len(made.kept[i]) for i in range(len(before))]
    text, result = run.finish("prune", {
        "by": args.by, "ratio": args.ratio, "compression": made.ratio, "seed": args.seed,
        "units": units})
    said = ", ".join(f"layer {i} keeps {left} of {had} units"
                     for i, (left, had) in enumerate(zip(units, before, strict=True)))
    return f"pruned by {args.by}, {made.ratio:.2f}x: {said}\n{text}", result


def ranked_on(run: EditedRun, args: argparse.Namespace) -> Any:
    """Samples that units are ranked by; never test data."""
    if args.by not in BY_SAMPLES:
        return None
    batches = first_samples(run.loader(run.chosen_on), args.samples)
    return samples_of(run.trainer, batches)
