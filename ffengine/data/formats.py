"""Readers of the published file formats: idx, CIFAR binary, SVHN .mat.

Nothing here unpickles or extracts to disk. Every reader checks what it reads; a file that is not
what it should be gives one ValueError that names it. Counts come from the files themselves.
"""

from __future__ import annotations

import gzip
import math
import struct
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from torch import Tensor

from ffengine.data import matlab

_CHUNK = 1 << 20
_CIFAR_SHAPE = (3, 32, 32)


def bad_file(path: Path | str, expected: str, found: str) -> ValueError:
    """The error for a file whose content is wrong."""
    return ValueError(f"[data] {path}: expected {expected}, found {found}")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turns what gzip, zlib and tarfile raise on damaged bytes into a ValueError naming `path`."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise bad_file(path, "an intact compressed file", f"damage ({reason})") from error


def _read_up_to(stream: IO[bytes], count: int) -> bytearray:
    """At most `count` bytes; in chunks, so that a false count in a header allocates nothing."""
    data = bytearray()
    while len(data) < count:
        chunk = stream.read(min(_CHUNK, count - len(data)))
        if not chunk:
            break
        data += chunk
    return data


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else open(path, "rb")


def read_idx(path: Path, dims: int) -> Tensor:
    """uint8 tensor of `dims` dimensions from an idx file, plain or .gz."""
    with _damage_named(path), _open(path) as stream:
        header = _read_up_to(stream, 4 + 4 * dims)
        magic = bytes((0, 0, 8, dims))
        if len(header) < 4 + 4 * dims or header[:4] != magic:
            raise bad_file(
                path,
                f"an idx header of {4 + 4 * dims} bytes with magic {magic.hex()}",
                f"{len(header)} bytes with {header[:4].hex() or 'nothing'}",
            )
        shape = struct.unpack(f">{dims}I", header[4:])
        count = math.prod(shape)
        if count == 0:
            raise bad_file(path, "at least one entry", f"shape {shape}")
        # One byte more than promised: it tells a longer file, and makes gzip check its CRC.
        data = _read_up_to(stream, count + 1)
    if len(data) != count:
        more = "more" if len(data) > count else str(len(data))
        raise bad_file(path, f"{count} bytes after the header for shape {shape}", more)
    return torch.frombuffer(data, dtype=torch.uint8).reshape(shape)


def read_idx_pair(images_path: Path, labels_path: Path, num_classes: int) -> tuple[Tensor, Tensor]:
    """(images uint8 (N, 1, H, W), labels int64 (N,)) of an idx image file and its label file."""
    images = read_idx(images_path, 3).unsqueeze(1)
    labels = read_idx(labels_path, 1).to(torch.int64)
    if len(images) != len(labels):
        raise bad_file(
            labels_path, f"{len(images)} labels for {images_path.name}", f"{len(labels)}"
        )
    return images, check_labels(labels, 0, num_classes - 1, labels_path)


def check_labels(labels: Tensor, low: int, high: int, path: Path | str) -> Tensor:
    """`labels`, if all are in low..high."""
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest < low or largest > high:
        found = smallest if smallest < low else largest
        raise bad_file(path, f"labels in {low}..{high}", f"label {found}")
    return labels


def parse_cifar(data: bytes | bytearray, classes: tuple[int, ...], path: str) -> list[Tensor]:
    """[images uint8 (N, 3, 32, 32), one int64 (N,) per entry of `classes`] of a CIFAR .bin.

    A record is one byte per kind of label, then the red, green and blue planes.
    """
    record = len(classes) + math.prod(_CIFAR_SHAPE)
    if not data or len(data) % record:
        raise bad_file(path, f"a whole number of {record}-byte records", f"{len(data)} bytes")
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, record)
    labels = [
        check_labels(rows[:, i].to(torch.int64), 0, n - 1, path) for i, n in enumerate(classes)
    ]
    images = rows[:, len(classes) :].contiguous().view(-1, *_CIFAR_SHAPE)
    return [images, *labels]


def read_tar_members(path: Path, folder: str, names: tuple[str, ...]) -> dict[str, bytearray]:
    """The regular files ``folder/name`` of a .tar.gz, read in memory in one pass.

    Only these exact member names are looked at and nothing is written, so a hostile archive has
    no path to escape by. The stream is read to its end, where gzip compares its CRC.
    """
    found: dict[str, bytearray] = {}
    with _damage_named(path), gzip.open(path, "rb") as stream:
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as tar:
            for member in tar:
                parent, _, name = member.name.removeprefix("./").rpartition("/")
                if parent != folder or name not in names:
                    continue
                # A sparse member may promise terabytes of zeros that are not in the file.
                if not member.isreg() or member.issparse():
                    raise bad_file(path, f"{name} as a regular file", "another kind of member")
                content = tar.extractfile(member)
                assert content is not None  # true of every regular member
                found[name] = _read_up_to(content, member.size)
                if len(found[name]) != member.size:
                    raise bad_file(path, f"{member.size} bytes of {name}", f"{len(found[name])}")
        while stream.read(_CHUNK):
            pass
    missing = [name for name in names if name not in found]
    if missing:
        raise bad_file(path, f"members {folder}/{', '.join(names)}", f"no {', '.join(missing)}")
    return found


def read_svhn(path: Path) -> tuple[Tensor, Tensor]:
    """(images uint8 (N, 3, H, W), labels int64 (N,)) of an SVHN cropped-digits .mat.

    The file has X (H, W, 3, N) uint8 and y (N, 1) in 1..10, where 10 stands for the digit 0.
    """
    try:
        variables = matlab.read(path, ("X", "y"))
    except matlab.Damaged as error:
        raise bad_file(path, "an intact MATLAB 5 file", f"damage ({error})") from None
    if len(variables) < 2:
        raise bad_file(path, "numeric arrays X and y", ", ".join(variables) or "nothing")
    pixels, raw = variables["X"], variables["y"]
    if pixels.ndim != 4 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise bad_file(path, "X uint8 (H, W, 3, N)", f"X {pixels.dtype} {pixels.shape}")
    if raw.size != pixels.shape[3]:
        raise bad_file(path, f"{pixels.shape[3]} labels in y", f"{raw.size}")
    if max(raw.shape) != raw.size:
        raise bad_file(path, "labels y in one row or column", f"{raw.shape}")
    raw = raw.reshape(-1)
    if not (whole := (raw == np.rint(raw)) & (abs(raw) < 2.0**31)).all():
        raise bad_file(path, "whole numbers as labels", f"label {raw[~whole][0]}")
    labels = check_labels(torch.from_numpy(raw.astype(np.int64)), 1, 10, path)
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)))
    return images, labels % 10
