"""Every published format is read to the last byte, and damaged files are named."""

from __future__ import annotations

import gzip
import io
import re
import struct
import tarfile

import numpy as np
import pytest
import torch

from ffengine.data import formats, load


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and text.startswith("[data]")
    return text


@pytest.mark.parametrize(
    "name, folder", [("mnist", "MNIST/raw"), ("fashion_mnist", "."), ("mnist", "mnist")]
)
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_pixels_and_labels(make, tmp_path, name, folder, compressed):
    files = make.mnist()
    make.write(tmp_path / folder, make.zipped(files) if compressed else files)
    splits = load(name, root=tmp_path, valid=0, valid_split="last", download=False)
    raw = files["train-images-idx3-ubyte"][16:]
    assert splits.shape == (1, 28, 28) and splits.num_classes == 10
    assert splits.train.images.numpy().tobytes() == raw
    assert splits.train.labels.tolist() == [i % 10 for i in range(60)]
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (60, 0, 20)
    assert splits.train.labels.dtype == torch.int64


@pytest.mark.parametrize("archived", [False, True])
def test_cifar10_records(make, tmp_path, archived):
    files, folder = make.cifar(10), "cifar-10-batches-bin"
    if archived:
        make.write(tmp_path, {"cifar-10-binary.tar.gz": make.tarred(folder, files)})
    else:
        make.write(tmp_path / folder, files)
    splits = load("cifar10", root=tmp_path, valid=10, valid_split="last", download=False)
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (90, 10, 20)
    second = np.frombuffer(files["data_batch_2.bin"], np.uint8).reshape(-1, 3073)
    assert np.array_equal(splits.train.images[23].numpy().ravel(), second[3, 1:])
    assert int(splits.train.labels[23]) == second[3, 0]
    last = np.frombuffer(files["data_batch_5.bin"], np.uint8).reshape(-1, 3073)
    assert np.array_equal(splits.valid.images[9].numpy().ravel(), last[19, 1:])


@pytest.mark.parametrize("archived", [False, True])
def test_cifar100_fine_and_coarse(make, tmp_path, archived):
    files, folder = make.cifar(100, per_file=200), "cifar-100-binary"
    if archived:
        make.write(tmp_path, {"cifar-100-binary.tar.gz": make.tarred(folder, files)})
    else:
        make.write(tmp_path, files)
    fine = load("cifar100", root=tmp_path, valid=50, download=False)
    coarse = load("cifar100", root=tmp_path, valid=50, download=False, coarse=True)
    assert (fine.num_classes, coarse.num_classes) == (100, 20)
    assert torch.equal(fine.train.coarse_labels, fine.train.labels % 20)
    assert torch.equal(coarse.train.labels, fine.train.coarse_labels)
    assert torch.equal(coarse.train.images, fine.train.images)
    assert torch.equal(fine.fine_to_coarse, torch.arange(100) % 20)


def test_svhn_axes_and_zero(make, tmp_path):
    make.write(tmp_path, make.svhn())
    splits = load("svhn", root=tmp_path, valid=0, download=False)
    from scipy.io import loadmat

    pixels = loadmat(tmp_path / "train_32x32.mat")["X"]
    assert np.array_equal(splits.train.images[7, 2].numpy(), pixels[:, :, 2, 7])
    assert splits.train.labels.tolist() == [(i % 10 + 1) % 10 for i in range(40)]
    assert splits.fine_to_coarse is None


BAD_IDX = {
    "magic": (lambda d: b"\x00\x00\x0d\x03" + d[4:], "magic 00000803"),
    "empty": (lambda d: b"", "found 0 bytes"),
    "short": (lambda d: d[:-1], "expected 47040 bytes"),
    "long": (lambda d: d + b"x", "found more"),
    "huge": (lambda d: d[:4] + struct.pack(">3I", 2**31, 2**31, 2**31) + d[16:], "found 47040"),
    "zero": (lambda d: d[:4] + struct.pack(">3I", 0, 28, 28), "at least one entry"),
    "fewer": (
        lambda d: d[:4] + struct.pack(">3I", 59, 28, 28) + d[16 : 16 + 59 * 784],
        "59 labels",
    ),
}


@pytest.mark.parametrize("damage", BAD_IDX)
def test_bad_idx(make, tmp_path, damage):
    files = make.mnist()
    change, message = BAD_IDX[damage]
    files["train-images-idx3-ubyte"] = change(files["train-images-idx3-ubyte"])
    make.write(tmp_path, files)
    with pytest.raises(ValueError, match=r"train-") as error:
        load("mnist", root=tmp_path, download=False)
    assert message in one_line(error)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "crc"])
def test_bad_gzip(make, tmp_path, damage):
    files = make.zipped(make.mnist())
    name = "train-images-idx3-ubyte.gz"
    data = files[name]
    files[name] = {
        "cut": data[:-20],
        "flipped": data[:3000] + bytes(64) + data[3064:],
        "text": b"<html>not found</html>",
        "crc": data[:-8] + bytes(4) + data[-4:],
    }[damage]
    make.write(tmp_path, files)
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        load("mnist", root=tmp_path, download=False)
    one_line(error)


def test_labels_out_of_range(make, tmp_path):
    files = make.mnist()
    files["t10k-labels-idx1-ubyte"] = make.idx(np.arange(20))
    make.write(tmp_path, files)
    with pytest.raises(ValueError, match=r"t10k-labels") as error:
        load("mnist", root=tmp_path, download=False)
    assert "labels in 0..9, found label 19" in one_line(error)


def test_bad_cifar(make, tmp_path):
    files = make.cifar(10)
    make.write(tmp_path, files | {"data_batch_3.bin": files["data_batch_3.bin"][:-5]})
    with pytest.raises(ValueError, match=r"data_batch_3.bin") as error:
        load("cifar10", root=tmp_path, download=False)
    assert "3073-byte records" in one_line(error)
    make.write(tmp_path, files | {"test_batch.bin": b"\x0a" + files["test_batch.bin"][1:]})
    with pytest.raises(ValueError, match=r"test_batch.bin.*label 10"):
        load("cifar10", root=tmp_path, download=False)


def test_bad_archives(make, tmp_path):
    name, folder, files = "cifar-100-binary.tar.gz", "cifar-100-binary", make.cifar(100)
    whole = make.tarred(folder, files)
    crc = whole[:-8] + bytes(4) + whole[-4:]
    for data in (whole[: len(whole) // 2], b"text", gzip.compress(b"no tar" * 200), crc):
        make.write(tmp_path, {name: data})
        with pytest.raises(ValueError, match=re.escape(name)) as error:
            load("cifar100", root=tmp_path, download=False)
        one_line(error)
    make.write(tmp_path, {name: make.tarred(folder, {"train.bin": files["train.bin"]})})
    with pytest.raises(ValueError, match=r"no test.bin"):
        load("cifar100", root=tmp_path, download=False)


def test_archive_members_elsewhere_are_not_taken(make, tmp_path):
    """Members that point out of the archive, or are links, are never read nor written."""
    folder, files = "cifar-100-binary", make.cifar(100)
    make.write(tmp_path / "in", {"a.tar.gz": make.tarred(f"../{folder}", files)})
    with pytest.raises(ValueError, match=r"no train.bin, test.bin"):
        formats.read_tar_members(tmp_path / "in/a.tar.gz", folder, ("train.bin", "test.bin"))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        link = tarfile.TarInfo(f"{folder}/train.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    make.write(tmp_path / "in", {"b.tar.gz": buffer.getvalue()})
    with pytest.raises(ValueError, match=r"train.bin as a regular file"):
        formats.read_tar_members(tmp_path / "in/b.tar.gz", folder, ("train.bin",))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar.gz", "b.tar.gz", "in"]


def mat(**variables: object) -> bytes:
    from scipy.io import savemat

    buffer = io.BytesIO()
    savemat(buffer, variables)
    return buffer.getvalue()


PIXELS = np.zeros((32, 32, 3, 4), np.uint8)
BAD_MAT = {
    "text": (lambda d: b"text" * 100, "MATLAB 5"),
    "cut": (lambda d: d[: len(d) // 2], "found"),
    "inside": (lambda d: mat(y=np.ones((4, 1)), X=PIXELS)[:5000], "MATLAB 5"),
    "axes": (lambda d: mat(X=PIXELS.transpose(3, 0, 1, 2), y=np.ones((4, 1))), "X uint8"),
    "count": (lambda d: mat(X=PIXELS, y=np.ones((3, 1))), "4 labels in y, found 3"),
    "range": (lambda d: mat(X=PIXELS, y=np.full((4, 1), 11)), "label 11"),
    "missing": (lambda d: mat(X=PIXELS), "arrays X and y"),
    "struct": (lambda d: mat(X={"a": 1}, y=np.ones((4, 1))), "arrays X and y"),
}


@pytest.mark.parametrize("damage", BAD_MAT)
def test_bad_mat(make, tmp_path, damage):
    files = make.svhn()
    change, message = BAD_MAT[damage]
    files["train_32x32.mat"] = change(files["train_32x32.mat"])
    make.write(tmp_path, files)
    with pytest.raises(ValueError, match=r"train_32x32.mat") as error:
        load("svhn", root=tmp_path, download=False)
    assert message in one_line(error)


def test_train_and_test_must_have_one_shape(make, tmp_path):
    files = make.mnist() | {"t10k-images-idx3-ubyte": make.idx(np.zeros((20, 8, 8)))}
    make.write(tmp_path, files)
    with pytest.raises(ValueError, match=r"one shape") as error:
        load("mnist", root=tmp_path, download=False)
    one_line(error)
