"""Callbacks: who is told what and when, columns, refusals; nobody is asked in vain."""

from __future__ import annotations

import pytest
import torch
from engine.training import batch, loaders, trainer

import ffengine as ff
from ffengine.engine.run.history import read_rows, read_steps


class Diary(ff.Callback):
    """Notes what it is told."""

    def __init__(self):
        self.lines = []

    def on_fit(self, trainer):
        self.lines.append("fit")

    def on_step(self, trainer, batch, report):
        self.lines.append(f"step {trainer.steps} of {len(batch.y)}")
        return {"first": report.losses[0], "batch": len(batch.y)}

    def on_epoch(self, trainer, row):
        self.lines.append(f"epoch {row.epoch}")
        return {"double": 2 * row.loss, "nothing": None}

    def on_checkpoint(self, trainer, path):
        assert trainer.history.rows and path.exists()
        self.lines.append(f"checkpoint {path.name}")


def test_order_and_columns(tmp_path):
    train, valid, _ = loaders()
    t, diary = trainer(epochs=2, out=tmp_path), Diary()
    t.fit(train, valid, callbacks=[diary])
    steps = [f"step {n} of {16 if n % 3 else 8}" for n in range(1, 7)]
    assert diary.lines == ["fit", *steps[:3], "epoch 0", "checkpoint latest.safetensors",
                           *steps[3:], "epoch 1", "checkpoint latest.safetensors"]
    row = read_rows(tmp_path / "history.csv")[1]
    assert row.extra == {"double": 2 * row.loss, "nothing": None}
    found = read_steps(tmp_path / "steps.csv")
    assert [r["batch"] for r in found] == ["16", "16", "8"] * 2
    mean = sum(float(r["first"]) * int(r["batch"]) for r in found[3:]) / 40
    assert mean == pytest.approx(row.losses[0], rel=1e-6)
    t.fit(train, valid)
    assert len(diary.lines) == 11


def test_nobody_listens_nothing_is_attached(monkeypatch):
    from ffengine.engine.run import callbacks

    monkeypatch.setattr(callbacks, "Listener", None)
    contexts = []
    t = trainer(epochs=1)
    made = t._context
    monkeypatch.setattr(t, "_context", lambda item: contexts.append(made(item)) or contexts[-1])
    t.fit([batch()], callbacks=[Diary()])
    assert contexts[0].hook is None and contexts[0].grads is None


def test_instructions_are_those_of_the_program():
    class Lines(ff.Callback):
        def __init__(self):
            self.ops = []

        def on_instruction(self, at, line, seconds):
            assert seconds >= 0
            self.ops.append((line.op, line.index))

    lines = Lines()
    trainer(epochs=1).fit([batch()], callbacks=[lines])
    assert ("encode", 0) in lines.ops
    assert [i for op, i in lines.ops if op == "update"] == [0, 1, 2, 3]


def test_a_callback_may_end_training(tmp_path):
    class Enough(ff.Callback):
        def on_checkpoint(self, trainer, path):
            raise KeyboardInterrupt

    t = trainer(epochs=2, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        t.fit([batch()], callbacks=[Enough()])
    again = trainer(epochs=2, out=tmp_path)
    again.resume(tmp_path)
    assert again.epoch == 1 and len(again.history.rows) == 1


def test_refusals_are_one_line():
    class Twice(ff.Callback):
        def on_epoch(self, trainer, row):
            return {"loss": torch.zeros(())}

    with pytest.raises(TypeError, match=r"^\[train\] callbacks expected a list of Callback "
                       r"objects, got \['separation'\]$"):
        trainer(epochs=1).fit([batch()], callbacks=["separation"])
    with pytest.raises(ValueError, match=r"^\[callbacks\] expected every column once, got loss"):
        trainer(epochs=1).fit([batch()], callbacks=[Twice()])
