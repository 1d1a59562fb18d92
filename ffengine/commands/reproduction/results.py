"""The results file of `ffengine reproduce`: every finished seed, and the rows they make.

A run is one training read after one number of epochs, under a key that says all that it depends
on. Any number of processes may add to a file at a time: each reads and replaces it whole while it
holds its lock.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ffengine
from ffengine import sealed
from ffengine.commands.cases import Case
from ffengine.commands.reproduction.tables import Row, row_of
from ffengine.locks import locked
from ffengine.models import recipe_files
from ffengine.provenance import facts

NAME = "reproduction.json"
KIND, FORMAT = "reproduction", 1
#: Flags that change what a training gives, beside what a case says itself.
FLAGS = ("device", "backend", "precision", "states", "weights", "memory_budget", "lr")
#: Of what a training reports, what is kept.
KEPT = ("seed", "epochs", "batch_size", "lr", "device", "backend", "precision", "state_precision",
        "weight_precision", "train_samples", "test_accuracy", "valid_accuracy", "layer_accuracy",
        "seconds", "peak_bytes")
#: Names that rows had in files written before there was this one.
RENAMED = {"ours": "mean", "ours_sd": "sd", "epochs_asked": "paper_epochs"}

Run = dict[str, Any]
Runs = dict[tuple[str, int], Run]


def digest(args: argparse.Namespace, text: str) -> str:
    """Of what a training depends on, sixteen hexadecimal digits."""
    asked = [(name, getattr(args, name)) for name in FLAGS]
    return hashlib.sha256(repr((text, asked)).encode()).hexdigest()[:16]


def key_of(args: argparse.Namespace, case: Case) -> str:
    """Equal for recipes that one finished training serves."""
    return digest(args, case.key)


def run_of(args: argparse.Namespace, case: Case, seed: int, found: dict[str, Any]) -> Run:
    """What is kept of a training's report."""
    return {"key": key_of(args, case), "start": digest(args, case.start), "model": case.file.model,
            "data": case.data, **{name: found.get(name) for name in KEPT}, "seed": seed,
            "version": ffengine.__version__, "machine": facts()}


class Results:
    """The file at `path`, which need not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """ValueError, one line, for a file that was cut short, edited, or is something else."""
        if not self.path.exists():
            return {"rows": [], "runs": []}
        content = sealed.read(self.path)
        for name, wanted in (("kind", KIND), ("format", FORMAT)):
            if content.get(name) != wanted:
                raise ValueError(f"[results] {self.path} expected {name} {wanted}, got "
                                 f"{content.get(name)!r}")
        return {**content, "rows": rows_in(content), "runs": content.get("runs", [])}

    def runs(self) -> Runs:
        """By key and seed."""
        return by_place(self.read()["runs"])

    def add(self, args: argparse.Namespace, run: Run, cases: Iterable[Case]) -> None:
        """Keep a run and renew the rows that it belongs to, of any of the cases."""
        with locked(self.path):
            content = self.read()
            runs = by_place([run, *content["runs"]])  # one that is there already stays
            rows = {(row["recipe"], row.get("key")): row for row in content["rows"]}
            same = [runs[place] for place in sorted(runs) if place[0] == run["key"]]
            for case in cases:
                if key_of(args, case) == run["key"]:
                    row = {**row_of(case, same), "key": run["key"]}
                    rows[case.file.name, run["key"]] = row
                    old = rows.get((case.file.name, None))  # of a file that kept no runs
                    if old is not None and set(old["seeds"]) <= set(row["seeds"]):
                        del rows[case.file.name, None]
            sealed.write(self.path, {
                "kind": KIND, "format": FORMAT, "version": ffengine.__version__,
                "machine": run["machine"],
                "rows": [rows[place] for place in sorted(rows, key=str)],
                "runs": [runs[place] for place in sorted(runs)]})


def by_place(runs: Sequence[Run]) -> Runs:
    return {(run["key"], run["seed"]): run for run in runs}


def rows_in(content: dict[str, Any]) -> list[Row]:
    """Rows of a file, under today's names, each with its paper and machines."""
    rows = []
    for old in content["rows"]:
        row = {RENAMED.get(name, name): value for name, value in old.items()}
        if "paper_runs" not in row:
            row |= {"paper": row["recipe"].partition("-")[0], "machines": [content["machine"]],
                    "paper_runs": len(recipe_files.load(row["recipe"]).train.seeds)}
        rows.append(row)
    return rows
