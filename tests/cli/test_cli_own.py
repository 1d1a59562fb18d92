"""One's own images and numbers on the command line: trained, judged, predicted, planned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from own_files import CLASSES, pictures, rows, table

from ffengine import models
from ffengine.cli import main
from ffengine.commands import cases
from ffengine.data import own
from ffengine.engine.run import checkpoint

SMALL = ["--set", "image_size=8", "--set", "layers=(12,12)", "--epochs", "20", "--lr", "0.01",
         "--backend", "reference", "--quiet", "--batch-size", "7"]


def run(capsys, *words):
    """(status, stdout, stderr)."""
    status = main(list(words))
    return (status, *capsys.readouterr())


def value(capsys, *words):
    status, out, err = run(capsys, *words, "--json")
    assert status == 0, err
    return json.loads(out.strip().splitlines()[-1])


def refused(capsys, *words):
    """The one line on standard error."""
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "") and err.startswith("ffengine: [") and err.count("\n") == 1
    return err


def test_a_folder_from_training_to_prediction(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pets", telling=True)
    made = value(capsys, "train", "sn/mlp", "--data", "folder:pets", *SMALL, "--out", "run")
    assert made["data"] == made["data_label"] == "folder:pets" and made["train_samples"] == 38
    assert made["test_accuracy"] > 0.8
    notes = checkpoint.load("run").meta["notes"]
    assert notes["classes"] == list(CLASSES) and notes["data"] == f"folder:{tmp_path}/pets"

    pictures(tmp_path / "new", train=3, test=1, telling=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    judged = value(capsys, "eval", "../run", "--backend", "reference")
    assert judged["test_accuracy"] == made["test_accuracy"] and judged["test_samples"] == 21
    other = value(capsys, "eval", "../run", "--data", "folder:../new/train")
    assert other["test_samples"] == 9 and other["test_accuracy"] > 0.6
    more = value(capsys, "train", "--resume", "../run", "--epochs", "20", "--quiet")
    assert more["test_accuracy"] == made["test_accuracy"]

    files = [str(tmp_path / "new" / "train" / "bee" / "01.jpg"), str(tmp_path / "pets" / "test")]
    told = value(capsys, "predict", "../run", *files)
    assert told["classes"] == list(CLASSES) and len(told["predictions"]) == 22
    first, *rest = told["predictions"]
    assert (first["file"], first["class"], first["label"]) == (files[0], "bee", 1)
    assert len(first["scores"]) == 3 and np.argmax(first["scores"]) == 1
    right = [Path(row["file"]).parent.name == row["class"] for row in rest]
    assert sum(right) / 21 == made["test_accuracy"]
    status, out, _ = run(capsys, "predict", "../run", files[0])
    assert status == 0 and out == f"{files[0]}  bee\n"


def test_other_classes_than_the_runs_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pets")
    value(capsys, "train", "sn/mlp", "--data", "folder:pets", *SMALL, "--out", "run")
    (tmp_path / "pets" / "test" / "ant").rename(tmp_path / "pets" / "test" / "asp")
    (tmp_path / "pets" / "train" / "ant").rename(tmp_path / "pets" / "train" / "asp")
    for words in (["eval", "run"], ["train", "--resume", "run"],
                  ["eval", "run", "--data", "folder:pets"]):
        assert "the run's classes (ant, bee, owl bird), got 'asp'" in refused(capsys, *words)
    assert "expected data of 3 classes and images of (3, 8, 8), got 10" in refused(
        capsys, "eval", "run", "--data", "digits")
    for name, said in (("none.png", "none.png is not there"), ("run", "got run/")):
        assert said in refused(capsys, "predict", "run", name)


def test_a_broken_file_ends_the_command_before_training(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = pictures(tmp_path / "my  pets") / "train" / "bee" / "05.JPEG"
    path.write_bytes(path.read_bytes()[:-200])
    err = refused(capsys, "train", "sn/mlp", "--data", "folder:my  pets", *SMALL)
    assert str(path) in err.splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["my  pets"]
    assert str(path) in refused(capsys, "plan", "sn/mlp", "--data", "folder:my  pets")
    assert str(path) in refused(
        capsys, "reproduce", "sn-mlp-mnist-pvn-last", "--data", "folder:my  pets", "--quiet")


def test_numbers_from_training_to_prediction(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "rows.csv", 90)
    words = ["--set", "layers=(12,12)", "--epochs", "40", "--lr", "0.01", "--quiet",
             "--batch-size", "16", "--backend", "reference", "--data-set", "normalize=set"]
    made = value(capsys, "train", "sn/mlp", "--data", "csv:rows.csv", *words, "--out", "run")
    assert made["test_accuracy"] > 0.8 and made["train_samples"] == 65
    assert value(capsys, "eval", "run")["test_accuracy"] == made["test_accuracy"]
    table(tmp_path / "new.csv", 30, seed=5)
    judged = value(capsys, "eval", "run", "--data", "csv:new.csv")
    assert judged["test_samples"] == 30 and judged["test_accuracy"] > 0.8

    values, labels = rows(30, 5)
    np.savez("new.npz", x=values)
    np.savetxt("plain.csv", values, delimiter=",")
    told = [value(capsys, "predict", "run", name)["predictions"]
            for name in ("new.csv", "new.npz", "plain.csv")]
    for found in told:
        assert [row["row"] for row in found] == list(range(30))
        assert [row["label"] for row in found] == [row["label"] for row in told[0]]
    right = np.mean([row["label"] for row in told[0]] == labels)
    assert right == pytest.approx(judged["test_accuracy"])
    np.savetxt("wide.csv", np.ones((2, 9)), delimiter=",")
    assert "expected 4 numbers a row, got 9" in refused(capsys, "predict", "run", "wide.csv")
    np.savez("wide.npz", x=np.ones((2, 9)))
    assert "expected samples of (4, 1, 1)" in refused(capsys, "predict", "run", "wide.npz")
    pictures(tmp_path / "pets", 1, 1)
    assert "rows of 4 numbers" in refused(capsys, "predict", "run", "pets/test")


def test_predicting_for_a_set_known_by_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = value(capsys, "train", "sn/mlp", "--data", "digits", "--set", "layers=(20,20)",
                 "--epochs", "2", "--quiet", "--out", "run", "--backend", "reference")
    from ffengine.data import load

    test = load("digits").test
    np.savez("x.npz", images=test.images.numpy())
    told = value(capsys, "predict", "run", "x.npz")
    assert told["classes"] == [str(i) for i in range(10)]
    right = torch.tensor([row["label"] for row in told["predictions"]]) == test.labels
    assert float(right.float().mean()) == pytest.approx(made["test_accuracy"])


def test_npz_images_are_resized_as_files_are(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.RandomState(0).randint(0, 256, (20, 9, 9)).astype(np.uint8)
    np.savez("a.npz", x=pixels, y=np.arange(20) % 2)
    plan = value(capsys, "plan", "sn/mlp", "--data", "npz:a.npz")
    assert (plan["in_shape"], plan["num_classes"], plan["batch_size"]) == ([1, 28, 28], 2, 15)
    np.savez("b.npz", x=pixels[:, :, :5].reshape(20, 45), y=np.arange(20) % 2)
    assert "square images, got 9x5" in refused(
        capsys, "plan", "sn/mlp", "--data", "npz:b.npz", "--data-set", "shape=(1,9,5)")
    small = value(capsys, "plan", "sn/mlp", "--data", "npz:b.npz", "--data-set", "shape=(1,9,5)",
                  "--set", "image_size=8")
    assert small["in_shape"] == [1, 8, 8]


@pytest.mark.parametrize("words, shape, classes, batch, whose", [
    (["sn/mlp"], [1, 28, 28], 10, 128, "the model's own; --data D fits them to a data set"),
    (["sn/mlp", "--data", "mnist"], [1, 28, 28], 10, 128, "of mnist"),
    (["sn/mlp", "--data", "cifar100", "--set", "layers=(100,)"], [3, 28, 28], 100, 128,
     "of cifar100"),
    (["cff/fixed", "--data", "digits"], [1, 8, 8], 10, 128, "of digits"),
    (["cff/fixed", "--data", "synthetic", "--data-set", "train=77"], [3, 32, 32], 10, 77,
     "of synthetic")])
def test_plan_says_what_input_it_assumes(capsys, words, shape, classes, batch, whose):
    """And of a full-batch recipe, how many samples there are."""
    plan = value(capsys, "plan", *words, "--backend", "reference")
    assert (plan["in_shape"], plan["num_classes"]) == (shape, classes)
    assert plan["batch_size"] == batch
    _, out, _ = run(capsys, "plan", *words, "--backend", "reference")
    assert f"input {'x'.join(map(str, shape))}, {classes} classes ({whose})" in out


def test_the_papers_recipe_rules_not_that_of_the_digits(capsys, tmp_path):
    root = pictures(tmp_path / "pets")
    for name in models.names():
        entry = models.entry(name)
        assert entry.recipe_for(f"folder:{root}") == entry.recipe
    made = value(capsys, "train", "sn/mlp", "--data", f"folder:{root}", "--epochs", "1", "--quiet",
                 "--set", "image_size=8", "--out", str(tmp_path / "run"), "--backend", "reference")
    paper = models.entry("sn/mlp").recipe
    assert (made["lr"], made["batch_size"]) == (paper.lr, min(paper.batch_size, 38))
    # 100 units fall into 10 groups, not into 3
    assert checkpoint.load(tmp_path / "run").meta["model"]["options"]["layers"] == [102, 102]


@pytest.mark.parametrize("classes", [3])
def test_every_model_fits_any_number_of_classes(classes):
    from ffengine.commands.options import Outline, fitted_options

    for name in [n for n in models.names() if not n.startswith("bp/")]:
        known = models.entry(name).options()
        given = {"superclasses": tuple(c % 2 for c in range(classes))} if (
            "superclasses" in known) else {}
        side = known.get("image_size", 28)
        options = fitted_options(name, Outline("folder:x", classes, (3, side, side), 99), given)
        with torch.device("meta"):
            assert models.create(name, **options).num_classes == classes


def test_results_are_called_as_the_data_are(capsys, tmp_path, monkeypatch):
    """The JPEG copy of CIFAR-10 by its own name, in train, eval and reproduce."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pets", telling=True)
    monkeypatch.setattr(own.pictures.Folder, "label", "CIFAR-10 (JPEG copy)")
    _, out, err = run(capsys, "train", "sn/mlp", "--data", "folder:pets", *SMALL[:-3],
                      "--out", "run", "--batch-size", "7")
    assert "% on CIFAR-10 (JPEG copy) after" in out and "sn/mlp on CIFAR-10 (JPEG copy):" in err
    assert "(sn/mlp on CIFAR-10 (JPEG copy), layer" in run(capsys, "eval", "run")[1]
    reproduced = value(capsys, "reproduce", "sn-mlp-mnist-pvn-last", "--data", "folder:pets",
                       "--seeds", "1", *SMALL)
    row = (reproduced["rows"] if isinstance(reproduced, dict) else reproduced)[0]
    assert row["data"] == "CIFAR-10 (JPEG copy) (paper: mnist)" and row["difference"] is None
    assert row["mean"] > 50 and not cases.stands_in("folder:pets", cases.recipe_files.load(
        "sn-mlp-mnist-pvn-last"))
