"""npz: and csv:, what they are read as, and what is refused in one line."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from own_files import CLASSES, rows, table

from ffengine.data import load


def refused(name: str, *said: str, **options) -> None:
    with pytest.raises((ValueError, OSError)) as error:
        load(name, **options)
    text = str(error.value)
    assert text.startswith("[data] ") and "\n" not in text
    assert all(word in text for word in said), text


def bytes_of(count: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, *shape)).astype(np.uint8)


def npz(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return f"npz:{path}"


@pytest.mark.parametrize("x, y", [("x_{}", "y_{}"), ("{}_images", "{}_labels"), ("X_{}", "Y_{}")])
@pytest.mark.parametrize("shape, stored", [
    ((28, 28), (1, 28, 28)), ((8, 8, 3), (3, 8, 8)), ((3, 8, 8), (3, 8, 8)),
    ((64,), (1, 8, 8)), ((192,), (3, 8, 8)), ((9, 5, 1), (1, 9, 5)), ((10,), (10, 1, 1))])
def test_npz_of_bytes(tmp_path, x, y, shape, stored):
    train, test = bytes_of(40, shape), bytes_of(10, shape, 1)
    labels = np.arange(40) % 4
    name = npz(tmp_path / "a.npz", **{x.format("train"): train, y.format("train"): labels[:, None],
                                      x.format("test"): test, y.format("test"): labels[:10]})
    splits = load(name, valid=8)
    assert [len(s) for s in (splits.train, splits.valid, splits.test)] == [32, 8, 10]
    assert splits.shape == stored and splits.test.images.dtype == torch.uint8
    assert splits.classes == ("0", "1", "2", "3")
    first = test if len(shape) < 3 or shape[0] == 3 else test.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(splits.test.images, first.reshape(10, *stored))
    assert splits.test.labels.tolist() == labels[:10].tolist()


def test_npz_of_one_part_with_names(tmp_path):
    words = np.array(list(CLASSES))[np.arange(60) % 3]
    values = np.random.RandomState(0).uniform(0, 1, (60, 7, 6)).astype(np.float64)
    splits = load(npz(tmp_path / "a.npz", x=values, y=words), valid=0, test=0.25)
    assert splits.classes == tuple(sorted(CLASSES)) and splits.shape == (1, 7, 6)
    assert len(splits.test) == 15 and splits.test.images.dtype == torch.float32
    seen = torch.cat([splits.train.images, splits.test.images]).flatten(1)
    assert sorted(seen[:, 0].tolist()) == sorted(values[:, 0, 0].astype(np.float32).tolist())
    x, _ = splits.train.batch(slice(0, 48))
    assert abs(float(x.mean())) < 1e-5 and abs(float(x.std()) - 1) < 1e-3


def test_labels_keep_the_order_of_numbers(tmp_path):
    labels = np.array([10, 2, -1, 300] * 10)
    splits = load(npz(tmp_path / "a.npz", x=bytes_of(40, (4,)), y=labels))
    assert splits.classes == ("-1", "2", "10", "300")


class Trap:
    """What a pickle would run if it were loaded."""

    def __reduce__(self):
        return os.mkdir, (os.environ["FFENGINE_DATA"],)


def test_pickles_are_never_loaded(tmp_path):
    labels = np.arange(20) % 2
    trap = np.array([Trap()] * 20, dtype=object)
    for arrays in ({"x": trap, "y": labels}, {"x": bytes_of(20, (4,)), "y": trap},
                   {"x": bytes_of(20, (4,)), "y": labels, "other": trap}):
        refused(npz(tmp_path / "a.npz", **arrays), "a.npz", "pickled objects", "never loaded")
    np.save(tmp_path / "b.npy", trap)
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    refused(f"npz:{tmp_path}/b.npz", "expected an .npz of numpy arrays", "b.npz")
    assert not Path(os.environ["FFENGINE_DATA"]).exists()


def test_an_npz_that_is_none(tmp_path):
    labels, x = np.arange(20) % 2, bytes_of(20, (4,))
    path = tmp_path / "a.npz"
    for arrays, said in (
            ({"x": x}, "x_train, y_train, x_test, y_test"),
            ({"x_train": x, "y_train": labels}, "got x_train, y_train"),
            ({"x": x, "y": labels[:9]}, "one label a sample, got (9,)"),
            ({"x": x, "y": labels + 0.5}, "whole numbers or names, got float64"),
            ({"x": x.astype("U"), "y": labels}, "expected x of numbers"),
            ({"x": x[:, 0], "y": labels}, "of shape (N, D)"),
            ({"x": x[:0], "y": labels[:0]}, "of shape (N, D)"),
            ({"x": x, "y": labels * 0}, "two or more classes, got 0"),
            ({"x": np.where(x == x[3, 2], np.nan, x), "y": labels}, "finite numbers, got nan"),
            ({"x_train": x, "y_train": labels, "x_test": x[:, :3], "y_test": labels},
             "one shape in every split"),
            ({"x_train": x, "y_train": labels, "x_test": x, "y_test": labels + 1},
             "training samples' classes (0, 1), got '2'")):
        refused(npz(path, **arrays), str(path), said)
    npz(path, x=bytes_of(2000, (64,)), y=np.arange(2000) % 2)
    path.write_bytes(path.read_bytes()[:5000])
    refused(f"npz:{path}", f"in {path}")
    np.savez_compressed(path, x=bytes_of(200, (64,)), y=np.arange(200) % 2)
    data = bytearray(path.read_bytes())
    data[3000] ^= 255
    path.write_bytes(data)
    refused(f"npz:{path}", "expected a whole .npz", str(path))
    path.write_text("x")
    refused(f"npz:{path}", "expected an .npz of numpy arrays", f"in {path}")
    refused(f"npz:{tmp_path}", "got the folder")
    refused(f"npz:{tmp_path}/none.npz", "is not there")


def test_csv_columns_are_scaled_one_by_one(tmp_path):
    splits = load(f"csv:{table(tmp_path / 'a.csv')}", valid=6)
    assert splits.classes == tuple(CLASSES) and splits.shape == (4, 1, 1)
    assert [len(s) for s in (splits.train, splits.valid, splits.test)] == [42, 6, 12]
    x, _ = splits.train.batch(slice(0, 42))
    torch.testing.assert_close(x.mean(0), torch.zeros(4, 1, 1), atol=2e-4, rtol=0)
    torch.testing.assert_close(x.std(0, unbiased=False), torch.ones(4, 1, 1), atol=2e-4, rtol=0)
    unit = load(f"csv:{tmp_path / 'a.csv'}", valid=6, normalize="off").train.batch(slice(0, 42))[0]
    torch.testing.assert_close(unit.amin(0), torch.zeros(4, 1, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(unit.amax(0), torch.ones(4, 1, 1), atol=1e-6, rtol=0)


def test_what_was_settled_reads_another_file_alike(tmp_path):
    first = load(f"csv:{table(tmp_path / 'a.csv')}")
    other = load(f"csv:{table(tmp_path / 'b.csv', 30, seed=3)}", classes=first.classes, test="all",
                 **first.settled)
    assert len(other.test) == 30 and len(other.train) == 0
    values = torch.tensor(rows(30, 3)[0], dtype=torch.float32)
    wanted = first.train.normalise(values.view(30, 4, 1, 1))
    torch.testing.assert_close(other.test.batch(slice(0, 30))[0], wanted, atol=2e-3, rtol=1e-4)


def test_pixels_in_a_csv(tmp_path):
    """MNIST's own habit: a label, then 784 numbers of 0..255, in train.csv and test.csv."""
    pixels = bytes_of(50, (784,))
    for part, count in (("train", 50), ("test", 20)):
        with (tmp_path / f"{part}.csv").open("w") as file:
            writer = csv.writer(file)
            if part == "train":
                writer.writerow(["label", *(f"{i // 28}x{i % 28}" for i in range(784))])
            writer.writerows([i % 5, *pixels[i]] for i in range(count))
    refused(f"csv:{tmp_path}", "test.csv", "expected a label column called label or class")
    splits = load(f"csv:{tmp_path}", label=0, valid=0)
    assert splits.shape == (1, 28, 28) and splits.train.images.dtype == torch.uint8
    np.testing.assert_array_equal(splits.train.images.flatten(1), pixels)
    assert load(f"csv:{tmp_path}", label=0, image_size=14).shape == (1, 14, 14)
    assert load(f"csv:{tmp_path}", label=0, shape=(784, 1, 1)).shape == (784, 1, 1)
    dark = load(f"csv:{tmp_path}", label=0, range=(0, 510), normalize="off").train.batch([0])[0]
    assert float(dark.max()) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("text, label, said", [
    ("", None, "got an empty file"), ("a,label\n", None, "the names of columns alone"),
    ("a,b\n1,2\n", None, "label=NAME, or label=NUMBER"),
    ("a,b\n1,2\n", "kind", "a label column called kind, got a, b"),
    ("1,2\n3,4\n", 2, "a label column in 0..1, got label=2"),
    ("a,b,y\n1,nan,0\n2,2,1\n", None, "line 2, column 'b': expected a finite number, got 'nan'"),
    ("a,b,y\n1,2,0\n2,,1\n", None, "line 3, column 'b': expected a finite number, got ''"),
    ("a,b,y\n1,2,0\n\n2,inf,1\n", None, "line 4, column 'b'"),
    ("a,b,y\n1,1e300,0\n2,2,1\n", None, "column 'b': expected a finite number, got '1e300'"),
    ("a,b,y\n1,x,0\n2,2,1\n", None, "got 'x'"), ("a,b,y\n1,2,0\n2,1\n", None, "3 cells, got 2"),
    ("a,b,y\n1,2,\n2,2,1\n", None, "expected a label in column 'y', got an empty cell"),
    ("a,b,y\n1,2,0\n2,2,0\n", None, "two or more classes, got 0"),
    ("a,b,y\n1,2,\xe9\n", None, "expected a csv file in UTF-8")])
def test_a_csv_that_is_none(tmp_path, text, label, said):
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode("latin-1"))
    refused(f"csv:{path}", str(path), said, **({} if label is None else {"label": label}))


@pytest.mark.parametrize("options, said", [
    ({"shape": (2, 2)}, "shape expected (C, H, W) of 4 numbers"), ({"shape": (1, 3, 3)}, "of 4"),
    ({"range": (1, 1)}, "low below high"), ({"range": 3}, "range expected (low, high)"),
    ({"range": ((0, 0), (1, 1))}, "one for each of the 4 channels"),
    ({"image_size": 8}, "image_size expected images, got rows of 4 numbers"),
    ({"classes": ["ant", "bee"]}, "the run's classes (ant, bee), got 'owl bird'"),
    ({"channels": 1}, "options of csv"), ({"valid": 48}, "valid must leave some of the 48")])
def test_options_that_do_not_fit(tmp_path, options, said):
    refused(f"csv:{table(tmp_path / 'a.csv')}", said, **options)


def test_files_that_are_not_there(tmp_path):
    refused(f"csv:{tmp_path}/a.csv", "is not there")
    table(tmp_path / "train.csv")
    refused(f"csv:{tmp_path}", "expected train.csv and test.csv", "test.csv is not there")
    (tmp_path / "test.csv").write_text("a,y\n1,0\n")
    refused(f"csv:{tmp_path}", "4 in train.csv, got 1")
    with pytest.raises(ValueError, match=r"classes are for one's own data, got them for digits"):
        load("digits", classes=["a"])
