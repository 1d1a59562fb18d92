"""`ffengine reproduce`: train the recipes of a paper and print its numbers beside ours.

A recipe whose data is not on this machine trains on the bundled digits, with its model's own
recipe for them, and the table says so; nothing is fetched unless --data asks for it.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ffengine import data
from ffengine.commands.cases import Case, case_of, hosts, with_shorter
from ffengine.commands.options import fitted_options, load_data
from ffengine.commands.train import announce, make_trainer, tested_at
from ffengine.data import files
from ffengine.engine.budget import megabytes
from ffengine.engine.checkpoint import write_atomically
from ffengine.engine.guard import TrainingStopped
from ffengine.models import recipe_files
from ffengine.models.recipe_files import RecipeFile

Row = dict[str, Any]
RIGHT = ("paper", "ours", "difference", "seconds", "peak", "epochs")


def run_reproduce(args: argparse.Namespace) -> tuple[str, list[Row]]:
    if args.recipe is None:
        return listing()
    seeds, recipes = seeds_of(args.seeds), chosen(args.recipe)
    cases = [case_of(args, recipe) for recipe in recipes]
    if len(cases) == 1:
        cases = with_shorter(args, cases[0])
    path = Path(args.out or "runs") / f"reproduce-{Path(args.recipe).stem}.csv"
    rows: list[Row] = []
    runner = Runner(args, cases, seeds)
    for case in cases:
        runs: list[Row] = []
        error = None
        for seed in seeds or case.file.train.seeds:
            try:
                runs.append(runner.run(case, seed))
            except TrainingStopped as stop:
                if len(recipes) == 1:
                    raise
                error = str(stop)
                break
            write_csv(path, [*rows, row_of(case, runs)])
        rows.append(row_of(case, runs, error))
        write_csv(path, rows)
    return "\n".join([table(rows), *notes(args, cases), f"rows in {path}"]), rows


def listing() -> tuple[str, list[Row]]:
    """The bundled recipes, by paper."""
    found = [recipe_files.load(name) for name in recipe_files.names()]
    rows = [{"recipe": f.name, "paper": f.paper, "table": f.table, "row": f.row, "model": f.model,
             "data": f.data, "paper_mean": f.paper_result.mean, "paper_sd": f.paper_result.sd}
            for f in found]
    cells = [[f.name, percent(f.paper_result.mean, f.paper_result.sd), f.table, f.row]
             for f in found]
    return aligned([["recipe", "paper", "table", "row"], *cells]), rows


def chosen(name: str) -> list[RecipeFile]:
    """The recipe of that name or path, or all of a paper."""
    if name in recipe_files.papers():
        return recipe_files.of_paper(name)
    return [recipe_files.load(name)]


def seeds_of(text: str | None) -> tuple[int, ...] | None:
    """--seeds: a count, or a list with a comma; None leaves them to the recipe."""
    if text is None:
        return None
    words = [word for word in text.split(",") if word.strip()]
    if words and all(word.strip().isdecimal() for word in words):
        numbers = tuple(int(word) for word in words)
        if "," not in text and numbers[0] > 0:
            return tuple(range(numbers[0]))
        if "," in text and len(set(numbers)) == len(numbers):
            return numbers
    raise ValueError(f"[cli] --seeds expected a count (5) or different seeds (0,3,7), got {text!r}")


class Runner:
    """Trains what has not been trained yet: recipes may differ in what is read off alone, and a
    recipe of fewer epochs is read off a longer one's training as it passes them.
    """

    def __init__(self, args: argparse.Namespace, cases: Sequence[Case],
                 seeds: Sequence[int] | None) -> None:
        self.args, self.hosts = args, hosts(args, cases, seeds)
        self._by_layer = {self.hosts[case.file.name].key for case in cases if case.by_layer}
        self._marks: dict[str, set[int]] = {}
        for case in cases:
            self._marks.setdefault(self.hosts[case.file.name].key, set()).add(case.epochs)
        #: What a training gave after so many epochs, and what stopped it.
        self._found: dict[tuple[str, int], dict[int, Row]] = {}
        self._stopped: dict[tuple[str, int], TrainingStopped] = {}

    def run(self, case: Case, seed: int) -> Row:
        """What `ffengine train` reports; and each layer's accuracy, where a recipe asks for it."""
        host = self.hosts[case.file.name]
        place = host.key, seed
        if place not in self._found:
            found = self._found.setdefault(place, {})
            try:
                for row in self._train(host, seed):
                    found[row["epochs"]] = row
            except TrainingStopped as stop:
                self._stopped[place] = stop
        if case.epochs not in self._found[place]:
            raise self._stopped[place]
        return self._found[place][case.epochs]

    def _train(self, case: Case, seed: int) -> Iterator[Row]:
        """A row for each number of epochs that is asked for."""
        model, train, marks = case.file.model, case.file.train, sorted(self._marks[case.key])
        run = argparse.Namespace(**{**vars(self.args), "model": model, "data": case.data})
        if not run.quiet:
            print(f"{case.file.name}, seed {seed}", file=sys.stderr)
        splits = load_data(model, case.data, case.options, case.data_options, seed, run.data_root)
        trainer = make_trainer(run, case.recipe, fitted_options(model, splits, case.options),
                               case.data_options, seed, sip=train.sip)
        announce(run, trainer)
        # a single number is that of a layer's epochs, where layers train in turn
        stops = [trainer.epochs] if len(marks) == 1 else marks
        for mark, (_, row) in zip(marks, tested_at(
                run, trainer, splits, stops, data.augment.by_name(case.augment), case.drop_last),
                strict=True):
            row["epochs"] = mark
            if case.key in self._by_layer:
                test = data.loader(splits.test, batch_size=trainer.settings.batch_size,
                                   device=trainer.device)
                row["layer_accuracy"] = trainer.evaluate_layers(test)
            yield row


def row_of(case: Case, runs: Sequence[Row], error: str | None = None) -> Row:
    """A line of the table: accuracies in percent, seconds of training that a seed took."""
    file, paper = case.file, case.file.paper_result
    found = [100 * (best(r["layer_accuracy"]) if case.by_layer else r["test_accuracy"])
             for r in runs]
    ours = mean(found) if found else None
    used = {k: runs[0][k] if runs else None
            for k in ("epochs", "batch_size", "lr", "device", "backend", "precision")}
    return {"recipe": file.name, "paper": file.paper, "table": file.table, "row": file.row,
            "model": file.model, "metric": paper.metric, "paper_mean": paper.mean,
            "paper_sd": paper.sd, "mean": ours, "sd": stdev(found) if len(found) > 1 else None,
            "difference": ours - paper.mean if ours is not None and case.own else None,
            "seconds": mean(r["seconds"] for r in runs) if runs else None,
            "peak_bytes": max((r["peak_bytes"] for r in runs), default=None),
            "data": case.where, "trained_on": case.data, "paper_data": file.data,
            "paper_epochs": file.train.epochs, **used,
            "seeds": [r["seed"] for r in runs], "accuracies": found, "error": error}


def best(accuracies: Sequence[float | None]) -> float:
    """Of the layers that tell classes."""
    return max(a for a in accuracies if a is not None)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """The rows so far; the file is replaced whole."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: " ".join(map(str, v)) if isinstance(v, list) else v
                      for k, v in row.items()} for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode())


def table(rows: Sequence[Row]) -> str:
    """The rows for people."""
    head = ["recipe", "paper", "ours", "difference", "seconds", "peak", "epochs", "data"]
    return aligned([head, *(cells(row) for row in rows)])


def cells(row: Row) -> list[str]:
    paper = percent(row["paper_mean"], row["paper_sd"])
    if row["mean"] is None:
        return [row["recipe"], paper, *"-----", f"{row['data']}; {row['error']}"]
    far = "-" if row["difference"] is None else f"{row['difference']:+.2f}"
    return [row["recipe"], paper, percent(row["mean"], row["sd"]), far, f"{row['seconds']:.1f}",
            megabytes(row["peak_bytes"]), str(row["epochs"]), row["data"]]


def percent(value: float, sd: float | None) -> str:
    return f"{value:.2f}" + ("" if sd is None else f" ± {sd:.2f}")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of one width each; those of RIGHT end together."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(
        cell.rjust(width) if name in RIGHT else cell.ljust(width)
        for cell, width, name in zip(line, widths, lines[0], strict=True)).rstrip()
        for line in lines)


def notes(args: argparse.Namespace, cases: Sequence[Case]) -> list[str]:
    """What a reader of the table must know."""
    found = ["accuracy in percent, mean ± sd over seeds; seconds of training a seed took"]
    if any(not case.own for case in cases):
        found.append("numbers on other data than the paper's do not compare with it")
    missing = sorted({case.file.data for case in cases if case.missing})
    if missing:
        found.append(f"not on this machine: {', '.join(missing)} (looked below "
                     f"{files.data_root(args.data_root)}); --data-root FOLDER or $FFENGINE_DATA "
                     f"names a folder that has them, --data {missing[0]} downloads it")
    return found
