"""Watchers: every number against a plain transcription, columns in all files, nothing when off."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from engine.training import batch, loaders, same, trainer, weights
from models import every as tiny

import ffengine as ff
from ffengine.analysis import watching
from ffengine.analysis.sparsity import sparsity
from ffengine.engine.run.history import read_rows, read_steps
from ffengine.nn import LocalLinear, LocalNet
from ffengine.ops.config import LocalPassConfig, Norm, ce


def chain():
    """Four dense layers of ten class groups, quickly planned."""
    torch.manual_seed(0)
    config = LocalPassConfig(groups=10, loss=ce(), norm=Norm("group"))
    widths = (64, 20, 20, 30, 20)
    return LocalNet([LocalLinear(i, o, config=config) for i, o in pairwise(widths)],
                    num_classes=10, in_shape=(1, 8, 8))


def watched(words, net=None, every="step", epochs=1, **options):
    """(trainer after its epochs on the tests' data, its loaders)."""
    train, valid, test = loaders()
    t = trainer(net=net or chain(), epochs=epochs, precision="fp64", **options)
    t.fit(train, valid, callbacks=watching.watchers(words, test, every))
    return t, (train, valid, test)


def test_separation_of_class_groups_and_of_halves():
    g, y = torch.rand(6, 10, dtype=torch.float64), torch.tensor([3, 1, 0, 9, 9, 4])
    net = chain()
    pos, neg = watching.sides(net, 1, g, y)
    own = torch.stack([g[n, k] for n, k in enumerate(y)])
    others = torch.stack([g[n, c] for n, k in enumerate(y) for c in range(10) if c != k])
    assert torch.allclose(pos, own.mean()) and torch.allclose(neg, others.mean())
    net.layer(1).relabel([0, 0, 1, 1, 2, 2, 3, 3, 4, 5])
    pos, _ = watching.sides(net, 1, g, y)
    assert torch.allclose(pos, (g[0, 1] + g[1, 0] + g[2, 0] + g[3, 5] + g[4, 5] + g[5, 2]) / 6)
    halves = torch.tensor([[5.0], [7.0], [1.0], [2.0]])
    assert watching.sides(net, 0, halves, y[:2]) == (6.0, 1.5)
    assert watching.sides(net, 0, halves, torch.tensor([1, 0, 0, 1])) == (3.5, 4.0)


def test_a_row_is_the_mean_of_the_steps():
    t, _ = watched(["separation"])
    steps, row = t.history.steps, t.history.rows[0].extra
    assert [s["step"] for s in steps] == [0, 1, 2]  # 40 samples in batches of 16
    for name in ("g_pos_0", "g_neg_3", "separation_2"):
        assert row[name] == pytest.approx(sum(s[name] for s in steps) / 3, rel=1e-12)
    assert steps[1]["separation_2"] == pytest.approx(steps[1]["g_pos_2"] - steps[1]["g_neg_2"])


def first_gradients(net, x, y):
    """Gradient norms of a first step, by autograd."""
    found, x = [], net.prepare(x)
    for i in range(len(net.layers)):
        layer = net.layer(i)
        x = net.transform(i, x)
        a = layer.apply_weight(x, layer.weight, layer.bias)
        h = torch.relu(a)
        g = h.flatten(1).view(len(y), 10, -1).mean(2)
        grads = torch.autograd.grad(torch.nn.functional.cross_entropy(g, y),
                                    [p for p in (layer.weight, layer.bias) if p is not None])
        found.append(torch.cat([v.flatten() for v in grads]).norm().item())
        x = layer.infer(x, training=True)[0].detach()
    return found


def test_gradient_norms_are_those_of_autograd():
    x, y = batch(8, torch.float64)
    t = trainer(epochs=1, precision="fp64", net=chain())
    expected = first_gradients(t.net, x, y)
    t.fit([(x, y)], callbacks=[watching.GradientNorm("step")])
    got = [t.history.steps[0][f"grad_norm_{i}"] for i in range(4)]
    assert got == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name, options, updates", [
    ("fflib/ffnn", {"theta": 2.0}, {"layers.0.weight": 1, "layers.1.bias": 1}),
    ("fflib/ffrnn", {"theta": 2.0, "frames": 4, "test_frames": (0, 2)}, {"layers.0.weight": 4}),
    ("bp/fflib/bpnn", {}, {"layers.0.weight": 1, "heads.0.bias": 1})])
def test_gradients_come_once_an_update(name, options, updates):
    class Count(ff.Callback):
        def __init__(self):
            self.seen = {}

        def on_gradient(self, name, gradient):
            self.seen.setdefault(name, []).append(gradient)

    count, net = Count(), ff.models.create(name, image_size=8, layers=(12, 9), **options)
    trainer(net=net, epochs=1).fit([batch()], callbacks=[count])
    for parameter, times in updates.items():
        got = count.seen[parameter]
        assert len(got) == times and all(g.shape == net.get_parameter(parameter).shape for g in got)
        assert all(float(g.abs().sum()) > 0 for g in got)


@pytest.mark.parametrize("plan", [{}, {"memory_budget": "450kB", "costs": "modelled"},
                                  {"micro_batch": 5}])
def test_gradients_of_tiles_and_pieces_are_the_whole_batchs(plan):
    x, y = batch(16, torch.float64)
    norms = []
    for options in ({}, plan):
        t = trainer(epochs=1, precision="fp64", batch_size=16, net=chain(), **options)
        t.fit([(x, y)], callbacks=[watching.GradientNorm()])
        norms.append([t.history.rows[0].extra[f"grad_norm_{i}"] for i in range(4)])
    assert norms[1] == pytest.approx(norms[0], rel=1e-9)


def test_what_stands_and_what_data_say():
    t, (_, _, test) = watched(["weight", "sparsity", "statistics", "accuracy", "goodness", "dead"],
                              every="epoch")
    assert not t.history.steps
    row, layer = t.history.rows[0].extra, t.net.layer(2)
    w = layer.weight.detach()
    assert row["max_weight_2"] == float(w.abs().max())
    assert row["hoyer_2"] == sparsity(w, "hoyer") and row["gini_2"] == sparsity(w, "gini")
    assert row["l1_2"] == sparsity(w, "l1") and row["l2_2"] == sparsity(w, "l2")
    assert [row[f"weight_{n}_2"] for n in ("min", "max", "mean", "sd")] == pytest.approx(
        [float(v) for v in (w.min(), w.max(), w.mean(), w.std())], rel=1e-9)
    x, y = next(iter(test))
    x = x.double()
    goodness = t.net.goodness(x)
    assert row["max_goodness_1"] == float(goodness[1].max())
    assert row["accuracy_3"] == float((goodness[3].argmax(1) == y).double().mean())
    maps = [t.net.prepare(x)]
    t.net.run(maps[0], features=maps)
    a = t.net.layer(3).preactivation(maps[3])
    assert row["inactive_3"] == pytest.approx(float((a <= 0).double().mean()), rel=1e-12)
    assert row["dead_3"] == int((a <= 0).all(0).sum())


def test_dead_units_with_the_true_label():
    net = ff.models.create("fflib/ffnn", image_size=8, layers=(12, 9), theta=2.0)
    t, (_, _, test) = watched(["dead"], net=net)
    x, y = next(iter(test))
    a = t.net.layer(0).preactivation(t.net.prepare(x.double(), y))
    row = t.history.rows[0].extra
    assert row["inactive_0"] == pytest.approx(float((a <= 0).double().mean()), rel=1e-12)
    assert row["dead_0"] == int((a <= 0).all(0).sum())


def test_gamma_of_a_collaborative_network():
    net = ff.models.create("cff/adaptive", image_size=8, layers=(12, 9))
    t, _ = watched(["gamma", "gradient"], net=net)
    first, last = (row.extra for row in t.history.rows)  # a layer's turn each
    assert [last["gamma_0"], last["gamma_1"]] == t.net.gamma.tolist()
    assert first["gamma_0"] == last["gamma_0"] != pytest.approx(0.1)
    assert first["gamma_1"] == pytest.approx(0.1) != last["gamma_1"]
    assert first["grad_norm_0"] > 0 and first["grad_norm_1"] is None
    with pytest.raises(ValueError, match=r"^\[watch\] gamma expected a collaborative"):
        watched(["gamma"])


def test_seconds_of_layers_are_a_step_and_no_more():
    import time

    x, y = batch(8)
    t = trainer(net=chain(), epochs=1)
    began = time.perf_counter()
    t.fit([(x, y)], callbacks=[watching.LayerSeconds("step")])
    spent = [t.history.steps[0][f"seconds_{i}"] for i in range(4)]
    assert all(s > 0 for s in spent) and sum(spent) < time.perf_counter() - began
    twin = ff.models.create("bp/fflib/bpnn", image_size=8, layers=(12, 9))
    t = trainer(net=twin, epochs=1)
    t.fit([(x, y)], callbacks=[watching.LayerSeconds(), watching.Separation()])
    row = t.history.rows[0].extra
    assert row["seconds_1"] is None and row["separation_0"] is None


def test_who_is_watched_trains_alike():
    every = [*watching.OF_TRAINING, *watching.ON_DATA]
    every.remove("gamma")
    one, _ = watched(every, epochs=2)
    train, valid, _ = loaders()
    other = trainer(net=chain(), epochs=2, precision="fp64")
    other.fit(train, valid)
    assert same(weights(one.net), weights(other.net))
    assert one._context.__self__.callbacks._who["on_step"] == []  # nobody listens afterwards
    assert [r.losses for r in one.history.rows] == [r.losses for r in other.history.rows]


@pytest.mark.parametrize("name", ["trifecta/shallow", "fflib/ffrnn", "hinton/peer-norm",
                                  "cwcomp/ffcnn", "bp/fflib/bpnn"])
def test_who_is_watched_trains_alike_in_every_schedule(name):
    x, y = batch(8)
    ends = []
    for words in ((), ("gradient", "seconds", "separation", "dead", "goodness")):
        t = tiny.trainer(tiny.network(name), batch_size=8, costs="modelled", sip=False)
        t.fit([(x, y)], until=1, callbacks=watching.watchers(words, [(x, y)], "step"))
        ends.append(weights(t.net))
    assert same(*ends)
    row = t.history.rows[0].extra
    norms = [row[f"grad_norm_{i}"] for i in range(len(t.net.layers))]
    assert all(v is not None and 0 < v < 1e3 for v in norms)
    assert (row["seconds_1"] is None) == (row["separation_1"] is None) == name.startswith("bp/")


def test_files_and_resuming(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train, valid, test = loaders()
    whole = trainer(net=chain(), epochs=2, out=tmp_path / "whole")
    whole.fit(train, valid, callbacks=watching.watchers(["weight", "dead"], test, "step"))
    parts = trainer(net=chain(), epochs=2, out=tmp_path / "parts")
    parts.fit(train, valid, callbacks=watching.watchers(["weight", "dead"], test, "step"), until=1)
    again = trainer(net=chain(), epochs=2, out=tmp_path / "parts")
    again.resume(tmp_path / "parts")
    again.fit(train, valid, callbacks=watching.watchers(["weight", "dead"], test, "step"))
    assert (tmp_path / "parts" / "steps.csv").read_bytes() == (
        tmp_path / "whole" / "steps.csv").read_bytes()
    rows = read_rows(tmp_path / "parts" / "history.csv")
    assert [r.extra for r in rows] == [r.extra for r in whole.history.rows]
    assert rows == again.history.rows
    steps = read_steps(tmp_path / "whole" / "steps.csv")
    assert [s["step"] for s in steps] == [str(i) for i in range(6)]
    assert float(steps[-1]["max_weight_0"]) == rows[-1].extra["max_weight_0"]
    events = EventAccumulator(str(tmp_path / "whole"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"epoch_dead/3", "epoch_max_weight/0", "step_max_weight/3", "epoch/loss"} <= tags
    assert len(events.Scalars("step_max_weight/3")) == 6


def test_errors_are_one_line():
    with pytest.raises(ValueError, match=r"^\[watch\] expected some of [^\n]*, got 'lots'$"):
        watching.watchers(["lots"], [])
    for every in ("hour", 0, "-1", True):
        with pytest.raises(ValueError, match=rf"^\[watch\] every expected [^\n]*got {every!r}$"):
            watching.Separation(every)


def test_every_so_many_steps():
    t, _ = watched(["separation", "accuracy"], every=2, epochs=2)
    assert [row["step"] for row in t.history.steps] == [1, 3, 5]
    assert {"separation_0", "accuracy_3"} <= t.history.steps[0].keys()
    assert t.history.steps[-1]["accuracy_2"] == t.history.rows[-1].extra["accuracy_2"]
