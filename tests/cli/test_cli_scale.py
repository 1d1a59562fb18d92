"""How pixels are scaled: the model's way unless --data-set says otherwise; a run keeps it."""

from __future__ import annotations

import json

import pytest

from ffengine.cli import main
from ffengine.commands import options, runs, train
from ffengine.engine.run import checkpoint

SMALL = ["--data", "synthetic", "--data-set", "shape=(1,8,8)", "--data-set", "train=48",
         "--data-set", "test=16", "--set", "layers=(20,10)", "--batch-size", "16", "--epochs", "1",
         "--backend", "reference", "--quiet"]


@pytest.fixture
def loaded(monkeypatch):
    """(mean, sd) of every data set that a command loads."""
    found = []

    def load(*args):
        splits = options.load_data(*args)
        found.append((*splits.train.mean, *splits.train.std))
        return splits

    for command in (train, runs):
        monkeypatch.setattr(command, "load_data", load)
    return found


def value(capsys, *words):
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize("model, words, mean, std", [
    ("fflib/ffnn", [], 0.0, 1.0), ("sn/mlp", [], 0.0, 1.0), ("symba/mlp", [], 0.5, 0.15),
    ("fflib/ffnn", ["--data-set", "normalize=set"], 0.5, 0.15),
    ("symba/mlp", ["--data-set", "normalize=off"], 0.0, 1.0),
    ("symba/mlp", ["--data-set", "normalize=(0.25, [0.5])"], 0.25, 0.5)])
def test_a_run_keeps_its_scale(capsys, tmp_path, loaded, model, words, mean, std):
    out = str(tmp_path / "run")
    made = value(capsys, "train", model, *SMALL, *words, "--out", out)
    assert value(capsys, "eval", out, "--backend", "reference")["test_accuracy"] == made[
        "test_accuracy"]
    value(capsys, "train", "--resume", out, "--quiet")
    assert loaded[0] == pytest.approx((mean, std), abs=0.05)
    assert loaded == [loaded[0]] * 3


def test_runs_that_do_not_say_took_the_sets(capsys, tmp_path, loaded, monkeypatch):
    """Checkpoints of before recipes had a scale."""
    out = str(tmp_path / "run")
    value(capsys, "train", "fflib/ffnn", *SMALL, "--out", out)
    load = checkpoint.load

    def older(*args):
        found = load(*args)
        notes = found.meta["notes"]
        notes["data_options"] = [w for w in notes["data_options"] if "normalize" not in w]
        return found

    monkeypatch.setattr(checkpoint, "load", older)
    value(capsys, "eval", out, "--backend", "reference")
    value(capsys, "train", "--resume", out, "--quiet")
    written, read, resumed = loaded
    assert written == (0.0, 1.0) and read == resumed != written


def test_what_is_no_scale_is_one_line(capsys):
    assert main(["train", "sn/mlp", *SMALL, "--data-set", "normalize=half"]) == 2
    err = capsys.readouterr().err
    assert "[data] normalize expected off, set, or" in err and err.count("\n") == 1
