"""`ffengine predict`: what a trained run takes files for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ffengine import data
from ffengine.commands.options import Run, assignments, device_of, open_run, saved_data_options
from ffengine.data import builtin, numbers, own, pictures, scale, sizes
from ffengine.data.catalog import SOURCES
from ffengine.engine.run.evaluation import samples_of
from ffengine.engine.trainer import Trainer

ROWS = (".npz", ".csv")


def run_predict(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    run = open_run(args)
    if "data" not in run.notes:
        raise ValueError(f"[checkpoint] expected a run of `ffengine train`, got {run.found.path}")
    options = assignments(saved_data_options(run.notes), "--data-set")
    saved, names = run.found.meta["settings"], class_names(run)
    parts = list(inputs(args, run, options))
    trainer = Trainer(run.net, batch_size=saved["batch_size"], backend=args.backend or "auto",
                      precision=args.precision or saved["precision"], device=device_of(args),
                      progress=False)
    rows: list[dict[str, Any]] = []
    for what, images in parts:
        loader = data.loader(images, batch_size=saved["batch_size"], device=trainer.device)
        scores = torch.cat([run.net.scores(x, backend=trainer.backend).float().cpu()
                            for x, _ in samples_of(trainer, loader)])
        rows += [{"file": file, **({} if row is None else {"row": row}), "label": int(s.argmax()),
                  "class": names[int(s.argmax())], "scores": s.tolist()}
                 for (file, row), s in zip(what, scores, strict=True)]
    text = "\n".join(" ".join([r["file"], *([f"row {r['row']}"] if "row" in r else ()),
                               "", r["class"]]) for r in rows)
    return text, {"checkpoint": str(run.found.path), "classes": names, "predictions": rows}


def class_names(run: Run) -> list[str]:
    return run.notes.get("classes") or [str(i) for i in range(run.net.num_classes)]


def inputs(args: argparse.Namespace, run: Run, options: dict[str, Any]
           ) -> Iterator[tuple[list[tuple[str, int | None]], data.ImageSet]]:
    """(file and row of each sample, the samples as the network takes them)."""
    places = [Path(word) for word in args.files]
    for place in places:
        if not place.exists():
            raise FileNotFoundError(f"[cli] predict expected images, folders of them, .csv or .npz "
                                    f"files, {place} is not there")
    files = pictures.images_of([p for p in places if p.suffix.lower() not in ROWS])
    channels, *sides = run.net.in_shape
    if files:
        if channels not in (1, 3):
            raise ValueError(f"[cli] predict expected rows of {channels} numbers for this network, "
                             f"got the image {files[0]}")
        found = pictures.decode(files, channels=channels, image_size=(sides[0], sides[1]))
        yield [(str(f), None) for f in files], scaled(found, None, run, options)
    for place in (p for p in places if p.suffix.lower() in ROWS):
        values = rows_of(place, run, options)
        highest = 255.0 if values.dtype == np.uint8 else 1.0
        ends = options.get("range", ((0.0,) * channels, (highest,) * channels))
        yield ([(str(place), i) for i in range(len(values))],
               scaled(*own.stored(values, ends), run, options))


def rows_of(path: Path, run: Run, options: dict[str, Any]) -> numbers.Array:
    """(N, C, H, W) of a csv of numbers, or of array x of an npz, as the run's data were."""
    shape = tuple(options.get("shape", run.net.in_shape))
    if path.suffix.lower() == ".csv":
        return numbers.numbers_only(path, int(np.prod(shape))).reshape(-1, *shape)
    known = numbers.headers(path)
    key = next((k for k in known if k.lower() in ("x", "images", "data", "x_test", "test_images")),
               None)
    if key is None:
        raise ValueError(f"[cli] predict expected an array x (or images) in {path}, got "
                         f"{', '.join(known) or 'none'}")
    values = numbers.array(path, key)
    found = values[:, None] if values.ndim == 3 else values
    if found.ndim == 2 and found.shape[1] == np.prod(shape):
        found = found.reshape(-1, *shape)
    if found.shape[1] != shape[0]:
        raise ValueError(f"[cli] predict expected samples of {shape} in {path}, got "
                         f"{values.shape[1:]}")
    return np.ascontiguousarray(found)


def scaled(images: torch.Tensor, ends: Any, run: Run, options: dict[str, Any]) -> data.ImageSet:
    """At the network's size, scaled as in training; `ends` stand for 0 and 1 in numbers."""
    channels, *sides = run.net.in_shape
    images = sizes.resize(images, (sides[0], sides[1]))
    mean, std = scale.constants(options["normalize"], *known_scale(run, channels))
    labels = torch.zeros(len(images), dtype=torch.int64)
    return data.ImageSet(images, labels, *own.composed(mean, std, ends))


def known_scale(run: Run, channels: int) -> scale.Constants:
    """Of the run's data set; only runs from before they kept it need the set's own."""
    name = run.notes["data"]
    if name == "digits":
        return builtin.DIGITS_MEAN, builtin.DIGITS_STD
    if name in SOURCES:
        return SOURCES[name].mean, SOURCES[name].std
    return (0.0,) * channels, (1.0,) * channels
