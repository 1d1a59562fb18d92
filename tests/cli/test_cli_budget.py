"""`plan` and `train` under a memory budget: what they print, and what they refuse before data."""

from __future__ import annotations

import json
from typing import Any

import pytest
from models.every import TINY

from ffengine.cli import main
from ffengine.commands import train as command
from ffengine.engine.memory.budget import megabytes

NET = ["deeperforward/tinycnn", "--set", "widths=(10,20,20,20)", "--batch-size", "32",
       "--backend", "cpu", "--costs", "modelled"]
SHAPE = ["--set", "in_channels=1", "--set", "image_size=8"]
DATA = ["--data", "synthetic", "--data-set", "shape=(1,8,8)", "--data-set", "train=64",
        "--data-set", "test=16", "--epochs", "1", "--quiet"]


def value(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    status = main([*words, "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out.strip().splitlines()[-1])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    return err


def least(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the error of an impossible budget says is enough."""
    err = refused(capsys, "plan", *NET, *SHAPE, *words, "--memory-budget", "1kB")
    amount = err.partition("the smallest needs ")[2].partition(" at batch 32")[0]
    assert amount.endswith(" kB"), err
    return amount.replace(" ", "")


def test_plan_says_what_a_budget_took(capsys: pytest.CaptureFixture[str]) -> None:
    free = value(capsys, "plan", *NET, *SHAPE)
    assert (free["gave_up"], free["costs"], free["seconds_per_step"]) == ([], "modelled", None)
    tight = value(capsys, "plan", *NET, *SHAPE, "--memory-budget", least(capsys))
    assert tight["peak_bytes"] <= tight["memory_budget"] < free["peak_bytes"]
    assert (tight["state_precision"], tight["weight_precision"]) == ("8bit", "fp32")
    assert tight["gave_up"][0].startswith("optimizer states in 8-bit blocks instead of fp32: saves")
    assert tight["gave_up"][1].startswith("the fastest plan needs ")
    assert main(["plan", *NET, *SHAPE, "--memory-budget", least(capsys)]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  gave up: {what}\n" in text for what in tight["gave_up"])


def test_plan_predicts_seconds_by_measured_costs(capsys: pytest.CaptureFixture[str]) -> None:
    found = value(capsys, "plan", *NET[:-2], *SHAPE, "--memory-budget", "1MB")
    assert found["costs"] == "measured" and 0 < found["seconds_per_step"] < 60


def test_precisions_on_the_command_line_stand(capsys: pytest.CaptureFixture[str]) -> None:
    bf16 = least(capsys, "--states", "bf16")
    assert value(capsys, "plan", *NET, *SHAPE, "--states", "bf16",
                 "--memory-budget", bf16)["state_precision"] == "bf16"
    assert "bf16 and weights in fp32" in refused(
        capsys, "plan", *NET, *SHAPE, "--states", "bf16", "--memory-budget", least(capsys))


def test_train_within_a_budget(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    budget = least(capsys, "--precision", "bf16")
    words = [*NET, *DATA, "--precision", "bf16", "--memory-budget", budget]
    result = value(capsys, "train", *words, "--out", str(tmp_path / "a"))
    assert (result["state_precision"], result["weight_precision"]) == ("8bit", "bf16")
    assert result["plan"]["peak_bytes"] <= result["memory_budget"]
    assert result["peak_bytes"] <= 1.02 * result["memory_budget"]
    assert len(result["gave_up"]) == 3
    loud = [w for w in words if w != "--quiet"]
    assert main(["train", *loud, "--out", str(tmp_path / "b")]) == 0
    err = capsys.readouterr().err
    assert all(f"gave up: {what}\n" in err for what in result["gave_up"])
    again = value(capsys, "train", "--resume", str(tmp_path / "a"), "--epochs", "2", "--quiet",
                  "--costs", "modelled")
    assert again["state_precision"] == "8bit" and again["gave_up"] == result["gave_up"]


@pytest.mark.parametrize("budget", ["10kB", "lots", "1e3", "0"])
@pytest.mark.parametrize("data", [DATA, ["--data", "cifar10"], ["--data", "digits"]])
def test_impossible_budgets_are_refused_before_the_data(
        budget: str, data: list[str], capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load_data", None)
    err = refused(capsys, "train", *NET, *data, "--memory-budget", budget)
    assert ("no plan fits 10.0 kB: the smallest needs" if budget == "10kB" else "440MB") in err


@pytest.mark.parametrize("words", [["--data-set", "shape=wide"], ["--data-set", "train=few"]])
def test_bad_data_options_stay_the_loaders_to_refuse(
        words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "[memory]" not in refused(capsys, "train", *NET, *DATA, *words,
                                     "--memory-budget", "10kB")


SUPER = ["sn/cifar100", "--set", "image_size=16", "--set", "widths=(20,20,20,20,20,20,20)"]


def test_plan_takes_clusters_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    classes = ["--set", "num_classes=10", "--batch-size", "4"]
    given = value(capsys, "plan", *SUPER, *classes, "--set", "superclasses=(0,1,2,3,4,0,1,2,3,4)")
    assert value(capsys, "plan", *SUPER, *classes, "--set", "superclasses=cluster:5") == given
    assert "at most one for each of the 10 classes, got 11" in refused(
        capsys, "plan", *SUPER, *classes, "--set", "superclasses=cluster:11")
    assert "cluster:S" in refused(capsys, "plan", *SUPER, "--set", "superclasses=cluster:x")


def test_clusters_of_the_data_are_trained_on(capsys: pytest.CaptureFixture[str],
                                             tmp_path: Any) -> None:
    result = value(capsys, "train", *SUPER, "--set", "superclasses=cluster:5", "--set",
                   "num_classes=10", "--data", "synthetic", "--data-set", "shape=(3,16,16)",
                   "--data-set", "train=20", "--data-set", "test=10", "--epochs", "1", "--quiet",
                   "--batch-size", "10", "--out", str(tmp_path / "run"), "--memory-budget", "1GB",
                   "--costs", "modelled")
    assert result["epochs"] == 1


@pytest.mark.parametrize("model", ["sn/mlp", "cff/adaptive", "cafo/cnn"])
def test_features_kept_between_layers_are_in_every_plan(
        model: str, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    """`plan --data`, the line before training and what training meters tell one number."""
    data = ["--data", "digits", "--epochs", "1", "--batch-size", "64"]
    planned = value(capsys, "plan", model, *data[:2], *data[4:])
    trained = value(capsys, "train", model, *data, "--quiet", "--out", str(tmp_path / "run"))
    assert planned["peak_bytes"] == trained["plan"]["peak_bytes"]
    assert trained["peak_bytes"] == pytest.approx(planned["peak_bytes"], rel=0.02)


@pytest.mark.parametrize("model", [
    "cff/fixed", "cwcomp/ffcnn", "deeperforward/tinycnn", "fflib/ffnn", "fflib/ffrnn",
    "hinton/peer-norm", "hinton/threshold", "sn/mlp", "symba/mlp", "trifecta/fcn"])
def test_three_places_tell_one_plan(model: str, capsys: pytest.CaptureFixture[str],
                                    tmp_path: Any) -> None:
    """`plan --data`, the line before training and the end of it, for every kind of schedule."""
    side = TINY[model]["image_size"]
    words = [model, "--data", "synthetic", "--data-set", f"shape=(1,{side},{side})", "--data-set",
             "train=40", "--data-set", "test=8", "--batch-size", "16"]
    for name, option in TINY[model].items():
        words += [] if name == "image_size" else ["--set", f"{name}={option}"]
    planned = value(capsys, "plan", *words)["peak_bytes"]
    assert main(["train", *words, "--epochs", "1", "--json", "--out", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    trained = json.loads(out.strip().splitlines()[-1])
    assert trained["plan"]["peak_bytes"] == planned
    assert f", plan {megabytes(planned)} (" in err
    assert trained["peak_bytes"] == pytest.approx(planned, rel=0.02)
