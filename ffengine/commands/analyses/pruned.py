"""`ffengine analyze prunability`: runs pruned to rising ratios, a curve a model."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, astuple, fields
from typing import Any

from ffengine.adapt.pruning import BY_SAMPLES
from ffengine.analysis.plots.bands import bands
from ffengine.analysis.prunability import Point, Spread, curve, spread
from ffengine.commands.analyses.opened import Made, Opened, labels_of, open_all, same_data, table
from ffengine.engine.run.evaluation import accuracy
from ffengine.nn.network import LocalNet


def prunability(args: argparse.Namespace) -> Made:
    """FFLib fig. 19: every run is pruned with every seed; runs of one model make one curve."""
    if args.seeds < 1:
        raise ValueError(f"[analyze] --seeds expected 1 or more, got {args.seeds}")
    runs = open_all(args)
    same_data(runs)
    points: dict[str, list[Point]] = {}
    rows: list[list[Any]] = []
    for name, run in zip(labels_of(runs), runs, strict=True):
        for point in points_of(run, args):
            points.setdefault(run.model, []).append(point)
            rows.append([name, run.model, args.by, *told(point)])
            if not args.quiet:
                print(f"{name}: {point.compression:.2f}x, seed {point.seed}: "
                      f"{100 * point.accuracy:.2f} %", file=sys.stderr, flush=True)
    curves = {model: spread(found) for model, found in points.items()}
    notes = runs[0].run.notes
    title = f"Neurons pruned by {args.by}, one shot: {notes.get('data_label', notes['data'])}"
    means = [[model, args.by, *astuple(s)] for model, found in curves.items() for s in found]
    text = [title, *(f"  {model} {s.compression:6.2f}x  {100 * s.mean:6.2f} ± "
                     f"{100 * s.deviation:.2f} % ({100 * s.least:.2f} to {100 * s.most:.2f}, "
                     f"{s.count} pruned networks)"
                     for model, found in curves.items() for s in found)]
    columns, of_means = ([f.name for f in fields(kind)] for kind in (Point, Spread))
    named = {f"{model} ({found[0].count} pruned networks)": found
             for model, found in curves.items()}
    return Made({"prunability.png": bands(title, named),
                 "prunability.csv": table(["run", "model", "method", *columns], rows),
                 "prunability_means.csv": table(["model", "method", *of_means], means)},
                {"by": args.by, "curves": {m: [asdict(s) for s in found]
                                           for m, found in curves.items()}}, "\n".join(text))


def points_of(run: Opened, args: argparse.Namespace) -> list[Point]:
    """The run's network, pruned; units are ranked on validation data, or what was trained on."""
    test = run.part(args.split, args.samples)
    ranked_on = None
    if args.by in BY_SAMPLES:
        split = "valid" if len(run.splits.valid) else "train"
        ranked_on = list(run.samples(run.part(split, min(args.rank_samples,
                                                         len(getattr(run.splits, split))))))

    def judged(net: LocalNet) -> float:
        return accuracy(net, run.samples(test), run.backend)

    return list(curve(run.net, args.by, args.ratios, range(args.seeds), judged,
                      layers=args.layers, samples=ranked_on, backend=run.backend))


def told(point: Point) -> list[Any]:
    return [" ".join(map(str, v)) if isinstance(v, tuple) else v
            for v in (getattr(point, f.name) for f in fields(Point))]
