"""Rows of numbers and images in arrays: .csv files with a label column, .npz files."""

from __future__ import annotations

import csv
import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

#: A label column that needs no --data-set label=, in any case.
LABELS = ("label", "class", "target", "y")
#: Names of (samples, labels) in an npz: those of Keras, MedMNIST and scikit-learn; {} is the split.
_SPLIT_KEYS = (("x_{}", "y_{}"), ("{}_images", "{}_labels"), ("{}_x", "{}_y"))
_WHOLE_KEYS = (("x", "y"), ("images", "labels"), ("data", "target"), ("data", "labels"))
_PARTS = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}
_IMAGE_NUMBERS = 64  # fewer numbers a row are hardly a square image


@dataclass(frozen=True)
class Table:
    """Samples by split, (N, D), (N, H, W) or (N, C, H, W), finite, and the names of their classes.

    Splits are "train", "valid", "test", or "all" of what is to be split.
    """

    path: Path
    values: dict[str, Array]
    names: dict[str, list[str]]


def table(kind: str, path: Path, label: str | int | None = None) -> Table:
    """An npz or csv: of one file, or of a folder with train.csv and test.csv.

    Raises ValueError in one line for anything that is no finite number, a label column that is
    not there, pickled objects; FileNotFoundError for the path.
    """
    if not path.exists():
        raise FileNotFoundError(f"[data] {kind}: expected a file, {path} is not there")
    if kind == "npz":
        return _npz(path)
    names = {"train": path / "train.csv", "test": path / "test.csv"} if path.is_dir() else {
        "all": path}
    for file in names.values():
        if not file.is_file():
            raise FileNotFoundError(f"[data] csv: expected train.csv and test.csv in {path}, "
                                    f"{file.name} is not there")
    read = {part: read_csv(file, label) for part, file in names.items()}
    widths = {part: values.shape[1] for part, (values, _) in read.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"[data] {path}: expected as many numbers a row in test.csv as the "
                         f"{widths['train']} in train.csv, got {widths['test']}")
    return Table(path, {part: values for part, (values, _) in read.items()},
                 {part: labels for part, (_, labels) in read.items()})


def read_csv(path: Path, label: str | int | None) -> tuple[Array, list[str]]:
    """(float32 (N, D), the labels as they are written); a first line of names may be there.

    label: the label column's name, or its number from 0 (-1 is the last); default is a column
        called label, class, target or y.
    """
    rows = _lines(path)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"[data] {path}: expected rows of numbers with a label column, got an "
                         "empty file")
    column, header = _label_column(path, first[1], label)
    named = first[1] if header else [str(i) for i in range(len(first[1]))]
    found: list[Array] = []
    labels = []
    for line, cells in rows if header else chain([first], rows):
        if len(cells) != len(named):
            raise ValueError(f"[data] {path}, line {line}: expected {len(named)} cells, got "
                             f"{len(cells)}")
        if not cells[column]:
            raise ValueError(f"[data] {path}, line {line}: expected a label in column "
                             f"{named[column]!r}, got an empty cell")
        labels.append(cells[column])
        found.append(_numbers(path, line, cells, named, column))
    if not found:
        raise ValueError(f"[data] {path}: expected rows of numbers, got the names of columns alone")
    return np.stack(found), labels


def numbers_only(path: Path, width: int) -> Array:
    """float32 (N, width) of a csv to predict for; a label column, called so, is left out."""
    first = next(_lines(path), None)
    cells = [] if first is None else first[1]
    if len(cells) == width + 1:
        return read_csv(path, None)[0]
    if len(cells) != width:
        raise ValueError(f"[data] {path}: expected {width} numbers a row, got {len(cells)}")
    header = not all(map(_is_number, cells))
    named = cells if header else [str(i) for i in range(width)]
    found = [_numbers(path, line, row, named, None)
             for i, (line, row) in enumerate(_lines(path)) if i or not header]
    if not found:
        raise ValueError(f"[data] {path}: expected rows of numbers, got the names of columns alone")
    return np.stack(found)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, stripped cells) of what is not blank."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for cells in reader:
                if cells:
                    yield reader.line_num, [cell.strip() for cell in cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"[data] {path}: expected a csv file in UTF-8, got an error ({error})"
                         ) from None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _label_column(path: Path, first: Sequence[str], label: str | int | None) -> tuple[int, bool]:
    """(the label column's number, whether the first line names columns)."""
    if isinstance(label, int) and not isinstance(label, bool):
        if not -len(first) <= label < len(first):
            raise ValueError(f"[data] {path}: expected a label column in 0..{len(first) - 1}, got "
                             f"label={label}")
        column = label % len(first)
        return column, not all(_is_number(c) for i, c in enumerate(first) if i != column)
    wanted = LABELS if label is None else (str(label),)
    found = [i for i, cell in enumerate(first)
             if cell in wanted or (label is None and cell.lower() in wanted)]
    if not found:
        shown = ", ".join(first[:8]) + (", ..." if len(first) > 8 else "")
        more = "label=NAME, or label=NUMBER of the column where the first line names none"
        raise ValueError(f"[data] {path}: expected a label column called {' or '.join(wanted)}"
                         f"{f' ({more})' if label is None else ''}, got {shown}")
    return found[0], True


def _numbers(path: Path, line: int, cells: Sequence[str], named: Sequence[str],
             label: int | None) -> Array:
    """float32 (D,) of a row without its label; ValueError naming the cell that is no number."""
    kept = [cell for i, cell in enumerate(cells) if i != label]
    try:
        with np.errstate(over="ignore"):  # what overflows is not finite
            values = np.array(kept, np.float32)
    except ValueError:
        values = None
    if values is not None and len(cells) == len(named) and np.isfinite(values).all():
        return values
    for name, cell in zip((n for i, n in enumerate(named) if i != label), kept, strict=False):
        if not _is_number(cell) or not abs(float(cell)) <= float(np.finfo(np.float32).max):
            raise ValueError(f"[data] {path}, line {line}, column {name!r}: expected a finite "
                             f"number, got {cell!r}")
    raise ValueError(f"[data] {path}, line {line}: expected {len(named)} numbers, got "
                     f"{len(cells)}")


def _npz(path: Path) -> Table:
    known = headers(path)
    lower = {key.lower(): key for key in known}

    def pair(patterns: Sequence[tuple[str, str]], word: str = "") -> tuple[str, str] | None:
        for x, y in patterns:
            if x.format(word) in lower and y.format(word) in lower:
                return lower[x.format(word)], lower[y.format(word)]
        return None

    found = {part: keys for part, words in _PARTS.items() for word in words
             if (keys := pair(_SPLIT_KEYS, word))}
    whole = pair(_WHOLE_KEYS)
    if "train" not in found and whole is not None:
        found = {"all": whole}
    elif not {"train", "test"} <= set(found):
        raise ValueError(f"[data] {path}: expected arrays x_train, y_train, x_test, y_test "
                         f"(or train_images, ...), or x and y, got {', '.join(known) or 'none'}")
    values, names = {}, {}
    for part, (x, y) in found.items():
        values[part], labels = array(path, x), array(path, y, numbers=False)
        names[part] = _class_names(path, y, labels, len(values[part]))
    shapes = {v.shape[1:] for v in values.values()}
    if len(shapes) > 1:
        raise ValueError(f"[data] {path}: expected samples of one shape in every split, got "
                         f"{' and '.join(map(str, sorted(shapes)))}")
    return Table(path, values, names)


def headers(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every array in an npz, whose numbers are not read.

    Raises ValueError for what is no npz, and for arrays of pickled objects: they run code.
    """
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    read = (np.lib.format.read_array_header_1_0 if version == (1, 0) else
                            np.lib.format.read_array_header_2_0)
                    shape, _, dtype = read(file)
                if dtype.hasobject:
                    raise _Pickled(member)
                found[member.removesuffix(".npy")] = tuple(shape)
    except _Pickled as error:
        raise ValueError(f"[data] {path}: expected arrays of numbers, got pickled objects in "
                         f"{error}, which are never loaded: they may run code") from None
    except IsADirectoryError:
        raise ValueError(f"[data] npz: expected a file, got the folder {path}") from None
    except Exception as error:  # zlib, zipfile and numpy each have their own
        raise ValueError(f"[data] expected an .npz of numpy arrays, got an error ({error}) in "
                         f"{path}") from None
    return found


class _Pickled(Exception):
    """An array of Python objects."""


def array(path: Path, key: str, numbers: bool = True) -> Array:
    """One array of an npz; of samples, checked to be finite numbers, bytes or float32."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = archive[key]
    except Exception as error:
        raise ValueError(f"[data] expected a whole .npz, got an error ({error}) reading {key} of "
                         f"{path}") from None
    if not numbers:
        return np.asarray(found)
    if found.dtype.kind not in "buif":
        raise ValueError(f"[data] {path}: expected {key} of numbers, got {found.dtype}")
    if found.ndim not in (2, 3, 4) or 0 in found.shape:
        raise ValueError(f"[data] {path}: expected {key} of shape (N, D), (N, H, W) or (N, H, W, "
                         f"C), got {found.shape}")
    with np.errstate(over="ignore"):
        kept = found if found.dtype == np.uint8 else found.astype(np.float32)
    if not np.isfinite(kept).all():
        place = tuple(int(v[0]) for v in np.nonzero(~np.isfinite(kept)))
        raise ValueError(f"[data] {path}: expected finite numbers, got {kept[place]} in "
                         f"{key}{list(place)}")
    return channels_first(kept)


def channels_first(images: Array) -> Array:
    """(N, H, W, C) of one or three channels as (N, C, H, W); others as they are."""
    last = images.ndim == 4 and images.shape[3] in (1, 3) and (
        images.shape[1] not in (1, 3) or images.shape[2] == images.shape[1])
    return np.moveaxis(images, 3, 1) if last else images


def _class_names(path: Path, key: str, labels: Array, count: int) -> list[str]:
    flat = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if flat.ndim != 1 or len(flat) != count:
        raise ValueError(f"[data] {path}: expected {key} of shape ({count},), one label a sample, "
                         f"got {labels.shape}")
    if flat.dtype.kind not in "buiUS":
        raise ValueError(f"[data] {path}: expected {key} of whole numbers or names, got "
                         f"{labels.dtype}")
    decoded = np.char.decode(flat, "utf-8") if flat.dtype.kind == "S" else flat
    return [str(v) for v in decoded.tolist()]


def shape_of(values: Array) -> tuple[int, int, int]:
    """(C, H, W) that rows (N, D) have: a square image, grey or RGB, where they look like pixels;
    else every number is a channel of its own, scaled as such.

    Pixels are all in [0, 1], or all whole numbers in 0..255.
    """
    width = values.shape[1]
    if width >= _IMAGE_NUMBERS and (unit(values) or whole_bytes(values)):
        for channels in (1, 3):
            side = math.isqrt(width // channels)
            if channels * side * side == width:
                return channels, side, side
    return width, 1, 1


def unit(values: Array) -> bool:
    return bool(values.dtype != np.uint8 and values.min() >= 0 and values.max() <= 1)


def whole_bytes(values: Array) -> bool:
    return values.dtype == np.uint8 or bool(
        values.min() >= 0 and values.max() <= 255 and (values == np.rint(values)).all())
