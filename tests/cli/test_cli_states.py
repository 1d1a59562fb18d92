"""--states and --weights: train, evaluate, resume, export and plan with fewer bits."""

from __future__ import annotations

import json

import pytest
import torch

from ffengine.cli import main

SMALL = ["--set", "widths=(10,20,40,40)", "--batch-size", "16"]
FEWER = ["--precision", "bf16", "--states", "8bit", "--weights", "bf16"]
TRAIN = ["train", "deeperforward/tinycnn", *SMALL, "--data", "synthetic", "--data-set",
         "shape=(1,8,8)", "--data-set", "train=48", "--data-set", "test=16", "--quiet"]


def value(capsys, *words):
    status = main([*words, "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out.strip().splitlines()[-1])


@pytest.fixture
def trained(capsys, tmp_path):
    """(folder, result) of two epochs in the fewest bits."""
    out = str(tmp_path / "run")
    return out, value(capsys, *TRAIN, *FEWER, "--epochs", "2", "--out", out)


def test_a_run_in_fewer_bits_is_judged_and_exported(capsys, trained):
    out, result = trained
    assert (result["state_precision"], result["weight_precision"]) == ("8bit", "bf16")
    assert value(capsys, "eval", out)["test_accuracy"] == result["test_accuracy"]
    program = torch.export.load(value(capsys, "export", out)["path"]).module()
    assert program(torch.zeros(3, 1, 8, 8)).dtype is torch.float32
    from safetensors.torch import load_file

    weights = load_file(value(capsys, "export", out, "--format", "safetensors")["path"])
    assert weights["layers.3.weight"].dtype is torch.bfloat16
    assert weights["layers.0.weight"].dtype is torch.float32


def test_resume_takes_the_runs_bits_and_refuses_others(capsys, trained):
    out, _ = trained
    again = value(capsys, "train", "--resume", out, "--epochs", "3", "--quiet")
    assert again["epochs"] == 3
    assert (again["state_precision"], again["weight_precision"]) == ("8bit", "bf16")
    assert main(["train", "--resume", out, "--epochs", "4", "--states", "bf16", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert "expected states bf16, got 8bit" in err and len(err.strip().splitlines()) == 1


def test_the_plan_counts_fewer_bits(capsys):
    plan = ["plan", "deeperforward/tinycnn", *SMALL, "--precision", "bf16"]
    floors = [value(capsys, *plan, *more)["floor_bytes"]
              for more in ([], ["--states", "bf16"], ["--states", "8bit"], FEWER[2:])]
    assert floors == sorted(floors, reverse=True) and len(set(floors)) == 4
    assert floors[1] / floors[0] < 0.7 and floors[3] / floors[0] < 0.36
    assert main([*plan[:-1], "fp32", "--weights", "bf16"]) == 2
    assert "weights=bf16 expected precision bf16, got fp32" in capsys.readouterr().err
