"""Kinds that train: `heatmap` and `sweep` over settings, and `course`, measured on the way."""

from __future__ import annotations

import argparse
import ast
import functools
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch

from ffengine import models
from ffengine.analysis import grid
from ffengine.analysis.plots import lines
from ffengine.analysis.plots import tables as plots
from ffengine.analysis.sparsity import KINDS, sparsity
from ffengine.commands.analyses.again import Again, trainer_of
from ffengine.commands.analyses.opened import Made, labels_of, open_all, open_one, table
from ffengine.commands.analyze import out_folder
from ffengine.commands.options import assignments, model_options
from ffengine.engine.guard import TrainingStopped
from ffengine.engine.trainer import Trainer

#: Settings of the training itself, with the kind of their values; all others are the model's.
TRAINING = {"lr": float, "epochs": int, "seed": int, "batch_size": int}
#: The largest value over the smallest from which an axis is logarithmic.
WIDE = 30


def heatmap(args: argparse.Namespace) -> Made:
    """FFLib figs. 3-8: accuracy and mean Hoyer sparsity over two settings, e.g. lr and theta."""
    axes, title, found = trained_grid(args, 2)
    (across, columns), (down, rows) = axes.items()
    shape = len(columns), len(rows)
    accuracy = torch.tensor([100 * value_of(c, "accuracy") for c in found]).view(shape).t()
    hoyer = torch.tensor([value_of(c, "hoyer") for c in found]).view(shape).t()
    picture = plots.heat_map(title, [("test accuracy", accuracy, "accuracy, %"),
                                     ("mean Hoyer sparsity of the layers' weights", hoyer,
                                      "sparsity, 0 to 1")], (down, rows), (across, columns))
    return grid_made(args, axes, title, found, picture)


def sweep(args: argparse.Namespace) -> Made:
    """SN fig. 7: accuracy of each layer, and of the network, over one setting, e.g. phi."""
    axes, title, found = trained_grid(args, 1)
    (name, values), = axes.items()
    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    order = sorted(range(len(values)), key=lambda i: values[i]) if numeric else range(len(values))
    x = [values[i] if numeric else i for i in order]
    curves: dict[str, lines.Line] = {"network": (x, [
        None if found[i]["diverged"] else 100 * found[i]["accuracy"] for i in order])}
    depth = max((len(c.get("layers", ())) for c in found), default=0)
    for layer in range(depth):
        ys = [None if c["diverged"] or c["layers"][layer] is None else 100 * c["layers"][layer]
              for c in (found[i] for i in order)]
        curves[f"layer {layer} alone"] = (x, ys)
    label = name if numeric else f"{name}: " + ", ".join(f"{i} = {values[i]}" for i in order)
    log = numeric and min(x) > 0 and max(x) / min(x) >= WIDE
    picture = lines.panels(title, {"accuracy": curves}, label, {"accuracy": "test accuracy, %"},
                           log=log, whole=not numeric)
    return grid_made(args, axes, title, found, picture)


def value_of(cell: Mapping[str, Any], name: str) -> float:
    return float("nan") if cell["diverged"] else float(cell[name])


def trained_grid(args: argparse.Namespace,
                 dimensions: int) -> tuple[dict[str, list[Any]], str, list[dict[str, Any]]]:
    """(axes, title, numbers of every cell), trained where they are not there yet."""
    run = open_one(args)
    axes = axes_of(run.model, args.over, dimensions)
    again = Again.of(run, epochs=args.epochs, options=model_options(run.model, args.options),
                     data_options=assignments(args.data_options, "--data-set"))
    made = grid.Grid(axes, again.values())
    for cell in made.cells():
        again.changed(cell).check()
    jobs = min(os.cpu_count() or 1, len(made.cells())) if args.jobs is None else args.jobs
    place = {"root": args.data_root, "backend": args.backend or "auto",
             "device": str(run.device),
             "threads": max(1, torch.get_num_threads() // max(jobs, 1))}
    found = grid.run(made, out_folder(args) / "cells", functools.partial(train_cell, place),
                     jobs=jobs, progress=not args.quiet)
    over = " x ".join(axes)
    return axes, f"{run.model} on {run.run.notes['data']} over {over}, {again.epochs} epochs", found


def axes_of(model: str, words: list[str], dimensions: int) -> dict[str, list[Any]]:
    """The values of each --over; ValueError for a setting that neither training nor model has."""
    if len(words) != dimensions:
        raise ValueError(f"[analyze] expected --over {dimensions} time{'s'[:dimensions - 1]}, got "
                         f"{len(words)}")
    axes: dict[str, list[Any]] = {}
    known = [*TRAINING, *models.entry(model).options()]
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in known or key in axes:
            raise ValueError(f"[analyze] --over expected KEY=V1,V2,... of {', '.join(known)}, got "
                             f"{word!r}")
        axes[key] = values_of(key, text)
    return axes


def values_of(key: str, text: str) -> list[Any]:
    """Literals between commas, or words."""
    try:
        found = list(ast.literal_eval(f"[{text}]"))
    except (ValueError, SyntaxError):
        found = text.split(",")
    if key in TRAINING:
        bad = [v for v in found if isinstance(v, bool) or not isinstance(v, (int, float))
               or TRAINING[key](v) != v]
        if bad:
            raise ValueError(f"[analyze] --over {key} expected numbers, got {bad[0]!r}")
    return found


def train_cell(place: Mapping[str, Any], base: Mapping[str, Any],
               cell: Mapping[str, Any]) -> dict[str, Any]:
    """One training: accuracy (0 to 1) of the network and of its layers, sparsity of its weights."""
    torch.set_num_threads(place["threads"])
    again = Again.from_values(base).changed(cell)
    trainer, train, test = trainer_of(again, place)
    plain = {**cell, "epochs": again.epochs}
    try:
        trainer.fit(train)
    except TrainingStopped as stopped:
        return {**plain, "diverged": True, "why": str(stopped)}
    net = trainer.net
    measures = [{kind: sparsity(net.layer(i).weight, kind) for kind in KINDS}
                for i in range(len(net.layers))]
    return {**plain, "diverged": False, "accuracy": trainer.evaluate(test),
            "layers": trainer.evaluate_layers(test), "sparsity": measures,
            "hoyer": sum(m["hoyer"] for m in measures) / len(measures)}


def grid_made(args: argparse.Namespace, axes: Mapping[str, list[Any]], title: str,
              found: list[dict[str, Any]], picture: bytes) -> Made:
    rows = [[*(c[name] for name in axes), "" if c["diverged"] else repr(c["accuracy"]),
             "" if c["diverged"] else repr(c["hoyer"]), c["diverged"]] for c in found]
    fine = [c for c in found if not c["diverged"]]
    best = max(fine, key=lambda c: c["accuracy"], default=None)
    told = "all diverged" if best is None else (
        f"best {100 * best['accuracy']:.2f} % at "
        + ", ".join(f"{name} {best[name]}" for name in axes))
    text = f"{title}: {told}; {len(found) - len(fine)} of {len(found)} cells diverged"
    return Made({f"{args.kind}.png": picture,
                 f"{args.kind}.csv": table([*axes, "accuracy", "hoyer", "diverged"], rows)},
                {"axes": dict(axes), "cells": found,
                 "best": None if best is None else {
                     **{name: best[name] for name in axes}, "accuracy": best["accuracy"]}}, text)


class Measured(Trainer):
    """A trainer that looks at its weights once in `every` steps, and before the first."""

    def begin(self, every: int) -> None:
        self.every, self.rows = every, [self.look()]

    def look(self) -> list[float]:
        """Steps done, then the measures of layer after layer."""
        net = self.net
        return [float(self.steps), *(sparsity(net.layer(i).weight, kind)
                                     for i in range(len(net.layers)) for kind in KINDS)]

    def step(self, *args: Any, **named: Any) -> Any:
        report = super().step(*args, **named)
        if self.steps % self.every == 0:
            self.rows.append(self.look())
        return report


def course(args: argparse.Namespace) -> Made:
    """FFLib figs. 9-12 (runs of several widths) and 15-18 (FFNN beside BPNN)."""
    if args.every < 1:
        raise ValueError(f"[analyze] --every expected 1 step or more, got {args.every}")
    runs = open_all(args)
    names = labels_of(runs)
    panels: dict[str, dict[str, lines.Line]] = {TITLES[kind]: {} for kind in KINDS}
    rows, last = [], {}
    for name, run in zip(names, runs, strict=True):
        again = Again.of(run, epochs=args.epochs)
        if not args.quiet:
            print(f"{name}: {run.model}, {again.epochs} epochs", file=sys.stderr, flush=True)
        trainer, train, _ = trainer_of(again, {
            "root": args.data_root, "backend": args.backend or "auto",
            "device": str(run.device)}, kind=Measured, progress=not args.quiet)
        assert isinstance(trainer, Measured)
        trainer.begin(args.every)
        trainer.fit(train)
        steps = [row[0] for row in trainer.rows]
        for i in range(len(trainer.net.layers)):
            for k, kind in enumerate(KINDS):
                values = [row[1 + len(KINDS) * i + k] for row in trainer.rows]
                label = f"{name}, layer {i}" if len(runs) > 1 else f"layer {i}"
                panels[TITLES[kind]][label] = (steps, values)
            rows += [[name, i, int(row[0]), *map(repr, row[1 + 4 * i:5 + 4 * i])]
                     for row in trainer.rows]
        last[name] = [dict(zip(KINDS, trainer.rows[-1][1 + 4 * i:5 + 4 * i], strict=True))
                      for i in range(len(trainer.net.layers))]
    picture = lines.panels("Sparsity of weights in training: " + (
        runs[0].model if len(runs) == 1 else f"{len(runs)} runs"), panels, "training step",
        dict.fromkeys(TITLES.values(), "sparsity, 0 to 1"))
    text = "\n".join(f"{name}, layer {i}: " + ", ".join(f"{k} {v:.3f}" for k, v in m.items())
                     for name, layers in last.items() for i, m in enumerate(layers))
    return Made({"course.png": picture,
                 "course.csv": table(["run", "layer", "step", *KINDS], rows)}, {"last": last}, text)


TITLES = {"hoyer": "Hoyer", "l1": "L1-normalised negative entropy",
          "l2": "L2-normalised negative entropy", "gini": "Gini"}
