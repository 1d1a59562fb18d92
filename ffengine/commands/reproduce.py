"""`ffengine reproduce`: train the recipes of a paper and print its numbers beside ours.

A recipe whose data is not on this machine trains on the bundled digits, with its model's own
recipe for them, and the table says so; nothing is fetched unless --data asks for it.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ffengine import data, models
from ffengine.commands.options import assignments, fitted_options, load_data, model_options
from ffengine.commands.train import announce, make_trainer, sized, train_and_test
from ffengine.data import files
from ffengine.data.catalog import SOURCES
from ffengine.engine.budget import megabytes
from ffengine.engine.checkpoint import write_atomically
from ffengine.engine.guard import TrainingStopped
from ffengine.engine.recipe import Recipe
from ffengine.models import recipe_files
from ffengine.models.recipe_files import RecipeFile

Row = dict[str, Any]
RIGHT = ("paper", "ours", "difference", "seconds", "peak", "epochs")


def run_reproduce(args: argparse.Namespace) -> tuple[str, list[Row]]:
    if args.recipe is None:
        return listing()
    seeds, recipes = seeds_of(args.seeds), chosen(args.recipe)
    cases = [case_of(args, recipe) for recipe in recipes]
    path = Path(args.out or "runs") / f"reproduce-{Path(args.recipe).stem}.csv"
    rows: list[Row] = []
    runner = Runner(args, cases)
    for case in cases:
        runs: list[Row] = []
        error = None
        for seed in seeds or case.file.train.seeds:
            try:
                runs.append(runner.run(case, seed))
            except TrainingStopped as stop:
                if len(cases) == 1:
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


@dataclass(frozen=True)
class Case:
    """A recipe as it will run here: on its own data, or on what stands in for it."""

    file: RecipeFile
    data: str
    options: dict[str, Any]
    data_options: dict[str, Any]
    recipe: Recipe
    #: Whether the paper's data was looked for and is not here.
    missing: bool

    @property
    def own(self) -> bool:
        """Whether the paper's number is of the same data."""
        return self.data == self.file.data

    @property
    def by_layer(self) -> bool:
        return self.file.paper_result.metric == recipe_files.BEST_LAYER

    @property
    def plain(self) -> bool:
        """Whether the model's recipe for digits rules, not the paper's."""
        return stands_in(self.data, self.file)

    @property
    def where(self) -> str:
        """The data, and why it is another than the paper's."""
        if self.own:
            return self.data
        return f"{self.data} ({self.file.data} not here)" if self.missing else (
            f"{self.data} (paper: {self.file.data})")

    @property
    def key(self) -> str:
        """Equal for recipes that train the same network in the same way."""
        train = self.file.train
        return repr((self.file.model, self.data, sorted(self.options.items()),
                     sorted(self.data_options.items()), self.recipe, train.sip,
                     not self.plain and train.augment))


def stands_in(name: str, file: RecipeFile) -> bool:
    """Whether `name` is the bundled digits in the place of the recipe's data."""
    return name == "digits" and name != file.data


def case_of(args: argparse.Namespace, file: RecipeFile) -> Case:
    """Which data it runs on, and with what numbers."""
    entry = models.entry(file.model)
    missing = args.data is None and not at_hand(file.data, args.data_root)
    name = args.data or ("digits" if missing else file.data)
    options, data_options = dict(file.options), dict(file.data_options)
    if stands_in(name, file):
        recipe = file.digits.recipe(entry.recipe_for(name))
        # the paper's image size is of its data, and the model may want other options on digits
        options = {k: v for k, v in options.items() if k != "image_size" and (
            k not in entry.options_for(name))} | dict(file.digits.options)
    else:
        recipe = file.train.recipe(entry.recipe)
    options |= model_options(file.model, args.options)
    wanted = assignments(args.data_options, "--data-set")
    return Case(file, name, options, wanted if name != file.data else data_options | wanted,
                sized(recipe, args), missing)


def at_hand(name: str, root: str | None) -> bool:
    """Whether the data set can be read without the network."""
    return name not in SOURCES or files.find(SOURCES[name], files.data_root(root)) is not None


class Runner:
    """Trains what has not been trained yet: recipes may differ in what is read off alone."""

    def __init__(self, args: argparse.Namespace, cases: Sequence[Case]) -> None:
        self.args = args
        self._by_layer = {case.key for case in cases if case.by_layer}
        self._done: dict[tuple[str, int], Row] = {}

    def run(self, case: Case, seed: int) -> Row:
        """What `ffengine train` reports; and each layer's accuracy, where a recipe asks for it."""
        if (case.key, seed) not in self._done:
            self._done[case.key, seed] = self._train(case, seed)
        return self._done[case.key, seed]

    def _train(self, case: Case, seed: int) -> Row:
        model, train = case.file.model, case.file.train
        run = argparse.Namespace(**{**vars(self.args), "model": model, "data": case.data})
        if not run.quiet:
            print(f"{case.file.name}, seed {seed}", file=sys.stderr)
        splits = load_data(model, case.data, case.options, case.data_options, seed, run.data_root)
        trainer = make_trainer(run, case.recipe, fitted_options(model, splits, case.options),
                               case.data_options, seed, sip=train.sip)
        announce(run, trainer)
        _, result = train_and_test(run, trainer, splits,
                                   None if case.plain else train.augmentation())
        result["epochs"] = trainer.settings.epochs  # a layer's, as the recipe counts them
        if case.key in self._by_layer:
            test = data.loader(splits.test, batch_size=trainer.settings.batch_size,
                               device=trainer.device)
            result["layer_accuracy"] = trainer.evaluate_layers(test)
        return result


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
