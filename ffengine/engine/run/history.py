"""What an epoch left: sums gathered on the device, one row of history, CSV and TensorBoard."""

from __future__ import annotations

import csv
import functools
import io
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ffengine.engine.context import BatchReport
from ffengine.engine.run.checkpoint import write_atomically

Numbers = dict[str, float | int | None]

log = logging.getLogger("ffengine")
LOSS = re.compile(r"loss_\d+")
#: What callbacks gave of single steps.
STEPS = "steps.csv"


@dataclass
class Row:
    """One epoch. Accuracies lie in [0, 1]; peak_bytes is of a training step.

    train_accuracy: of classes, as the epoch's samples passed (of super-classes while a layer trains
        on those). Where positive and negative rows train, of the first thousand training samples
        after the epoch, every label tried; None if the loader cannot show them again.
    pair_accuracy: pairs whose positive row had the better goodness as they passed, else None.
    extra: further columns, of callbacks.
    """

    epoch: int
    lr: float
    loss: float
    losses: list[float]
    train_accuracy: float | None
    valid_accuracy: float | None
    seconds: float
    images_per_second: float
    peak_bytes: int
    sip_start: int
    sip_end: int
    pair_accuracy: float | None = None
    extra: dict[str, float | None] = field(default_factory=dict)

    def flat(self) -> Numbers:
        """Columns of the CSV: a column per layer's loss."""
        return {**self.own(), **{f"loss_{i}": v for i, v in enumerate(self.losses)}, **self.extra}

    def own(self) -> Numbers:
        """The columns that every run has."""
        return {k: v for k, v in vars(self).items() if k not in ("losses", "extra")}


class EpochSums:
    """Losses and hits of an epoch so far; they stay on the device until they are read."""

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        saved = saved or {}
        self.samples = int(saved.get("samples", 0))
        #: Hits are of pairs, not of classes.
        self.pairs = bool(saved.get("pairs", False))
        self._losses: torch.Tensor | None = None
        self._hits: torch.Tensor | None = None
        if saved.get("losses") is not None:
            self._losses = torch.tensor(saved["losses"], dtype=torch.float64)
            self._hits = torch.tensor(int(saved["hits"]))

    def add(self, report: BatchReport, y: torch.Tensor, hits: torch.Tensor,
            pairs: bool = False) -> None:
        """One step on samples with labels y, of which `hits` were right."""
        n, self.pairs = y.shape[0], pairs
        losses = torch.stack([torch.zeros((), device=y.device) if loss is None else loss
                              for loss in report.losses]).double() * n
        self._losses = losses if self._losses is None else self._losses.to(losses.device) + losses
        self._hits = hits if self._hits is None else self._hits.to(hits.device) + hits
        self.samples += n

    def losses(self) -> list[float]:
        """Mean loss per layer."""
        if self._losses is None:
            return []
        return [float(v) / max(self.samples, 1) for v in self._losses.tolist()]

    def accuracy(self) -> float:
        return 0.0 if self._hits is None else int(self._hits) / max(self.samples, 1)

    def export(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint within an epoch."""
        if self._losses is None or self._hits is None:
            return {}
        return {"samples": self.samples, "losses": self._losses.tolist(), "hits": int(self._hits),
                "pairs": self.pairs}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@functools.cache
def event_writer() -> Callable[..., Any] | None:
    """torch's writer of TensorBoard events; None, said once, where tensorboard is not there."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning("[history] TensorBoard events need tensorboard (pip install tensorboard); "
                    "history.csv has the same numbers")
        return None
    return SummaryWriter


class History:
    """Rows in memory; with a folder also history.csv and, with tensorboard, its events.

    Args:
        folder: run folder, or None.
        before: when a run goes on, keep the rows of epochs below this one; None starts afresh.
        steps: when a run goes on, keep what callbacks gave of the steps below this one.

    Attributes:
        rows: the epochs' rows.
        steps: what callbacks gave of steps: rows of epoch, step and their columns; with a folder
            those of the epoch under way alone, the others lie in its steps.csv.
    """

    def __init__(self, folder: Path | None = None, before: int | None = None,
                 steps: int = 0) -> None:
        self.folder = folder
        self.rows: list[Row] = []
        self.steps: list[dict[str, Any]] = []
        self._writer: Any = None
        if folder is not None and before is not None:
            self.rows = [r for r in read_rows(folder / "history.csv") if r.epoch < before]
            kept = [r for r in read_steps(folder / STEPS) if int(r["step"]) < steps]
            if kept:
                write_table(folder / STEPS, kept)
        self._afresh = before is None

    def add(self, row: Row) -> None:
        """Append an epoch; the CSV is replaced whole, so it never ends in half a row."""
        self.rows.append(row)
        self.keep_steps()
        if self.folder is None:
            return
        write_table(self.folder / "history.csv", [r.flat() for r in self.rows])
        self._to_tensorboard(row.epoch, {
            **{f"epoch/{k}": v for k, v in row.own().items() if k != "epoch"},
            **{f"layers/loss_{i}": v for i, v in enumerate(row.losses)},
            **{f"epoch_{tag(k)}": v for k, v in row.extra.items()}})

    def add_step(self, epoch: int, step: int, numbers: Mapping[str, Any]) -> None:
        """Append what callbacks gave of a step; what lies on the device stays there for now."""
        if numbers:
            self.steps.append({"epoch": epoch, "step": step, **numbers})

    def keep_steps(self) -> None:
        """Read the steps' numbers, and put them into steps.csv and TensorBoard."""
        new: list[dict[str, Any]] = [
            {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in row.items()}
            for row in self.steps]
        self.steps = new
        if self.folder is None or not new:
            return
        path = self.folder / STEPS
        write_table(path, [*([] if self._afresh else read_steps(path)), *new])
        self._afresh = False
        for row in new:
            self._to_tensorboard(int(row["step"]), {
                f"step_{tag(k)}": v for k, v in row.items() if k not in ("epoch", "step")})
        self.steps = []

    def _to_tensorboard(self, at: int, numbers: Mapping[str, float | None]) -> None:
        make = event_writer()
        if make is None:
            return
        try:
            if self._writer is None:
                self._writer = make(str(self.folder), purge_step=at)
            for name, value in numbers.items():
                if value is not None:
                    self._writer.add_scalar(name, value, at)
            self._writer.flush()
        except OSError as error:  # a reader of events passes over the record that was cut short
            raise OSError(f"[files] expected to write TensorBoard events into {self.folder}, got: "
                          f"{error.strerror or error}") from error

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def tag(column: str) -> str:
    """TensorBoard's name of a column: separation_3 -> separation/3, one chart for all layers."""
    name, _, layer = column.rpartition("_")
    return f"{name}/{layer}" if name and layer.isdigit() else f"{column}/all"


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV of the rows' columns, in the order in which they first appear."""
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_steps(path: Path) -> list[dict[str, str]]:
    """Rows of a steps.csv as they stand; none if there is no file."""
    with _damage_named(path):
        if not path.exists():
            return []
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            int(row["step"])
        return rows


def read_rows(path: Path) -> list[Row]:
    """Rows of a history.csv; none if there is no file."""
    with _damage_named(path):
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return [_row(record) for record in csv.DictReader(file)]


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """ValueError naming a table that is not one of a run's."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(f"[history] expected the table of a run, got an error ({error}) in "
                         f"{path}") from None


def _row(record: dict[str, str]) -> Row:
    def number(name: str) -> float | None:
        return float(record[name]) if record.get(name) else None

    losses = [float(v) for k, v in record.items() if LOSS.fullmatch(k) and v]
    known = {f.name for f in fields(Row)}
    extra = {k: number(k) for k in record if k not in known and not LOSS.fullmatch(k)}
    return Row(int(record["epoch"]), float(record["lr"]), float(record["loss"]), losses,
               number("train_accuracy"), number("valid_accuracy"),
               float(record["seconds"]), float(record["images_per_second"]),
               int(record["peak_bytes"]), int(record["sip_start"]), int(record["sip_end"]),
               number("pair_accuracy"), extra)
