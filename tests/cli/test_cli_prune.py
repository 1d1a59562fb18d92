"""`ffengine prune`, `analyze prunability` and `train --watch`: files, JSON, one-line refusals."""

from __future__ import annotations

import csv
import json
import shutil

import pytest

from ffengine.cli import main
from ffengine.engine.run import checkpoint

TRAIN = ["--data", "digits", "--epochs", "1", "--quiet", "--backend", "reference"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An FFNN, trained a little."""
    out = tmp_path_factory.mktemp("runs") / "ffnn"
    assert main(["train", "fflib/ffnn", *TRAIN, "--set", "layers=(24,20)", "--out", str(out)]) == 0
    return out


def value(capsys, *words):
    status = main([*words, "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out.strip().splitlines()[-1])


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_quarter_is_left_and_lives_on(capsys, tmp_path, run):
    before, out = files(run), tmp_path / "small"
    made = value(capsys, "prune", str(run), "--by", "random", "--ratio", "4", "--out", str(out))
    assert files(run) == before
    assert 4 <= made["bytes_before"] / made["bytes_after"] < 4.5
    assert made["bytes_before"] == 4 * made["parameters_before"] == 4 * (24 * 75 + 20 * 25)
    assert made["units"] == [7, 5] and made["bytes_after"] == 4 * (7 * 75 + 5 * 8)
    for when in ("before", "after"):
        assert len(made[f"class_accuracy_{when}"]) == 10 and 0 <= made[f"accuracy_{when}"] <= 1
    judged = value(capsys, "eval", str(out), "--backend", "reference")
    assert judged["test_accuracy"] == made["accuracy_after"]
    assert value(capsys, "eval", str(run), "--backend", "reference")["test_accuracy"] == (
        made["accuracy_before"])
    found = checkpoint.load(out)
    assert found.tensors["net.layers.1.weight"].shape == (5, 7)
    assert found.meta["notes"]["edits"][0]["by"] == "random"
    tuned = value(capsys, "train", "--resume", str(out), "--epochs", "2", "--quiet")
    assert tuned["epochs_in_all"] == 2  # fine-tuning is asked for, and trains the small network
    assert checkpoint.load(out).tensors["net.layers.1.weight"].shape == (5, 7)


@pytest.mark.parametrize("by", ["ends", "threshold", "goodness"])
def test_other_methods(capsys, tmp_path, run, by):
    made = value(capsys, "prune", str(run), "--by", by, "--ratio", "2", "--samples", "50",
                 "--out", str(tmp_path / by))
    assert made["bytes_before"] / made["bytes_after"] >= 2 and made["by"] == by


@pytest.mark.parametrize("words, expected", [
    (["--ratio", "0.5"], "--ratio expected a number of 1 or more, got 0.5"),
    (["--ratio", "nan"], "--ratio expected a number of 1 or more, got nan"),
    (["--ratio", "1000"], "a compression ratio expected at most"),
    (["--ratio", "2", "--layers", "0", "2"], "expected a layer of 0..1, got 2"),
    (["--ratio", "2", "--by", "luck"], "--by must be one of random"),
    (["--ratio", "2", "--by", "first", "--samples", "0"], "--samples expected 1 or more, got 0")])
def test_refusals_change_nothing(capsys, tmp_path, run, words, expected):
    before = files(run)
    status = main(["prune", str(run), *words, "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1 and expected in err
    assert files(run) == before and not list(tmp_path.iterdir())


def test_a_damaged_run(capsys, tmp_path, run):
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    path = broken / checkpoint.LATEST
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    for command in (["prune", str(broken), "--ratio", "2", "--out", str(tmp_path / "out")],
                    ["analyze", "prunability", str(broken), "--out", str(tmp_path / "out")]):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "is damaged" in err
    assert not (tmp_path / "out").exists()


def test_curves_over_seeds(capsys, tmp_path, run):
    pytest.importorskip("matplotlib")
    other = tmp_path / "bp"
    assert main(["train", "bp/fflib/bpnn", *TRAIN, "--set", "layers=(24,20)", "--out",
                 str(other)]) == 0
    capsys.readouterr()
    made = value(capsys, "analyze", "prunability", str(run), str(other), "--ratios", "1", "2", "4",
                 "--seeds", "3", "--quiet", "--out", str(tmp_path / "out"))
    with (tmp_path / "out" / "prunability.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 3
    assert {r["model"] for r in rows} == {"fflib/ffnn", "bp/fflib/bpnn"}
    here = [float(r["accuracy"]) for r in rows
            if (r["model"], float(r["ratio"])) == ("fflib/ffnn", 4)]
    point = made["curves"]["fflib/ffnn"][2]
    assert point["ratio"] == 4 and point["count"] == 3
    assert point["mean"] == pytest.approx(sum(here) / 3)
    assert (point["least"], point["most"]) == (min(here), max(here))
    assert made["curves"]["fflib/ffnn"][0]["deviation"] == 0  # a ratio of 1 removes nothing
    assert (tmp_path / "out" / "prunability.png").read_bytes().startswith(b"\x89PNG")


def test_watching_on_the_command_line(capsys, tmp_path):
    out = tmp_path / "run"
    words = ["train", "fflib/ffnn", *TRAIN, "--set", "layers=(12,10)", "--out", str(out)]
    assert main([*words, "--watch", "separation,dead", "--watch-every", "step"]) == 0
    with (out / "history.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["separation_1"]) == pytest.approx(
        float(row["g_pos_1"]) - float(row["g_neg_1"]))
    assert 0 <= float(row["inactive_0"]) <= 1
    assert (out / "steps.csv").read_text().startswith("epoch,step,g_pos_0,g_neg_0,separation_0,")
    shutil.rmtree(out)
    capsys.readouterr()
    for wrong, expected in ((["--watch", "everything"], "got 'everything'"),
                            (["--watch", "dead", "--watch-samples", "0"], "1 or more, got 0"),
                            (["--watch", "gamma"], "expected a collaborative network")):
        assert main([*words, *wrong]) == 2
        out_, err = capsys.readouterr()
        assert out_ == "" and err.count("\n") == 1 and expected in err
        assert not (out / checkpoint.LATEST).exists()
