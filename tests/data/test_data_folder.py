"""Folders of images: what is found, how it is decoded, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from own_files import CLASSES, Image, flat
from own_files import pictures as images

from ffengine.data import load, pictures


def refused(root: Path, *said: str, **options) -> None:
    with pytest.raises((ValueError, OSError)) as error:
        load(f"folder:{root}", **{"image_size": 8, **options})
    text = str(error.value)
    assert text.startswith("[data] ") and "\n" not in text
    assert all(word in text for word in said), text


def test_every_kind_of_image_is_decoded_alike(tmp_path):
    splits = load(f"folder:{images(tmp_path)}", image_size=8, valid=6)
    assert splits.classes == tuple(CLASSES) and splits.num_classes == 3
    assert [len(s) for s in (splits.train, splits.valid, splits.test)] == [36, 6, 21]
    assert splits.shape == (3, 8, 8) and splits.train.images.dtype == torch.uint8
    exact = 0
    for part in (splits.train, splits.valid, splits.test):
        wanted = torch.tensor(list(CLASSES.values()))[part.labels].view(-1, 1, 1, 1)
        near = ((part.images.int() - wanted).abs() <= 2).all(1).all(1).all(1)
        assert set(part.images[~near].unique().tolist()) <= {0, 255}
        exact += int(near.sum())
    assert exact == 54  # of 63: one of seven kinds keeps one bit a pixel
    unit = splits.train.images.double() / 255
    np.testing.assert_allclose(splits.train.mean, unit.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(splits.train.std, unit.std((0, 2, 3), unbiased=False), rtol=1e-6)
    assert splits.test.mean == splits.train.mean


def test_grey_folders_have_one_channel_unless_asked(tmp_path):
    root = f"folder:{images(tmp_path, grey=True)}"
    assert load(root, image_size=8).shape == (1, 8, 8)
    assert load(root, image_size=(6, 5), channels=3).shape == (3, 6, 5)


def test_resizing_is_pillows(tmp_path):
    random = np.random.RandomState(0)
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            pixels = random.randint(0, 256, (31, 17, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / name / "0.png")
    splits = load(f"folder:{tmp_path}", image_size=8, valid=0)
    whole = load(f"folder:{tmp_path}", valid=0)
    assert whole.shape == (3, 31, 17)
    wanted = Image.open(tmp_path / "train" / "a" / "0.png")
    np.testing.assert_array_equal(whole.train.images[0].permute(1, 2, 0), np.asarray(wanted))
    np.testing.assert_array_equal(
        splits.train.images[0].permute(1, 2, 0),
        np.asarray(wanted.resize((8, 8), Image.Resampling.BILINEAR)))


def test_exif_turns_an_image_upright(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(5):
            pixels = np.zeros((6, 10), np.uint8)
            pixels[:, :5] = 255
            exif = Image.Exif()
            exif[0x0112] = 6  # the camera was turned: left is up
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png", exif=exif)
    seen = load(f"folder:{tmp_path}", valid=0).train.images
    assert seen.shape[1:] == (1, 10, 6)
    assert (seen[:, 0, :5] == 255).all() and (seen[:, 0, 5:] == 0).all()


def test_one_folder_is_split_alike_for_every_seed(tmp_path):
    root = images(tmp_path, train=20) / "train"
    first, other = (load(f"folder:{root}", image_size=8, seed=s, valid=9) for s in (0, 1))
    assert [len(s) for s in (first.train, first.valid, first.test)] == [39, 9, 12]
    assert torch.bincount(first.test.labels).tolist() == [4, 4, 4]
    assert torch.equal(first.test.images, other.test.images)
    assert not torch.equal(first.valid.images, other.valid.images)
    for test, count in ((0.5, 30), (6, 6)):
        assert len(load(f"folder:{root}", image_size=8, test=test).test) == count
    for test in (0, 60, 1.5, "half", True):
        refused(root, "test expected a share", test=test)


def test_a_validation_part_of_its_own(tmp_path):
    root = images(tmp_path)
    (root / "test").rename(root / "val")
    images(tmp_path / "more", test=3)
    (tmp_path / "more" / "test").rename(root / "test")
    splits = load(f"folder:{root}", image_size=8)
    assert [len(s) for s in (splits.train, splits.valid, splits.test)] == [42, 21, 9]
    refused(root, "validation part of its own", valid=3)
    refused(root, "test part of its own", test=0.5)


def test_relative_paths_are_below_the_root(tmp_path, monkeypatch):
    images(tmp_path / "in" / "pets")
    assert len(load("folder:pets", root=tmp_path / "in", image_size=8).test) == 21
    monkeypatch.chdir(tmp_path / "in")
    assert len(load("folder:pets", image_size=8).test) == 21


def test_large_sets_are_mapped_from_a_file_without_a_name(tmp_path, monkeypatch):
    root = f"folder:{images(tmp_path / 'pets')}"
    kept = load(root, image_size=8)
    monkeypatch.setattr(pictures, "RAM_BYTES", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mapped = load(root, image_size=8)
    for a, b in zip((kept.train, kept.valid, kept.test),
                    (mapped.train, mapped.valid, mapped.test), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    storage = mapped.train.images.untyped_storage().data_ptr()
    assert mapped.test.images.untyped_storage().data_ptr() == storage  # slices, no copies
    assert list((tmp_path / "cache" / "ffengine").iterdir()) == []


def test_a_full_disk_is_said_before_decoding(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "RAM_BYTES", 1000)
    monkeypatch.setattr(pictures.os, "posix_fallocate", full)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refused(images(tmp_path / "pets"), "GB of room for decoded images", "No space left")


def cut(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])


def noisy(path: Path, size: tuple[int, int] = (40, 40)) -> Path:
    Image.fromarray(np.random.RandomState(1).randint(0, 256, (*size, 3)).astype(np.uint8)).save(
        path)
    return path


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_truncated_images(tmp_path, suffix, share):
    path = noisy(images(tmp_path) / "train" / "bee" / f"x y  z{suffix}")
    cut(path, share)
    refused(tmp_path, f"in {path}")


def test_damaged_and_unreadable_images(tmp_path):
    place = images(tmp_path) / "test" / "ant"
    path = noisy(place / "99.png")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    refused(tmp_path, "expected a whole, readable image", f"in {path}")
    path.write_text("no image")
    refused(tmp_path, "expected a PNG, JPEG or BMP image", f"in {path}")
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    refused(tmp_path, "No such file", f"in {path}")
    path.unlink()
    flat(9).save(place / "0.gif")
    refused(tmp_path, "expected PNG, JPEG or BMP images", str(place / "0.gif"))
    (place / "0.gif").rename(place / "0.png")  # whatever its name says
    refused(tmp_path, "expected a PNG, JPEG or BMP image", str(place / "0.png"))


def png16(path: Path, channels: int) -> None:
    """A PNG of 16 bits a channel, which Pillow writes in grey only."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data))

    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(
        ">2I5B", 4, 4, 16, colour, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(
            (b"\0" + bytes(range(8 * channels))) * 4)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_images_are_refused(tmp_path, channels):
    path = images(tmp_path) / "train" / "ant" / "deep.png"
    png16(path, channels)
    refused(tmp_path, "expected images of 8 bits", "got 16 bits", f"in {path}")


def test_cmyk_images_are_refused(tmp_path):
    path = images(tmp_path) / "train" / "ant" / "print.jpg"
    flat(9, mode="CMYK").save(path)
    refused(tmp_path, "grey or RGB, got CMYK", f"in {path}")


def test_folders_that_are_none(tmp_path):
    refused(tmp_path / "nowhere", "is not there")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "got the file")
    (tmp_path / "file").unlink()
    refused(tmp_path, "two or more classes, got no folder")
    root = images(tmp_path / "pets")
    (root / "train" / "cow").mkdir()
    refused(root, "expected images in every class folder", str(root / "train" / "cow"))
    (root / "train" / "cow").rmdir()
    (root / "test" / "cow").mkdir()
    flat(3).save(root / "test" / "cow" / "0.png")
    refused(root, "training samples' classes (ant, bee, owl bird), got 'cow'")
    (root / "test" / "cow" / "0.png").rename(root / "test" / "0.png")
    refused(root, "expected images in a folder per class", str(root / "test" / "0.png"))
    refused(root / "train", "channels expected 1 or 3", channels=2)
    refused(root / "train", "expected images of one size", image_size=None)
    refused(root / "train", "options of folder", shape=3)


def test_what_desktops_leave_is_passed_over(tmp_path):
    root = images(tmp_path)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (root / "train" / "ant" / name).touch()
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "notes.txt").touch()
    assert load(f"folder:{root}", image_size=8).num_classes == 3


def test_the_jpeg_copy_of_cifar10_is_called_so():
    names = pictures._CIFAR10
    path = Path("copy")

    def folder(suffix: str, test: int) -> pictures.Folder:
        counts = {"train": 5000, "test": test}
        return pictures.Folder(
            path, {p: [path / p / c / f"{i}{suffix}" for c in names for i in range(n)]
                   for p, n in counts.items()},
            {p: [c for c in names for _ in range(n)] for p, n in counts.items()})

    assert folder(".jpg", 1000).label == "CIFAR-10 (JPEG copy)"
    assert folder(".png", 1000).label is None and folder(".jpg", 999).label is None
