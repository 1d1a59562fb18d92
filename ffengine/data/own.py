"""One's own data by name: `folder:PATH`, `npz:PATH`, `csv:PATH`.

folder: train/CLASS/ and test/CLASS/ (and valid/ or val/), or a folder per class alone; PNG, JPEG,
BMP (see `pictures`). npz: x_train, y_train, x_test, y_test, or x and y; csv: a file, or a folder
with train.csv and test.csv, rows of numbers and a label column (see `numbers`). Options:

test: of one set that is to be split, the share or number of test samples, or "all"; default 0.2.
    They are the same whatever the seed.
channels (folder): 1 or 3; default: 3 where some image has colour.
label (csv): the label column's name or number.
shape (npz, csv): (C, H, W) of a row; default: see `numbers.shape_of`.
range (npz, csv): the (low, high) that stand for 0 and 1, each a number or one a channel; default:
    (0, 255) for bytes, (0, 1) for numbers within, else those of the training samples.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ffengine.data import numbers, pictures
from ffengine.data.image_set import ImageSet, Splits
from ffengine.data.scale import SET, Constants, constants
from ffengine.data.sizes import resize
from ffengine.data.split import stratified

_OPTIONS = {"folder": ("test", "channels"), "npz": ("test", "shape", "range"),
            "csv": ("test", "label", "shape", "range")}
FORMS = tuple(f"{kind}:PATH" for kind in _OPTIONS)
TEST_SHARE, VALID_SHARE = 0.2, 0.1
#: A split is drawn of these, "train" alone where the others are folders or arrays of their own.
PARTS = ("train", "valid", "test")
_CHUNK = 1 << 24  # numbers whose statistics are taken at once
Range = tuple[tuple[float, ...], tuple[float, ...]]


def is_own(name: str) -> bool:
    kind, _, path = name.partition(":")
    return kind in _OPTIONS and bool(path)


def options_of(name: str) -> tuple[str, ...]:
    return _OPTIONS[name.partition(":")[0]]


def place(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """PATH, absolute: below `root` where one is given, else below the current folder."""
    return Path(os.path.abspath(Path(root or ".") / Path(name.partition(":")[2]).expanduser()))


def settled(name: str, root: str | os.PathLike[str] | None = None) -> str:
    """The name that means the same in any folder."""
    return f"{name.partition(':')[0]}:{place(name, root)}" if is_own(name) else name


def slug(name: str) -> str:
    """A word for file names."""
    return f"{name.partition(':')[0]}-{place(name).stem}" if is_own(name) else name


def label(name: str, root: str | os.PathLike[str] | None = None) -> str:
    """What results on it are called: its name, or a known copy's (see `pictures.Folder`)."""
    if name.startswith("folder:"):
        return pictures.folder(place(name, root)).label or name
    return name


def holds_images(name: str, root: str | os.PathLike[str] | None = None) -> bool:
    """Whether samples are images to resize, rather than rows of numbers; from headers alone."""
    kind, path = name.partition(":")[0], place(name, root)
    if kind == "npz" and path.exists():
        return any(len(shape) > 2 for shape in numbers.headers(path).values())
    return kind == "folder"


def load(name: str, *, root: str | os.PathLike[str] | None = None,
         image_size: int | tuple[int, int] | None = None, seed: int = 0, valid: int | None = None,
         normalize: Any = SET, classes: Sequence[str] | None = None, test: Any = None,
         **options: Any) -> Splits:
    """The data set, decoded and checked whole; see `loading.load` and above.

    Raises ValueError in one line: what a file cannot be read for, a class without images, a class
        of the test or validation part that training lacks.
    """
    kind, path = name.partition(":")[0], place(name, root)
    found: pictures.Folder | numbers.Table = pictures.folder(path) if kind == "folder" else (
        numbers.table(kind, path, options.pop("label", None)))
    known = _classes(found.names) if classes is None else tuple(map(str, classes))
    labels = _labels(path, found.names, known, given=classes is not None)
    rows = rows_of(labels, test, valid, seed)
    order = torch.cat([rows[part] for part in PARTS]).numpy()
    if isinstance(found, pictures.Folder):
        files = [file for part in found.files.values() for file in part]
        images = pictures.decode([files[i] for i in order], image_size=image_size, **options)
        settled = {"channels": images.shape[1]}
        ends = None
    else:
        values = np.concatenate(list(found.values.values()))[order]
        count = len(rows["train"])
        images, ends, settled = _shaped(path, values, values[:count] if count else values,
                                        **options)
        if image_size is not None:
            images = _resized(path, images, image_size)
    every = torch.cat(list(labels.values()))[torch.from_numpy(order)]
    return splits_of(name, images, every, [len(rows[part]) for part in PARTS], normalize, ends,
                   len(known), known, settled, getattr(found, "label", None))


def _classes(names: dict[str, list[str]]) -> tuple[str, ...]:
    """Of the training samples, sorted; as numbers where all of them are."""
    found = set(next(iter(names.values())))
    numeric = all(name.lstrip("-").isdecimal() for name in found)
    return tuple(sorted(found, key=(lambda n: (int(n), n)) if numeric else (lambda n: (0, n))))


def _labels(path: Path, names: dict[str, list[str]], known: tuple[str, ...], given: bool
            ) -> dict[str, Tensor]:
    """int64 labels by split; ValueError for a class that is not among the known ones."""
    if len(known) < 2:
        raise ValueError(f"[data] {path}: expected two or more classes, got "
                         f"{', '.join(known) or 'none'}")
    number = {name: i for i, name in enumerate(known)}
    for part, found in names.items():
        for name in found:
            if name not in number:
                shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
                whose = "the run's" if given else "the training samples'"
                raise ValueError(f"[data] {path}: expected in {part} {whose} classes ({shown}), "
                                 f"got {name!r}")
    return {part: torch.tensor([number[name] for name in found], dtype=torch.int64)
            for part, found in names.items()}


def rows_of(labels: dict[str, Tensor], test: Any, valid: int | None, seed: int
          ) -> dict[str, Tensor]:
    """Rows of the samples of all splits one after the other, for each of PARTS."""
    ends = np.cumsum([0, *map(len, labels.values())]).tolist()
    rows = {part: torch.arange(a, b) for part, a, b in zip(labels, ends, ends[1:], strict=False)}
    every = torch.cat(list(labels.values()))
    if "all" in rows:
        whole = rows.pop("all")
        count = _count(TEST_SHARE if test is None else test, len(whole))
        kept, out = stratified(every, count, seed=0)
        rows |= {"train": whole[kept], "test": whole[out]}
    elif test not in (None, "all"):
        raise ValueError(f"[data] test expected nothing beside a test part of its own, got {test}")
    train = rows["train"]
    if "valid" not in rows:
        held = int(VALID_SHARE * len(train)) if valid is None else valid
        if held and held >= len(train):
            raise ValueError(f"[data] valid must leave some of the {len(train)} training samples, "
                             f"got {held}")
        none = torch.empty(0, dtype=torch.int64)
        kept, out = stratified(every[train], held, seed) if held else (
            torch.arange(len(train)), none)
        rows |= {"train": train[kept], "valid": train[out]}
    elif valid is not None:
        raise ValueError(f"[data] valid expected nothing beside a validation part of its own, got "
                         f"{valid}")
    return rows


def _count(test: Any, total: int) -> int:
    """Samples that `test` asks for."""
    if test == "all":
        return total
    good = isinstance(test, (int, float)) and not isinstance(test, bool) and test > 0
    count = 0 if not good else round(test * total) if test < 1 else int(test)
    if not good or count != (round(test * total) if test < 1 else test) or not 0 < count < total:
        raise ValueError("[data] test expected a share in 0..1, a number that leaves some of the "
                         f"{total} samples for training, or all; got {test!r}")
    return count


def _shaped(path: Path, values: numbers.Array, train: numbers.Array, shape: Any = None,
            range: Any = None) -> tuple[Tensor, Range | None, dict[str, Any]]:
    """(images as ImageSet has them, what stands for 0 and 1 in them, both options as resolved)."""
    sizes = numbers.shape_of(train) if values.ndim == 2 else (
        values.shape[1:] if values.ndim == 4 else (1, *values.shape[1:]))
    if shape is not None:
        sizes = tuple(shape) if isinstance(shape, (tuple, list)) else ()
        width = math.prod(values.shape[1:])
        good = len(sizes) == 3 and all(isinstance(v, int) and v > 0 for v in sizes)
        if not good or math.prod(sizes) != width:
            raise ValueError(f"[data] {path}: shape expected (C, H, W) of {width} numbers, got "
                             f"{shape!r}")
    images = values.reshape(-1, *sizes)
    low, high = _range(train.reshape(-1, *sizes)) if range is None else _given(range, sizes[0])
    kept = {"shape": tuple(int(v) for v in sizes), "range": (low, high)}
    return *stored(images, (low, high)), kept


def stored(images: numbers.Array, ends: Range) -> tuple[Tensor, Range | None]:
    """(N, C, H, W) as an `ImageSet` keeps them, in which the ends stand for 0 and 1: bytes, where
    they are whole numbers of 0..255 (then None), else float32.
    """
    plain = set(ends[0]) == {0.0} and set(ends[1]) == {255.0} and numbers.whole_bytes(images)
    made = torch.from_numpy(np.ascontiguousarray(images, np.uint8 if plain else np.float32))
    return made, None if plain else ends


def _range(train: numbers.Array) -> Range:
    """What stands for 0 and 1 in each channel of (N, C, H, W)."""
    channels = train.shape[1]
    image = train.shape[2] * train.shape[3] > 1 or train.dtype == np.uint8
    if numbers.unit(train):
        return (0.0,) * channels, (1.0,) * channels
    if image and numbers.whole_bytes(train):
        return (0.0,) * channels, (255.0,) * channels
    low, high = train.min((0, 2, 3)).astype(float), train.max((0, 2, 3)).astype(float)
    # a column of one value has no range to divide by
    return tuple(low.tolist()), tuple(np.where(high > low, high, low + 1).tolist())


def _given(pair: Any, channels: int) -> Range:
    try:
        low, high = (tuple(map(float, half)) if isinstance(half, (tuple, list)) else (
            (float(half),) * channels) for half in pair)
        good = len(low) == len(high) == channels and all(
            np.isfinite([a, b]).all() and a < b for a, b in zip(low, high, strict=True))
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError("[data] range expected (low, high), each a number or one for each of the "
                         f"{channels} channels, low below high, got {pair!r}")
    return low, high


def _resized(path: Path, images: Tensor, size: int | tuple[int, int]) -> Tensor:
    made = resize(images, size)
    if made is not images and images.shape[2] * images.shape[3] == 1:
        raise ValueError(f"[data] {path}: image_size expected images, got rows of "
                         f"{images.shape[1]} numbers; shape=(C, H, W) says what they show")
    return made


def splits_of(name: str, images: Tensor, labels: Tensor, counts: Sequence[int], normalize: Any,
            ends: Range | None, num_classes: int, classes: tuple[str, ...] | None,
            settled: dict[str, Any], title: str | None) -> Splits:
    """Slices of one store, so that what is mapped from a file is never copied."""
    constant = constants(normalize, *_statistics(images[:counts[0]], ends))
    shift, scale = composed(*constant, ends)
    bounds = np.cumsum([0, *counts]).tolist()
    train, held_out, test = (ImageSet(images[a:b], labels[a:b], shift, scale)
                             for a, b in pairwise(bounds))
    return Splits(name, train, held_out, test, num_classes, train.shape, classes, title or name,
                  {**settled, "normalize": constant})


def composed(mean: tuple[float, ...], std: tuple[float, ...], ends: Range | None) -> Constants:
    """mean, std of an `ImageSet` whose stored `ends` stand for the 0 and 1 of those given; with
    None it takes what it stores to [0, 1] by itself.
    """
    if ends is None:
        return mean, std
    low, high = ends
    spans = [b - a for a, b in zip(low, high, strict=True)]
    return (tuple(a + m * s for a, m, s in zip(low, mean, spans, strict=True)),
            tuple(d * s for d, s in zip(std, spans, strict=True)))


def _statistics(images: Tensor, ends: Range | None) -> Constants:
    """Mean and standard deviation per channel, in [0, 1]."""
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    low, high = torch.tensor(ends or ((0.0,), (unit,)), dtype=torch.float64)[..., None, None]
    total = square = torch.zeros(images.shape[1], dtype=torch.float64)
    rows = max(1, _CHUNK // math.prod(images.shape[1:]))
    for start in range(0, len(images), rows):
        scaled = (images[start:start + rows].to(torch.float64) - low) / (high - low)
        total = total + scaled.sum((0, 2, 3))
        square = square + scaled.square().sum((0, 2, 3))
    count = max(images[:, 0].numel(), 1)
    mean = total / count
    spread = (square / count - mean.square()).clamp_(min=0).sqrt()
    # a channel of one value has no spread to divide by
    return tuple(mean.tolist()), tuple(s if s > 1e-6 else 1.0 for s in spread.tolist())
