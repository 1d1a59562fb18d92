"""`ffengine train --baselines`: every kind of network has opponents that really train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ffengine.cli import main
from ffengine.commands import baselines

SMALL = ["--data", "synthetic", "--data-set", "train=64", "--data-set", "valid=8", "--data-set",
         "test=64", "--data-set", "shape=(1,8,8)", "--epochs", "2", "--batch-size", "16",
         "--quiet", "--json", "--baselines"]


@pytest.mark.parametrize("words, plain", [
    (["sn/mlp", "--set", "layers=(20,20)"], "unfused PyTorch step"),
    (["symba/mlp", "--set", "layers=(20,20)"], "unfused PyTorch step"),
    (["cff/fixed", "--set", "layers=(20,20)"], "reference back-end")])
def test_every_kind_has_its_opponents(words: list[str], plain: str, tmp_path: Path,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words, *SMALL, "--out", str(tmp_path / "run")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["baselines"]
    assert [row["name"] for row in found] == ["ffengine", plain, "backpropagation"]
    for row in found:
        assert 0 <= row["test_accuracy"] <= 1 and row["seconds_per_epoch"] > 0
        assert row["metered_bytes"] > 4 * 64 * 20


def test_layerwise_opponents_train_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, list[int]] = {}
    train = baselines.train_opponent

    def spied(opponent: baselines.Opponent, *rest: object) -> baselines.Outcome:
        step = opponent.step
        epochs = seen.setdefault(opponent.name, [])

        def noted(x: object, y: object, epoch: int, iteration: int) -> object:
            epochs.append(epoch)
            return step(x, y, epoch, iteration)  # type: ignore[arg-type]

        opponent.step = noted
        return train(opponent, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(baselines, "train_opponent", spied)
    words = ["train", "sn/mlp", "--set", "layers=(20,20)", *SMALL]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert sorted(set(seen["unfused PyTorch step"])) == [0, 1, 2, 3]
    assert sorted(set(seen["backpropagation"])) == [0, 1]


def test_twins_are_opponents_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "bp/sn/mlp", *SMALL]) == 2
    assert "local training" in capsys.readouterr().err
