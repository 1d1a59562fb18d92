"""`ffengine train --stages N`: started plainly, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from ffengine import cli
from ffengine.engine.parallel import launch
from ffengine.engine.run import checkpoint

SMALL = ["--data", "synthetic", "--data-set", "train=40", "--data-set", "shape=(1,8,8)",
         "--set", "image_size=8", "--batch-size", "16", "--epochs", "1", "--costs", "modelled"]
TINY = ["train", "deeperforward/tinycnn", "--set", "widths=(10,20,20,20)", *SMALL]


def test_a_plain_command_starts_the_other_stages(
        tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TINY, "--stages", "2", "--json", "--out", str(tmp_path / "two")]) == 0
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & os.environ.keys()
    out, err = capfd.readouterr()
    said = json.loads(out.splitlines()[-1])
    assert cli.main([*TINY, "--quiet", "--json", "--out", str(tmp_path / "one")]) == 0
    alone = json.loads(capfd.readouterr().out.splitlines()[-1])
    for key in ("test_accuracy", "valid_accuracy", "layer_range", "epochs_in_all"):
        assert said[key] == alone[key], key
    two, one = (checkpoint.load(tmp_path / name).tensors for name in ("two", "one"))
    assert two.keys() == one.keys() and all(torch.equal(t, two[k]) for k, t in one.items())

    stages = said["stages"]
    assert [s["layers"][0] for s in stages] == [0, stages[0]["layers"][1] + 1]
    assert sum(s["share"] for s in stages) == pytest.approx(1)
    # parameters and states of a stage are its own; together they are the network's
    assert sum(s["floor_bytes"] for s in stages) == alone["floor_bytes"]
    for stage in stages:
        assert stage["floor_bytes"] < stage["peak_bytes"] <= stage["planned_bytes"]
        assert stage["resident_bytes"] > 50e6
        first, last = stage["layers"]
        assert f"stage {stage['rank']}: layers {first}-{last}, " in err
    names = [{p.name for p in (tmp_path / run).iterdir() if not p.name.startswith("events")}
             for run in ("two", "one")]
    assert names[0] == names[1] >= {"latest.safetensors", "best.safetensors", "history.csv"}


@pytest.mark.parametrize(("words", "said"), [
    ([*TINY, "--stages", "5"], "stages expected at most 4, one a layer, got 5"),
    ([*TINY, "--stages", "0"], "stages expected a whole number of at least 1, got 0"),
    ([*TINY, "--stages", "2", "--timeout", "-1"], "timeout expected seconds above 0, got -1.0"),
    ([*TINY, "--timeout", "9"], "--timeout 9 expected a run with --stages"),
    ([*TINY, "--stages", "2", "--watch", "gradient"], "--watch expected a run of one process"),
    (["train", "sn/mlp", *SMALL, "--stages", "2"], "trains one layer at a time"),
    (["train", "trifecta/shallow", *SMALL, "--stages", "2"],
     "a loss trains the layer before its own too"),
])
def test_what_cannot_be_a_pipeline_is_refused_at_once(
        tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], said: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Before another process is started, or a folder made."""
    monkeypatch.setattr(launch.subprocess, "Popen", None)
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 2
    out, err = capfd.readouterr()
    assert not out and len(err.splitlines()) == 1 and said in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("env", "said"), [
    ({"RANK": "0"}, "expected a rendezvous, as torchrun --nproc-per-node 2 gives, got no "
                    "WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
    ({"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
     "expected 2 processes, one a stage, got WORLD_SIZE=3"),
    ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
     "expected 2 ranks to meet at 127.0.0.1:1 within 1 s, got [Errno 111] Connection refused"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "free"},
     "within 1 s, got no rank 1")])
def test_a_missing_rendezvous_is_one_line(capfd: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch, env: dict[str, str],
                                          said: str) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value if value != "free" else str(launch.free_port()))
    assert cli.main([*TINY, "--stages", "2", "--timeout", "1"]) == 2
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 1 and said in err[0]
