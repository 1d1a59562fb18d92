"""MATLAB 5 files are read by hand: to the last number, and damage ends in one line."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ffengine.data import catalog, formats, load, matlab

COUNT = 20
DRAWN = np.random.RandomState(0)
PIXELS = DRAWN.randint(0, 256, (32, 32, 3, COUNT)).astype(np.uint8)
LABELS = (np.arange(COUNT) % 10 + 1).astype(np.uint8)[:, None]


def mat(compressed: bool = False, **variables: Any) -> bytes:
    from scipy.io import savemat

    buffer = io.BytesIO()
    savemat(buffer, variables, do_compression=compressed)
    return buffer.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"])
def test_every_numeric_class_and_shape(tmp_path: Path, kind: str, compressed: bool) -> None:
    x = DRAWN.randint(0, 100, (3, 1, 4)).astype(kind)
    y = np.arange(3).astype(kind)[None]
    (tmp_path / "a.mat").write_bytes(mat(compressed, x=x, other=x, y=y, text="words"))
    found = matlab.read(tmp_path / "a.mat", ("x", "y", "text", "none"))
    assert found.keys() == {"x", "y"}
    for mine, theirs in ((found["x"], x), (found["y"], y)):
        assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)


def test_bytes_of_the_other_order(tmp_path: Path) -> None:
    """Written by hand: scipy writes the machine's own order alone."""
    def part(kind: int, content: bytes) -> bytes:
        return struct.pack(">II", kind, len(content)) + content + bytes(-len(content) % 8)

    numbers = np.arange(6, dtype=">i2")
    body = (part(6, struct.pack(">II", 6, 0)) + part(5, struct.pack(">ii", 2, 3))
            + part(1, b"x") + part(3, numbers.tobytes()))
    header = b"by hand".ljust(124) + struct.pack(">H", 0x0100) + b"MI"
    (tmp_path / "a.mat").write_bytes(header + struct.pack(">II", 14, len(body)) + body)
    found = matlab.read(tmp_path / "a.mat", ("x",))["x"]
    assert found.dtype == np.float64 and found.tolist() == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_bit_is_found_or_is_in_a_pixel(tmp_path: Path, compressed: bool) -> None:
    """Every bit of the tags, and of the last bytes: an error naming the file, or the same numbers.

    In what is not compressed a pixel has no checksum: the two arrays begin after their tags.
    """
    whole, path = mat(compressed, X=PIXELS, y=LABELS), tmp_path / "train_32x32.mat"
    path.write_bytes(whole)
    images, labels = formats.read_svhn(path)
    assert np.array_equal(images.numpy(), PIXELS.transpose(3, 2, 0, 1))
    assert labels.tolist() == [(i % 10 + 1) % 10 for i in range(COUNT)]
    read = 0
    for at in (*range(124, 196), *range(len(whole) - 48, len(whole), 3)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            try:
                mine, told = formats.read_svhn(path)
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                continue
            read += 1
            assert mine.shape == images.shape and told.shape == labels.shape
            assert compressed is False or np.array_equal(mine, images)
    assert read <= (500 if not compressed else 64)  # flags, padding, pixels and labels


def test_a_size_that_is_not_there_allocates_nothing(tmp_path: Path) -> None:
    whole, path = bytearray(mat(X=PIXELS, y=LABELS)), tmp_path / "a.mat"
    for at, value in ((132, 2**32 - 8), (160, 2**31 - 1), (164, 2**31 - 1)):
        changed = bytearray(whole)
        changed[at:at + 4] = struct.pack("<I", value)
        path.write_bytes(changed)
        with pytest.raises(matlab.Damaged):
            matlab.read(path, ("X", "y"))


@pytest.mark.parametrize("labels, found", [
    (np.full((COUNT, 1), 1.5), "label 1.5"), (np.full((COUNT, 1), np.nan), "label nan"),
    (np.full((COUNT, 1), np.inf), "label inf"), (np.full((COUNT, 1), 1e300), "label 1e[+]300"),
    (np.full((COUNT, 1), 2**40), "label 1099511627776"), (np.zeros((COUNT, 1)), "label 0"),
    (np.ones((COUNT, 1)) * (1 + 1j), "arrays X and y"), (np.ones((4, 5)), "one row or column")])
def test_labels_that_are_none_are_refused(tmp_path: Path, labels: Any, found: str) -> None:
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(mat(X=PIXELS, y=labels))
    with pytest.raises(ValueError, match=rf"train_32x32\.mat.*{found}"):
        formats.read_svhn(path)


def test_whole_labels_may_be_kept_as_doubles(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    path.write_bytes(mat(X=PIXELS, y=LABELS.astype(float)))
    assert formats.read_svhn(path)[1].tolist() == [(i % 10 + 1) % 10 for i in range(COUNT)]


def test_files_on_disk_are_held_to_a_checksum_that_is_known(
        make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make.svhn()
    sums = make.md5s(files)
    make.write(tmp_path, files)
    assert len(load("svhn", root=tmp_path, checksums=sums, valid=0).train) == 40
    name = "test_32x32.mat"
    damaged = bytearray(mat(X=PIXELS, y=LABELS))
    files[name] = bytes(damaged)
    make.write(tmp_path, files)
    assert len(load("svhn", root=tmp_path, valid=0).test) == COUNT  # somebody's own
    with pytest.raises(ValueError, match=rf"{name}: expected checksum md5:.*, found md5:"):
        load("svhn", root=tmp_path, checksums=sums, valid=0)
    # of a published name and size: the checksum is the published one
    monkeypatch.setitem(catalog.SOURCES["svhn"].sizes, name, len(damaged))
    with pytest.raises(ValueError, match=rf"{name}: expected checksum md5:eb5a983b"):
        load("svhn", root=tmp_path, valid=0)
