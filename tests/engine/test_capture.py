"""A captured step trains as ordinary ones do; where none can be captured it says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.every import batch, network, state, trainer

import ffengine as ff
from ffengine.engine.capture import why_not


def test_without_a_gpu_every_step_is_an_ordinary_one() -> None:
    mine, told = (trainer(network("deeperforward/tinycnn")) for _ in range(2))
    replay = mine.capture(*batch(mine.net))
    assert replay.reason == "the network is on cpu, not on a GPU"
    for i in range(3):
        made, expected = replay(*batch(mine.net, seed=i)), told.step(*batch(told.net, seed=i))
        assert all(torch.equal(a, b) for a, b in zip(made.losses, expected.losses, strict=True)
                   if a is not None and b is not None)
    replay()
    told.step(*batch(told.net, seed=2))
    assert mine.steps == told.steps == 4
    assert all(torch.equal(v, state(told.net)[k]) for k, v in state(mine.net).items())


@pytest.mark.parametrize(("name", "settings", "reason"), [
    ("trifecta/shallow", {}, "not every batch takes the same step"),
    ("deeperforward/tinycnn", {"micro_batch": 4}, "not every batch takes the same step"),
    ("hinton/threshold", {}, "the host draws a part of every batch"),
    ("fflib/ffrnn", {}, "the host draws a part of every batch"),
    ("bp/deeperforward/tinycnn", {}, "the reference's steps take their numbers from the host"),
    ("deeperforward/tinycnn", {}, None), ("cwcomp/ffcnn", {}, None),
])
def test_reasons(name: str, settings: dict[str, Any], reason: str | None,
                 monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(network(name), **settings)
    monkeypatch.setattr(t, "device", torch.device("cuda"))
    assert why_not(t) == reason


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", ["deeperforward/resnet17", "cwcomp/ffcnn"])
def test_replays_are_steps(name: str, backend: str, precision: str) -> None:
    """Dropout, rates that fall, a weight that somebody edits on the way."""
    def run(captured: bool) -> ff.Trainer:
        t = trainer(network(name), device="cuda", backend=backend, precision=precision,
                    epochs=20, lr=0.05)
        x, y = batch(t.net)
        if captured:
            replay: Any = t.capture(x, y)
            assert replay.reason is None
        else:
            replay = t.step
            for _ in range(2):
                t.step(x, y)
        for i in range(6):
            if i == 3:
                with torch.no_grad():
                    t.net.layer(0).weight.mul_(0.5)
            for group in t.optimizer.param_groups:
                group["lr"] = 0.05 / (i + 1)
            replay(*batch(t.net, seed=i))
        return t

    plain, captured = run(False), run(True)
    assert plain.steps == captured.steps == 8
    for key, value in state(plain.net).items():
        assert torch.equal(value, state(captured.net)[key]), key
    assert [s.step for s in plain.optimizer.states.values()] == [
        s.step for s in captured.optimizer.states.values()]
