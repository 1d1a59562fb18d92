"""Kinds that train: `heatmap` and `sweep` over settings."""

from __future__ import annotations

import argparse
import ast
import functools
import os
from collections.abc import Mapping
from typing import Any

import torch

from ffengine import models
from ffengine.analysis import grid
from ffengine.analysis.plots import lines
from ffengine.analysis.plots import tables as plots
from ffengine.analysis.sparsity import KINDS, sparsity
from ffengine.commands.analyses.again import Again, trainer_of
from ffengine.commands.analyses.opened import Made, open_one, table
from ffengine.commands.analyze import out_folder
from ffengine.commands.options import assignments, model_options
from ffengine.engine.run.stopping import TrainingStopped

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
    depth = max((len(c.get("layers", ())) for c in found), default=0)
    percent = [[None if v is None else 100 * v for v in (
        [None] * (depth + 1) if c["diverged"] else [c["accuracy"], *c["layers"]])]
        for c in (found[i] for i in order)]
    curves: dict[str, lines.Line] = {"network": (x, [row[0] for row in percent])}
    for layer in range(depth):
        ys = [row[1 + layer] for row in percent]
        if ys == curves["network"][1]:  # one line tells both
            del curves["network"]
            curves = {f"network, and layer {layer} alone": (x, ys), **curves}
        else:
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
        found = [_literal(word) for word in text.split(",")]
    if key in TRAINING:
        bad = [v for v in found if isinstance(v, bool) or not isinstance(v, (int, float))
               or TRAINING[key](v) != v]
        if bad:
            raise ValueError(f"[analyze] --over {key} expected numbers, got {bad[0]!r}")
    return found


def _literal(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


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
