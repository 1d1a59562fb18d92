"""`ffengine grow` and `degenerate`: what they print, and the runs that they write."""

from __future__ import annotations

import json

import pytest
import torch

from ffengine.cli import main
from ffengine.engine.run import checkpoint

KEYS = {f"{name}_{when}" for name in ("accuracy", "class_accuracy", "parameters", "bytes")
        for when in ("before", "after")}


def run(capsys, *words):
    """(status, stdout, stderr)."""
    status = main(list(words))
    out, err = capsys.readouterr()
    return status, out.strip(), err


def value(capsys, *words):
    status, out, err = run(capsys, *words, "--json")
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("runs") / "run")
    assert main(["train", "sn/mlp", "--data", "digits", "--set", "layers=(30,)", "--epochs", "4",
                 "--lr", "2e-3", "--quiet", "--out", out]) == 0
    return out


def test_grow_degenerate_eval_export_resume(capsys, tmp_path, trained):
    bigger, smaller = str(tmp_path / "bigger"), str(tmp_path / "smaller")
    capsys.readouterr()
    judged = value(capsys, "eval", trained)
    grown = value(capsys, "grow", trained, "--out", bigger, "--lr", "1e-3")
    assert KEYS | {"grown_class"} <= grown.keys()
    label = grown["grown_class"]
    assert grown["accuracy_before"] == judged["test_accuracy"]
    assert grown["class_accuracy_after"][label] > grown["class_accuracy_before"][label]
    assert len(grown["class_accuracy_after"]) == 10
    assert grown["parameters_after"] - grown["parameters_before"] == 65
    assert grown["bytes_after"] == 4 * grown["parameters_after"]
    assert value(capsys, "eval", bigger)["test_accuracy"] == grown["accuracy_after"]
    assert value(capsys, "eval", bigger, "--checkpoint", "best")["test_accuracy"] == grown[
        "accuracy_after"]

    less = value(capsys, "degenerate", bigger, "--out", smaller)
    assert less["accuracy_before"] == grown["accuracy_after"] and len(less["removed"]) == 2
    assert less["parameters_after"] == less["parameters_before"] - 130
    found = checkpoint.load(smaller)
    assert [e["kind"] for e in found.meta["notes"]["edits"]] == ["grow", "degenerate"]
    assert found.tensors["optimizer.layers.0.weight.m"].shape == (29, 64)
    assert value(capsys, "export", smaller)["bytes"] > 0
    again = value(capsys, "train", "--resume", smaller, "--quiet")
    assert again["test_accuracy"] == less["accuracy_after"]


def test_an_edited_run_trains_on(capsys, tmp_path):
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    assert main(["train", "deeperforward/tinycnn", "--data", "synthetic", "--data-set",
                 "shape=(1,8,8)", "--data-set", "train=64", "--data-set", "test=40", "--set",
                 "widths=(10,20,20,20)", "--batch-size", "32", "--epochs", "1", "--quiet",
                 "--out", first]) == 0
    capsys.readouterr()
    value(capsys, "degenerate", first, "--layer", "1", "--lowest", "3", "--out", second)
    result = value(capsys, "train", "--resume", second, "--epochs", "2", "--quiet")
    assert result["epochs_in_all"] == 2
    weight = checkpoint.load(second).tensors["net.layers.1.weight"]
    assert weight.shape[0] == 17 and not torch.equal(weight, checkpoint.load(first).tensors[
        "net.layers.1.weight"][:17])


@pytest.mark.parametrize(("words", "said"), [
    (["grow", "RUN", "--layer", "3"], "expected a layer of 0..0, got 3"),
    (["grow", "RUN", "--class", "10"], "expected a class of 0..9, got 10"),
    (["grow", "RUN", "--threshold", "2"], "accuracy in [0, 1]"),
    (["grow", "RUN", "--out", "RUN"], "without a run"),
    (["degenerate", "RUN", "--lowest", "21"], "at most 20 neurons, so that every set keeps one"),
    (["degenerate", "RUN", "--lowest", "1", "--threshold", "0"], "not allowed with"),
    (["grow", "nowhere"], "got nowhere"),
    (["degenerate", "DAMAGED"], "damaged"),
])
def test_what_is_wrong_is_one_line_and_writes_nothing(capsys, tmp_path, trained, monkeypatch,
                                                      words, said):
    monkeypatch.chdir(tmp_path)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    data = bytearray(checkpoint.locate(trained).read_bytes())
    data[-9] ^= 1
    (damaged / checkpoint.LATEST).write_bytes(data)
    before = checkpoint.locate(trained).read_bytes()
    names = {"RUN": trained, "DAMAGED": str(damaged)}
    status, out, err = run(capsys, *(names.get(w, w) for w in words))
    assert status == 2 and not out and said in err and len(err.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]
    assert checkpoint.locate(trained).read_bytes() == before


def test_a_threshold_that_no_class_is_below_grows_nothing(capsys, tmp_path, trained):
    result = value(capsys, "grow", trained, "--threshold", "0", "--out", str(tmp_path / "same"))
    assert result["grown_class"] is None
    assert result["parameters_after"] == result["parameters_before"]
    assert result["class_accuracy_after"] == result["class_accuracy_before"]
