"""Runs read back for an analysis, their samples, and what an analysis hands back."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ffengine import data
from ffengine.commands.options import (
    Run,
    assignments,
    build_saved,
    device_of,
    found_by,
    load_data,
    saved_data_options,
    saved_options,
)
from ffengine.data.image_set import Splits
from ffengine.engine.run import checkpoint
from ffengine.engine.run.evaluation import Samples
from ffengine.engine.run.settings import PRECISIONS
from ffengine.nn.maps import check_layer
from ffengine.nn.network import LocalNet
from ffengine.ops import backends

#: What a piece's maps may take.
PIECE_BYTES = 64 << 20
#: Layers that a picture shows at most, and shows where none are named.
MOST_LAYERS, SHOWN_LAYERS = 6, 4


@dataclass
class Made:
    """An analysis: files by name, what it found as plain values, and the same for people."""

    files: dict[str, bytes]
    values: dict[str, Any]
    text: str


@dataclass
class Opened:
    """A run with its network, on the device; `splits` loads what it was trained on."""

    name: str
    args: argparse.Namespace
    run: Run
    precision: str
    backend: str
    _splits: list[Splits] = field(default_factory=list)

    @property
    def net(self) -> LocalNet:
        return self.run.net

    @property
    def model(self) -> str:
        return str(self.run.found.meta["model"]["name"])

    @property
    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = self.run.found.meta["settings"]
        return settings

    @property
    def folder(self) -> Path:
        return self.run.found.path.parent

    @property
    def splits(self) -> Splits:
        if not self._splits:
            notes = self.run.notes
            self._splits.append(load_data(
                self.model, notes["data"], saved_options(self.run.found),
                assignments(saved_data_options(notes), "--data-set"), self.settings["seed"],
                self.args.data_root,
                notes.get("classes") if data.own.is_own(notes["data"]) else None))
        return self._splits[0]

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def part(self, split: str, count: int | None = None) -> data.ImageSet:
        """The first `count` samples of train, valid or test."""
        found: data.ImageSet = getattr(self.splits, split)
        if not len(found):
            raise ValueError(f"[analyze] --split expected a part with samples, got {split}")
        if count is not None and not 1 <= count <= len(found):
            raise ValueError(f"[analyze] --samples expected 1 to {len(found)} ({split}), got "
                             f"{count}")
        return found if count is None else found.subset(slice(0, count))

    def samples(self, images: data.ImageSet, *, shuffle: bool = False, epoch: int = 0) -> Samples:
        """Batches of a part, in pieces whose widest layer stays within PIECE_BYTES; shuffled ones,
        to learn from, are as large as the run's."""
        size, dtype = self.settings["batch_size"], PRECISIONS[self.precision]
        rows = size  # with batch statistics pieces would change the scores
        if not self.net.batch_statistics:
            widest = max(math.prod(shape) for shape in self.net.shapes) * dtype.itemsize
            rows = max(1, min(512, PIECE_BYTES // (4 * widest)))
        loader = data.loader(images, batch_size=min(size if shuffle else rows, len(images)),
                             shuffle=shuffle, seed=self.settings["seed"], epoch=epoch,
                             device=self.device)
        return Samples(loader, self.device, dtype, rows)

    @property
    def classes(self) -> list[str]:
        return self.run.notes.get("classes") or [str(k) for k in range(self.net.num_classes)]

    @property
    def title(self) -> str:
        return (f"{self.model} on {self.run.notes.get('data_label', self.run.notes['data'])}, "
                f"{self.run.found.meta['position']['epoch']} epochs")


def open_one(args: argparse.Namespace, path: str | None = None) -> Opened:
    """A run of `ffengine train`, weights loaded; ValueError for any other."""
    folder = args.runs[0] if path is None else path
    found = found_by(args, folder)
    net = build_saved(found)
    checkpoint.load_network(found, net)
    if "data" not in found.meta["notes"]:
        raise ValueError(f"[checkpoint] expected a run of `ffengine train`, got {found.path}")
    precision = args.precision or found.meta["settings"]["precision"]
    device, backend = device_of(args), args.backend or "auto"
    backends.resolve("analyze", backend, device.type, PRECISIONS[precision])
    if precision == "fp64":
        net = net.to(torch.float64)
    return Opened(str(folder), args, Run(found, net.to(device).eval()), precision, backend)


def open_all(args: argparse.Namespace, paths: Sequence[str] | None = None) -> list[Opened]:
    return [open_one(args, path) for path in (args.runs if paths is None else paths)]


def same_architecture(runs: Sequence[Opened]) -> None:
    """ValueError naming the first thing in which two of the runs' networks differ."""
    first = checkpoint.architecture(runs[0].net)
    for other in runs[1:]:
        theirs = checkpoint.architecture(other.net)
        for key in (*first, *theirs):
            if first.get(key) != theirs.get(key):
                raise ValueError(f"[analyze] expected runs of one architecture, got {key} "
                                 f"{_short(first.get(key))} in {runs[0].name} and "
                                 f"{_short(theirs.get(key))} in {other.name}")


def _short(value: Any) -> str:
    return str(value[0]) if isinstance(value, list) and value else str(value)


def same_data(runs: Sequence[Opened]) -> None:
    """ValueError where two runs were trained on different data."""
    for other in runs[1:]:
        mine, theirs = runs[0].run.notes["data"], other.run.notes["data"]
        if mine != theirs:
            raise ValueError(f"[analyze] expected runs on the same data, got {mine} in "
                             f"{runs[0].name} and {theirs} in {other.name}")


def chosen_layers(net: LocalNet, named: Sequence[int] | None) -> list[int]:
    """Layers that a picture shows: those named, else up to SHOWN_LAYERS, first and last in them."""
    depth = len(net.layers)
    if named:
        if len(named) > MOST_LAYERS or len(set(named)) < len(named):
            raise ValueError(f"[analyze] --layers expected up to {MOST_LAYERS} that differ, got "
                             f"{list(named)}")
        return [check_layer(net, i) for i in named]
    count = min(depth, SHOWN_LAYERS)
    return sorted({round(i * (depth - 1) / max(count - 1, 1)) for i in range(count)})


def labels_of(runs: Sequence[Opened]) -> list[str]:
    """A short name a run for legends: its folder's, as much of the path as tells them apart."""
    paths = [Path(os.path.abspath(r.folder)) for r in runs]
    for depth in range(1, max(len(p.parts) for p in paths)):
        names = ["/".join(p.parts[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    return [r.name for r in runs]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """A CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def plain(value: Any) -> Any:
    """Numbers that are not finite as None, for JSON and for a page."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def report_of(run: Opened) -> dict[str, Any]:
    """What `ffengine train` wrote of the run, if it is of the checkpoint's epoch; else nothing."""
    try:
        found = json.loads((run.folder / "report.json").read_text())
    except (OSError, ValueError):
        return {}
    done = run.run.found.meta["position"]["epoch"]
    return dict(found) if isinstance(found, dict) and found.get("epochs_in_all") == done else {}
