"""What an epoch left: sums gathered on the device, one row of history, CSV and TensorBoard."""

from __future__ import annotations

import csv
import functools
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ffengine.engine.context import BatchReport
from ffengine.engine.run.checkpoint import write_atomically

Numbers = dict[str, float | int | None]

log = logging.getLogger("ffengine")


@dataclass
class Row:
    """One epoch. Accuracies lie in [0, 1]; peak_bytes is of a training step.

    train_accuracy: of classes, as the epoch's samples passed (of super-classes while a layer trains
        on those). Where positive and negative rows train, of the first thousand training samples
        after the epoch, every label tried; None if the loader cannot show them again.
    pair_accuracy: pairs whose positive row had the better goodness as they passed, else None.
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

    def flat(self) -> Numbers:
        """Columns of the CSV: a column per layer's loss."""
        numbers = asdict(self)
        losses = numbers.pop("losses")
        return {**numbers, **{f"loss_{i}": v for i, v in enumerate(losses)}}


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
    """

    def __init__(self, folder: Path | None = None, before: int | None = None) -> None:
        self.folder = folder
        self.rows: list[Row] = []
        self._writer: Any = None
        if folder is not None and before is not None:
            self.rows = [r for r in read_rows(folder / "history.csv") if r.epoch < before]

    def add(self, row: Row) -> None:
        """Append an epoch; the CSV is replaced whole, so it never ends in half a row."""
        self.rows.append(row)
        if self.folder is None:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, list(row.flat()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(r.flat() for r in self.rows)
        write_atomically(self.folder / "history.csv", text.getvalue().encode())
        self._to_tensorboard(row)

    def _to_tensorboard(self, row: Row) -> None:
        make = event_writer()
        if make is None:
            return
        if self._writer is None:
            self._writer = make(str(self.folder), purge_step=row.epoch)
        for name, value in row.flat().items():
            if name != "epoch" and value is not None:
                group = "layers" if name.startswith("loss_") else "epoch"
                self._writer.add_scalar(f"{group}/{name}", value, row.epoch)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def read_rows(path: Path) -> list[Row]:
    """Rows of a history.csv; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [_row(record) for record in csv.DictReader(file)]


def _row(record: dict[str, str]) -> Row:
    def accuracy(name: str) -> float | None:
        return float(record[name]) if record.get(name) else None

    losses = [float(v) for k, v in record.items() if k.startswith("loss_")]
    return Row(int(record["epoch"]), float(record["lr"]), float(record["loss"]), losses,
               accuracy("train_accuracy"), accuracy("valid_accuracy"),
               float(record["seconds"]), float(record["images_per_second"]),
               int(record["peak_bytes"]), int(record["sip_start"]), int(record["sip_end"]),
               accuracy("pair_accuracy"))
