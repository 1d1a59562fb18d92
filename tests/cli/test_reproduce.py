"""`ffengine reproduce`: the paper's number beside ours, on its data or on what stands in."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ffengine import sealed
from ffengine.cli import main
from ffengine.commands.reproduction import training
from ffengine.engine.run.stopping import TrainingStopped
from ffengine.models import recipe_files

NAME = "deeperforward-tinycnn-cifar10"
TINY = ["--set", "widths=(10,10,10,10)", "--set", "image_size=4", "--batch-size", "256",
        "--backend", "reference", "--quiet", "--jobs", "1"]

RECIPE = """
name = "{name}"
paper = "mine"
table = "Table 1"
row = "{name}"
model = "deeperforward/tinycnn"
data = "cifar10"

[options]
widths = [10, 10, 10, 10]
image_size = 4

[train]
optimizer = "adamw"
lr = 0.08
epochs = 2
batch_size = 16
seeds = [0, 1]
augment = "flip"

[digits]
epochs = 1
batch_size = 256

[paper_result]
metric = "{metric}"
mean = 50.0
sd = 1.0
"""


@pytest.fixture(autouse=True)
def nothing_but_what_a_test_puts_there(monkeypatch, tmp_path):
    """An empty data folder, an empty working folder, and no way to download."""
    def fetch(*args, **kwargs):
        raise AssertionError("reproduce reached for the network")

    monkeypatch.setattr("pooch.retrieve", fetch)
    monkeypatch.setenv("FFENGINE_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


def run(capsys, *words):
    """(status, standard output, standard error)."""
    status = main(["reproduce", *words])
    out, err = capsys.readouterr()
    return status, out, err


def rows_of(capsys, *words):
    status, out, err = run(capsys, *words, "--json")
    assert status == 0, err
    return json.loads(out.strip().splitlines()[-1])["rows"]


def cifar10(folder):
    """CIFAR-10 in its own format, a few images a file."""
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        pixels = np.random.RandomState(0).randint(0, 256, (20, 3072))
        rows = np.column_stack([np.arange(20) % 10, pixels]).astype(np.uint8)
        (folder / name).write_bytes(rows.tobytes())


def test_digits_stand_in_where_the_data_is_not_here(capsys, tmp_path):
    (row,) = rows_of(capsys, NAME, "--epochs", "1", "--seeds", "1", *TINY)
    assert row["recipe"] == NAME and row["paper_mean"] == 79.49 and row["paper_sd"] == 0.29
    assert row["data"] == "digits (cifar10 not here)" and row["trained_on"] == "digits"
    assert row["difference"] is None and row["sd"] is None and row["seeds"] == [0]
    assert 0 < row["mean"] <= 100 and row["seconds"] > 0 and row["peak_bytes"] > 0
    assert (row["epochs"], row["batch_size"], row["backend"]) == (1, 256, "reference")
    (saved,) = sealed.read(tmp_path / "runs" / "reproduction.json")["rows"]
    assert saved.pop("key") and saved == row


def test_the_table_says_what_it_compares(capsys, tmp_path):
    status, out, err = run(capsys, NAME, "--data", "digits", "--epochs", "1", "--seeds", "0,2",
                           "--out", str(tmp_path / "here"), *TINY)
    assert status == 0, err
    paper, head, line, _, *notes = out.splitlines()
    assert paper == "deeperforward" and head.split() == [
        "recipe", "paper", "ours", "difference", "in", "s.e.", "seeds", "epochs", "seconds", "peak",
        "data", "machine"]
    assert " 2   1/150 " in line and "thread" in line
    assert "79.49 ± 0.29" in line and "digits (paper: cifar10)" in line
    assert any("do not compare" in note for note in notes)
    assert notes[-1] == f"rows in {tmp_path / 'here' / 'reproduction.json'}"
    status, out, _ = run(capsys, NAME, "--epochs", "1", "--seeds", "1", *TINY)
    assert "not on this machine: cifar10" in out and "--data-root" in out


def test_the_papers_data_is_used_where_it_is_here(capsys, tmp_path):
    cifar10(tmp_path / "elsewhere" / "cifar10")
    words = [NAME, "--epochs", "1", "--seeds", "2", "--data-root", str(tmp_path / "elsewhere")]
    (row,) = rows_of(capsys, *words, *TINY)
    assert row["data"] == row["trained_on"] == "cifar10" and row["paper_epochs"] == 150
    assert row["difference"] == pytest.approx(row["mean"] - 79.49)
    assert row["seeds"] == [0, 1] and len(row["accuracies"]) == 2 and row["sd"] >= 0
    assert row["lr"] == 0.08


def test_a_paper_shares_runs_and_shows_what_failed(capsys, tmp_path, monkeypatch):
    """Two readings of the same training cost one; a recipe that blows up is a row, not a gap."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name, metric in (("mine-a", "test_accuracy"), ("mine-b", "best_layer_accuracy")):
        (folder / f"{name}.toml").write_text(RECIPE.format(name=name, metric=metric))
    bad = RECIPE.format(name="mine-c", metric="test_accuracy").replace("lr = 0.08", "lr = 80")
    (folder / "mine-c.toml").write_text(bad)
    cifar10(tmp_path / "data" / "cifar10")
    monkeypatch.setattr(recipe_files, "FOLDER", folder)
    augmented = []
    tested_at = training.tested_at

    def counted(args, trainer, splits, marks, augment, *more):
        if trainer.settings.lr > 1:
            raise TrainingStopped("[train] the loss of layer 2 became nan")
        augmented.append(augment is not None)
        return tested_at(args, trainer, splits, marks, augment, *more)

    monkeypatch.setattr(training, "tested_at", counted)
    a, b, c = rows_of(capsys, "mine", *QUIET)
    assert augmented == [True] * 2 and a["seeds"] == b["seeds"] == [0, 1]
    assert b["metric"] == "best_layer_accuracy" and a["accuracies"] != []
    assert c["mean"] is None and "the loss of layer" in c["error"] and a["error"] is None

    augmented.clear()
    (row,) = rows_of(capsys, str(folder / "mine-b.toml"), "--data", "digits", "--seeds", "1",
                     *QUIET)
    assert augmented == [False] and (row["epochs"], row["batch_size"]) == (1, 256)
    status, _, err = run(capsys, "mine-c", *QUIET)
    assert status == 2 and "the loss of layer" in err and err.count("\n") == 1


@pytest.fixture
def bundled(monkeypatch, tmp_path):
    """`bundled(name, **changes)` writes a recipe among those that are bundled, data beside."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    cifar10(tmp_path / "data" / "cifar10")
    monkeypatch.setattr(recipe_files, "FOLDER", folder)

    def write(name, *changes):
        text = RECIPE.format(name=name, metric="test_accuracy").replace("[0, 1]", "[0]")
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (folder / f"{name}.toml").write_text(text)

    return write


@pytest.fixture
def trainings(monkeypatch):
    """Epochs at which each training was read."""
    found, tested_at = [], training.tested_at

    def counted(args, trainer, splits, marks, *more):
        found.append(list(marks))
        return tested_at(args, trainer, splits, marks, *more)

    monkeypatch.setattr(training, "tested_at", counted)
    return found


STEADY = ("lr = 0.08", "lr = 0.08\nlr_min = 0.08")
FALLING = ("lr = 0.08", "lr = 0.08\nlr_min = 0.08\nlr_drops = [[3, 0.1]]")
QUIET = ["--backend", "reference", "--quiet", "--jobs", "1"]


def test_a_long_recipe_yields_the_rows_of_shorter_ones(capsys, bundled, trainings):
    """Read off while it trains, and what those recipes give by themselves."""
    bundled("mine-1epoch", ("epochs = 2\n", "epochs = 1\n"))
    bundled("mine-3epochs", ("epochs = 2\n", "epochs = 3\n"))
    bundled("mine-4epochs", FALLING, ("epochs = 2\n", "epochs = 4\n"))
    bundled("mine-other", ("epochs = 2\n", "epochs = 2\nlr_epochs = 4\nlr_min = 0.01\n"))
    bundled("mine-wide", ("[10, 10, 10, 10]", "[20, 10, 10, 10]"))
    rows = rows_of(capsys, "mine-4epochs", *QUIET)
    assert [r["recipe"] for r in rows] == ["mine-1epoch", "mine-3epochs", "mine-4epochs"]
    assert trainings == [[1, 3, 4]] and [r["epochs"] for r in rows] == [1, 3, 4]
    assert rows[0]["seconds"] < rows[2]["seconds"]
    whole = rows_of(capsys, "mine", "--out", "whole", *QUIET)
    assert [r["recipe"] for r in whole[:3]] == [r["recipe"] for r in rows]
    assert trainings[1:] == [[1, 3, 4], [2], [2]]
    alone = [rows_of(capsys, name, "--out", "alone", *QUIET)[-1]
             for name in ("mine-1epoch", "mine-3epochs")]
    for mine, read, again in zip(alone, rows, whole, strict=False):
        assert mine["accuracies"] == read["accuracies"] == again["accuracies"]
    assert len({tuple(r["accuracies"]) for r in rows}) > 1


def test_a_shorter_row_is_not_read_off_where_training_differs(capsys, bundled, trainings):
    """A rate that falls over all epochs, more seeds than the longer recipe has, layers in turn."""
    cosine = ("lr = 0.08", "lr = 0.08\nlr_min = 0.01")
    bundled("mine-a", cosine)
    bundled("mine-b", cosine, ("epochs = 2\n", "epochs = 3\n"))
    assert len(rows_of(capsys, "mine-b", *QUIET)) == 1
    assert len(rows_of(capsys, "mine", *QUIET)) == 2 and trainings == [[3], [2]]
    bundled("mine-a", ("epochs = 2\n", "epochs = 1\n"), ("[0]", "[0, 1]"))
    bundled("mine-b")
    trainings.clear()
    rows = rows_of(capsys, "mine", "--out", "own", *QUIET)
    assert [r["seeds"] for r in rows] == [[0, 1], [0]] and trainings == [[1], [1], [2]]
    trainings.clear()
    rows = rows_of(capsys, "mine", "--seeds", "1", "--out", "one", *QUIET)
    assert len(rows) == 2 and trainings == [[1, 2]]
    layers = (('"deeperforward/tinycnn"', '"sn/mlp"'), ("widths = [10, 10, 10, 10]",
                                                         "layers = [10, 10]"))
    for name, epochs in (("mine-a", 1), ("mine-b", 2)):
        bundled(name, *layers, ("epochs = 2\n", f"epochs = {epochs}\n"))
    trainings.clear()
    a, b = rows_of(capsys, "mine", *QUIET, "--set", "in_channels=3")
    assert trainings == [[2], [4]] and (a["epochs"], b["epochs"]) == (1, 2)


def test_rows_read_before_a_failure_are_kept(capsys, bundled, monkeypatch):
    bundled("mine-a", STEADY, ("epochs = 2\n", "epochs = 1\n"))
    bundled("mine-b", STEADY)
    tested_at = training.tested_at

    def stopped(*args):
        yield next(tested_at(*args))
        raise TrainingStopped("[train] the loss of layer 2 became nan")

    monkeypatch.setattr(training, "tested_at", stopped)
    a, b = rows_of(capsys, "mine", *QUIET)
    assert a["mean"] is not None and a["error"] is None
    assert b["mean"] is None and "layer 2 became nan" in b["error"]


def test_an_epochs_last_batch_is_left_out_where_a_recipe_says_so(capsys, bundled, monkeypatch):
    bundled("mine-a", ("epochs = 2", "drop_last = true\nepochs = 2"))
    bundled("mine-b")
    steps, make = [], training.make_trainer

    def kept(*args, **more):
        steps.append(make(*args, **more))
        return steps[-1]

    monkeypatch.setattr(training, "make_trainer", kept)
    rows_of(capsys, "mine", "--data-set", "valid=10", *QUIET)
    assert [t.steps for t in steps] == [2 * 5, 2 * 6]  # 90 samples in batches of 16


def test_without_a_name_the_recipes_are_listed(capsys):
    rows = rows_of(capsys)
    assert {r["recipe"] for r in rows} == set(recipe_files.names())
    status, out, _ = run(capsys)
    assert status == 0 and NAME in out


@pytest.mark.parametrize("words, text", [
    (["deeperforward-tiny"], "unknown recipe 'deeperforward-tiny'"),
    (["nowhere.toml"], "no such file"),
    ([NAME, "--seeds", "0"], "--seeds expected a count"),
    ([NAME, "--seeds", "two"], "--seeds expected a count"),
    ([NAME, "--seeds", "1,1"], "--seeds expected a count"),
    ([NAME, "--seeds", "-1"], "--seeds expected a count"),
    ([NAME, "--data", "cifar"], "digits, mnist"),
    ([NAME, "--epochs", "0"], "epochs"),
    ([NAME, "--batch-size", "0"], "batch-size"),
    ([NAME, "--set", "width=3"], "known: num_classes"),
    ([NAME, "--memory-budget", "lots"], "440MB"),
])
def test_errors_are_one_line(capsys, tmp_path, words, text):
    status, out, err = run(capsys, *words, "--quiet")
    assert status == 2 and text in err and out == ""
    assert err.startswith("ffengine: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "a refused command left something behind"
