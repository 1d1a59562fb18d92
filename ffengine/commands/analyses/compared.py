"""Kinds that take several runs: `layers`, `sparsity`, `history` and `ttest`."""

from __future__ import annotations

import argparse
import csv
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ffengine.analysis import ttest as tests
from ffengine.analysis.plots import lines
from ffengine.analysis.responses import LayerSums, gather
from ffengine.analysis.sparsity import KINDS, Kind
from ffengine.analysis.verdicts import Verdicts, judge
from ffengine.analysis.weights import WeightStatistics, weight_statistics
from ffengine.commands.analyses.opened import (
    Made,
    Opened,
    labels_of,
    open_all,
    report_of,
    same_architecture,
    same_data,
    table,
)

#: Columns of `layers`, with their panels' titles and units; panels that no run fills are left out.
LAYER_COLUMNS = {"accuracy": ("accuracy of the layer alone", "%"),
                 "separation": ("separation, mean of g₊ - g₋", "goodness"),
                 "largest_goodness": ("largest goodness on the data", "goodness"),
                 "largest_weight": ("largest |w|", "weight"),
                 "inactive": ("deactivated neurons: responses that are 0", "%"),
                 "dead": ("neurons that no sample activates", "neurons")}


def layers(args: argparse.Namespace) -> Made:
    """Trifecta figs. 1, 4, 6 and 9; DeeperForward figs. 5d and 11."""
    runs = open_all(args)
    same_data(runs)
    names = labels_of(runs)
    found = {name: measured_layers(run, args) for name, run in zip(names, runs, strict=True)}
    shown = layer_panels(found)
    units = dict(LAYER_COLUMNS.values())
    picture = lines.panels(f"Layers, {args.split} data: {runs[0].title}" if len(runs) == 1 else
                           f"Layers of {len(runs)} runs, {args.split} data", shown, "layer", units,
                           whole=True)
    columns = ["layer", *LAYER_COLUMNS, "positive", "negative"]
    rows = [[name, *("" if r[c] is None else r[c] for c in columns)]
            for name, found_ in found.items() for r in found_]
    text = [f"{name}: " + ", ".join("-" if r["accuracy"] is None else
                                    f"{100 * r['accuracy']:.2f} %" for r in found_)
            + " by each layer alone" for name, found_ in found.items()]
    return Made({"layers.png": picture, "layers.csv": table(["run", *columns], rows)},
                {"layers": found}, "\n".join(text))


def layer_panels(found: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, lines.Line]]:
    """A panel a measure that some run has, with a line a run."""
    shown: dict[str, dict[str, lines.Line]] = {}
    for column, (title, unit) in LAYER_COLUMNS.items():
        factor = 100 if unit == "%" else 1
        curves: dict[str, lines.Line] = {name: (
            [r["layer"] for r in rows],
            [None if r[column] is None else factor * r[column] for r in rows])
            for name, rows in found.items()}
        if any(v is not None for _, ys in curves.values() for v in ys):
            shown[title] = curves
    return shown


def measured_layers(run: Opened, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a layer of a run."""
    images = run.part(args.split, args.samples)
    return layer_rows(judge(run.net, run.samples(images), backend=run.backend),
                      gather(run.net, run.samples(images), backend=run.backend),
                      weight_statistics(run.net))


def layer_rows(verdicts: Verdicts, sums: list[LayerSums],
               weights: list[WeightStatistics]) -> list[dict[str, Any]]:
    """What is told of each layer; None where its goodness tells no classes."""
    rows = []
    for i, (layer, weight) in enumerate(zip(sums, weights, strict=False)):
        row: dict[str, Any] = {"layer": i, **dict.fromkeys(
            ("accuracy", "separation", "largest_goodness", "positive", "negative"))}
        if verdicts.layers:
            said = verdicts.layers[i]
            row |= {"accuracy": said.accuracy, "separation": said.separation,
                    "largest_goodness": said.largest, "positive": said.positive,
                    "negative": said.negative}
        rows.append({**row, "largest_weight": weight.largest, "inactive": layer.inactive(),
                     "dead": layer.dead()})
    return rows


def sparsity(args: argparse.Namespace) -> Made:
    """FFLib tables 3 and 4, over runs of one architecture (seeds)."""
    runs = open_all(args)
    same_architecture(runs)
    found = [weight_statistics(run.net) for run in runs]
    names = [s.name for s in found[0]]
    rows: list[list[Any]] = []
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for i, name in enumerate(names):
        numbers = {kind: [f[i].sparsity[kind] for f in found] for kind in KINDS}
        others = {column: [getattr(f[i], column) for f in found]
                  for column in ("least", "most", "mean", "deviation")}
        groups[name] = {MEASURES[kind]: mean_sd(v) for kind, v in numbers.items()}
        rows.append([name, len(runs), *(repr(v) for values in (*numbers.values(),
                                                               *others.values())
                                        for v in mean_sd(values))])
    columns = (*KINDS, "min", "max", "mean", "sd")
    header = ["weight", "runs", *(f"{c}{part}" for c in columns
                                  for part in ("", " (sd over runs)"))]
    title = f"Sparsity of weights: {runs[0].title}" + (
        "" if len(runs) == 1 else f", mean and sd of {len(runs)} runs")
    text = "\n".join([title, *(f"  {name}: " + ", ".join(
        f"{kind} {m:.3f}" + (f" ± {s:.3f}" if len(runs) > 1 else "")
        for kind, (m, s) in groups[name].items()) for name in names)])
    return Made({"sparsity.png": lines.bars(title, groups, "sparsity, 0 (all equal) to 1"),
                 "sparsity.csv": table(header, rows)},
                {"weights": [[asdict(s) for s in f] for f in found],
                 "mean": {n: {k: m for k, (m, _) in g.items()} for n, g in groups.items()}}, text)


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and the sample's standard deviation (0 of one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


#: What `history` shows, beside losses, where no column is named; and some columns in words.
USUAL = ("train_accuracy", "valid_accuracy", "pair_accuracy")
WORDS = {"train_accuracy": "accuracy on training data, 0 to 1",
         "valid_accuracy": "accuracy on validation data, 0 to 1",
         "pair_accuracy": "pairs told apart, 0 to 1"}
#: The measures of sparsity in words.
MEASURES: dict[Kind, str] = {"hoyer": "Hoyer", "l1": "L1 neg. entropy", "l2": "L2 neg. entropy",
                             "gini": "Gini"}
WORDS |= {name: f"{words} sparsity of weights" for name, words in MEASURES.items()}


def history(args: argparse.Namespace) -> Made:
    """SN fig. 9, NetworkFF figs. 2-3, DeeperForward fig. 7; and what was watched in training."""
    runs = open_all(args)
    names = labels_of(runs)
    records = {name: history_of(run, args.steps) for name, run in zip(names, runs, strict=True)}
    known = list(dict.fromkeys(c for found in records.values() for c in found))
    for column in args.columns or ():
        if column not in (*known, *map(panel_of, known)):
            raise ValueError(f"[analyze] --columns expected some of "
                             f"{', '.join(dict.fromkeys(map(panel_of, known)))}, got {column!r}")
    shown = history_panels(records, args.columns, "step" if args.steps else "epoch")
    if not shown:
        raise ValueError(f"[analyze] expected a history with losses or accuracies, got "
                         f"{', '.join(known)}")
    picture = lines.panels("History: " + (runs[0].title if len(runs) == 1 else
                                          f"{len(runs)} runs"), shown,
                           "training step" if args.steps else "epoch", {}, whole=True)
    rows = [[name, *("" if v is None else v for v in row)] for name, found in records.items()
            for row in zip(*(found.get(c, [None] * len(found["epoch"])) for c in known),
                           strict=True)]
    last = {name: {c: v[-1] for c, v in found.items()} for name, found in records.items()}
    return Made({"history.png": picture, "history.csv": table(["run", *known], rows)},
                {"last": last}, f"history of {', '.join(names)}: {', '.join(shown)}")


Record = dict[str, list[float | None]]


def history_panels(runs: Mapping[str, Record], columns: Sequence[str] | None = None,
                   at: str = "epoch") -> dict[str, dict[str, lines.Line]]:
    """A panel a quantity, a line a run and layer; columns, or quantities of all layers, by name."""
    shown: dict[str, dict[str, lines.Line]] = {}
    for name, found in runs.items():
        for column, values in found.items():
            panel = panel_of(column)
            wanted = panel in columns or column in columns if columns else (
                panel == "loss" or panel in USUAL or at == "step")
            layered = column == panel and f"{column}_0" in found
            if wanted and not layered and column not in ("epoch", "step") and any(
                    v is not None for v in values):
                part = "" if column == panel else f"layer {column.rpartition('_')[2]}"
                label = ", ".join(filter(None, (name if len(runs) > 1 else "", part))) or name
                shown.setdefault(WORDS.get(panel, panel), {})[label] = (
                    [e or 0 for e in found[at]], values)
    return shown


def panel_of(column: str) -> str:
    """The quantity of a column: what is a layer's ends in _ and its number."""
    return re.sub(r"_\d+$", "", column)


def history_of(run: Opened, steps: bool = False) -> Record:
    """Columns of the run's history.csv, or of its steps.csv; ValueError without one."""
    path = run.folder / ("steps.csv" if steps else "history.csv")
    at = "step" if steps else "epoch"
    try:
        with path.open(newline="") as file:
            records = list(csv.DictReader(file))
        # a layer whose turn it was not has a loss of 0
        found = {column: [None if not r[column] or (column.startswith("loss_")
                                                    and float(r[column]) == 0)
                          else float(r[column]) for r in records]
                 for column in (records[0] if records else ())}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"[analyze] expected a history of numbers in {path}: {error}") from None
    if at not in found:
        raise ValueError(f"[analyze] expected a history of one {at} or more, got {path}")
    return found


def ttest(args: argparse.Namespace) -> Made:
    """FFLib table 5; NetworkFF tables I-III: accuracy, gap, p and Cohen's d of two groups."""
    if min(len(args.runs), len(args.against)) < 2:
        raise ValueError(f"[ttest] expected two runs or more in each group, got {len(args.runs)} "
                         f"and {len(args.against)}")
    if args.paired and args.equal_variances:
        raise ValueError("[ttest] expected --paired or --equal-variances, got both")
    if args.paired and len(args.runs) != len(args.against):
        raise ValueError(f"[ttest] --paired expected as many runs in each group, got "
                         f"{len(args.runs)} and {len(args.against)}")
    groups = open_all(args), open_all(args, args.against)
    for group in groups:
        same_architecture(group)
    same_data([*groups[0], *groups[1]])
    kind: tests.Kind = "paired" if args.paired else (
        "student" if args.equal_variances else "welch")
    parts = ("test", "train") if args.training_data else ("test",)
    measured = {part: [[accuracy_of(run, part) for run in group] for group in groups]
                for part in parts}
    found = tests.compare(measured["test"][0], measured["test"][1], kind)
    rows = [[run.name, side, *(repr(measured[part][j][i]) for part in parts)]
            for j, side in enumerate(("first", "against")) for i, run in enumerate(groups[j])]
    described = [describe(group, {part: measured[part][j] for part in parts})
                 for j, group in enumerate(groups)]
    points = {f"group {'AB'[j]}: {group[0].model}": {
        f"{part} accuracy": mean_sd([100 * v for v in measured[part][j]]) for part in parts}
        for j, group in enumerate(groups)}
    title = (f"{kind} t-test: difference {100 * found.difference:+.2f} points, "
             f"p = {found.p:.3g}, d = {found.d:.2f}")
    picture = lines.bars(title, points, "accuracy, % (bars: one sd over runs)")
    text = "\n".join([*(d["text"] for d in described),
                      f"{title} (t = {found.t:.4g}, {found.freedom:.4g} degrees of freedom)"])
    return Made({"ttest.png": picture, "ttest.csv": table(["run", "group", *parts], rows)},
                {**asdict(found), "groups": described, "accuracies": measured}, text)


def accuracy_of(run: Opened, part: str) -> float:
    """Of a run's network: what its training wrote, else measured now."""
    written = report_of(run).get("test_accuracy") if part == "test" else None
    if written is not None and run.args.checkpoint == "latest":
        return float(written)
    return judge(run.net, run.samples(run.part(part)), backend=run.backend).accuracy


def describe(group: Sequence[Opened], measured: dict[str, list[float]]) -> dict[str, Any]:
    mean, sd = mean_sd(measured["test"])
    values: dict[str, Any] = {"model": group[0].model, "runs": len(group), "mean": mean, "sd": sd,
                              "max": max(measured["test"])}
    text = (f"{group[0].model}: test {100 * mean:.2f} ± {100 * sd:.2f} %, best "
            f"{100 * values['max']:.2f} % of {len(group)} runs")
    if "train" in measured:
        train, _ = mean_sd(measured["train"])
        values |= {"train_mean": train, "gap": train - mean}
        text += f"; training data {100 * train:.2f} %, gap {100 * (train - mean):+.2f} points"
    return {**values, "text": text}
