"""Checkpoints: bit-exact resume, refusal of what does not fit, atomic replacement."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from engine.training import batch, loaders, network, same, trainer, weights

from ffengine.engine.run import checkpoint
from ffengine.engine.run.stopping import TrainingStopped


def states(t):
    return t.optimizer.export_state()[0]


@pytest.fixture
def saved(tmp_path):
    """A run of two epochs of four."""
    train, valid, _ = loaders()
    t = trainer(out=tmp_path)
    t.fit(train, valid, until=2)
    return tmp_path


def test_resume_is_bit_exact(saved):
    train, valid, _ = loaders()
    straight = trainer()
    straight.fit(train, valid)
    resumed = trainer(net=network(5), out=saved)  # other weights, replaced by the checkpoint's
    resumed.resume(saved)
    resumed.fit(train, valid)
    assert same(weights(straight.net), weights(resumed.net))
    assert same(states(straight), states(resumed))
    assert [r.losses for r in resumed.history.rows] == [r.losses for r in straight.history.rows]
    assert [r.lr for r in resumed.history.rows] == [r.lr for r in straight.history.rows]


def test_one_file_holds_weights_states_and_json(saved):
    from safetensors import safe_open

    with safe_open(saved / "latest.safetensors", framework="pt") as file:
        meta = json.loads(file.metadata()["json"])
        names = set(file.keys())
    assert meta["model"]["name"] == "deeperforward/tinycnn" and meta["settings"]["seed"] == 0
    assert meta["position"]["epoch"] == 2 and meta["layer_range"] == [1, 3]
    assert {"versions", "settings", "backend", "plan", "lr", "optimizer"} <= meta.keys()
    assert {"net.layers.0.weight", "net._extra_state", "optimizer.layers.3.weight.v"} <= names
    assert (saved / "best.safetensors").exists()


def test_saving_leaves_the_live_net_alone(tmp_path):
    t = trainer()
    before, layout = weights(t.net), t.net.layer(1).weight.stride()
    t.save(tmp_path / "x.safetensors")
    t.step(*batch())
    assert not same(before, weights(t.net)) and t.net.layer(1).weight.stride() == layout
    with pytest.raises(ValueError, match="run folder"):
        t.save()


def refused(tmp_path, text, **options):
    t = trainer(**options)
    before = weights(t.net)
    with pytest.raises(ValueError, match=text) as caught:
        t.resume(tmp_path)
    assert "\n" not in str(caught.value)
    assert same(before, weights(t.net)) and t.epoch == 0


@pytest.mark.parametrize("cut", [0, 4, 60, 2000, -1])
def test_truncated_file_is_refused(saved, cut):
    path = saved / "latest.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    refused(saved, "truncated or damaged")


def test_flipped_bit_is_refused(saved):
    path = saved / "latest.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    refused(saved, "does not match its digest")


def test_edited_header_is_refused(saved):
    path = saved / "latest.safetensors"
    data = path.read_bytes()
    where = data.index(b'\\"epoch\\": ') + len(b'\\"epoch\\": ')
    path.write_bytes(data[:where] + b"7" + data[where + 1:])
    refused(saved, "does not match its digest")


def test_weights_that_are_not_finite_never_replace_a_checkpoint(saved):
    path = saved / "latest.safetensors"
    kept = path.read_bytes()
    t = trainer(out=saved)
    t.resume(saved)
    t.finite.every = 50  # as on a GPU: what went wrong has not been looked at yet
    with torch.no_grad():
        t.net.layer(1).weight[0, 0, 0, 0] = float("nan")
    t.iteration = 1
    t.step(*batch())
    with pytest.raises(TrainingStopped, match="loss of layer 1"):
        t.save()
    assert path.read_bytes() == kept


def test_foreign_file_and_empty_folder_are_refused(saved):
    path = saved / "latest.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused(saved, "expected a checkpoint of ffengine")
    path.unlink()
    refused(saved, "expected a run folder with latest.safetensors")


def other(name="deeperforward/tinycnn", **options):
    import ffengine as ff

    return ff.models.create(name, **{"in_channels": 1, "image_size": 8,
                                     "widths": (10, 20, 20, 20), **options})


@pytest.mark.parametrize("make, text", [
    (lambda: other(widths=(10, 30, 20, 20)), "layer 1 of weight 30x10x5x5, got weight 20x10x5x5"),
    (lambda: other(num_classes=5), "classes of 5, got 10"),
    (lambda: other(dropout=0.0), "dropout 0.0, got dropout 0.2"),
    (lambda: other(goodness="mean_sq"), "goodness mean_sq, got goodness mean"),
    (lambda: other(image_size=16), "input of"),
    (lambda: other("deeperforward/resnet17", widths=None), "model of deeperforward/resnet17"),
])
def test_other_networks_are_refused_by_name_of_what_differs(saved, make, text):
    if "resnet17" in text:
        import ffengine as ff

        net = ff.models.create("deeperforward/resnet17", in_channels=1, image_size=8,
                               planes=(10, 20, 20, 20), shortcuts=False)
    else:
        net = make()
    refused(saved, text, net=net)


@pytest.mark.parametrize("options, text", [
    ({"seed": 1, "net": network()}, "expected seed 1, got 0"),
    ({"lr": 0.01}, "expected lr 0.01, got 0.08"),
    ({"optimizer": "sgd"}, "expected optimizer sgd, got adamw"),
    ({"precision": "bf16"}, "expected precision bf16, got fp32")])
def test_other_settings_are_refused(saved, options, text):
    refused(saved, text, **options)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_death_while_writing_leaves_the_previous_checkpoint(saved, monkeypatch, moment):
    """The process dies with the new file written in part, or whole but not yet in place."""
    t = trainer(out=saved)
    t.resume(saved)
    kept = (saved / "latest.safetensors").read_bytes()
    t.step(*batch())

    class Died(BaseException):
        pass

    def die(*_):
        raise Died

    monkeypatch.setattr(os, moment, die)
    with pytest.raises(Died):
        t.save()
    monkeypatch.undo()
    assert (saved / "latest.safetensors").read_bytes() == kept
    assert checkpoint.load(saved).meta["position"]["epoch"] == 2
    assert not [p for p in saved.iterdir() if p.name.startswith(".")]


def test_best_outlives_the_next_latest(saved):
    best = (saved / "best.safetensors").read_bytes()
    t = trainer(out=saved)
    t.resume(saved)
    t.step(*batch())
    t.save()
    assert (saved / "best.safetensors").read_bytes() == best
    assert (saved / "latest.safetensors").read_bytes() != best


def test_tensors_of_every_dtype_survive(tmp_path):
    tensors = {str(d): torch.arange(6).reshape(2, 3).t().to(d) for d in checkpoint.DTYPES}
    checkpoint.save(tmp_path / "a", tensors, {"k": [1, None, 0.1]})
    found = checkpoint.load(tmp_path / "a")
    assert same(tensors, found.tensors) and found.meta["k"] == [1, None, 0.1]
