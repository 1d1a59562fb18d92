"""Trainer: steps, refusals before any weight moves, learning rate, clean stops."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from engine.training import batch, loaders, network, same, trainer, weights

import ffengine as ff
from ffengine.engine.memory.budget import parse_bytes
from ffengine.engine.run.stopping import FiniteCheck


def test_step_reports_one_loss_and_goodness_a_layer():
    report = trainer().step(*batch())
    assert [loss.shape for loss in report.losses] == [()] * 4
    assert [g.shape for g in report.goodness] == [(8, 10)] * 4
    turn = trainer().schedule.turn(0, 0)
    assert turn.layers == (0, 1, 2, 3) and turn.depth == 4


def test_step_takes_batch_mapping_and_pair_alike():
    x, y = batch()
    results = []
    for item in ((x, y), {"x": x, "y": y}, ff.Batch(x=x, y=y)):
        t = trainer()
        t.step(item, epoch=0, iteration=0)
        results.append(weights(t.net))
    assert same(results[0], results[1]) and same(results[0], results[2])


@pytest.mark.parametrize("case, error, text", [
    (lambda x, y: {"x": x, "y": y, "labels": y}, TypeError, "expected a batch with x, y"),
    (lambda x, y: {"x": x}, TypeError, "expected a batch with x, y"),
    (lambda x, y: {"x": x, "y": y, "negatives": y}, ValueError, "negatives expected by none"),
    (lambda x, y: (x, y.int()), TypeError, "int64"),
    (lambda x, y: (x, y + 10), ValueError, r"\[0, 10\)"),
    (lambda x, y: (x, y - 10), ValueError, r"\[0, 10\)"),
    (lambda x, y: (x, y[:3]), ValueError, r"labels must be \(8,\)"),
    (lambda x, y: (x[:, :, :7], y), ValueError, r"\(N, 1, 8, 8\)"),
    (lambda x, y: (x[:0], y[:0]), ValueError, "N >= 1"),
    (lambda x, y: ((x * 255).byte(), y), TypeError, "floating-point"),
    (lambda x, y: x, TypeError, "expected a batch"),
])
def test_bad_batches_are_refused_before_any_weight_moves(case, error, text):
    t = trainer()
    before = weights(t.net)
    with pytest.raises(error, match=text) as caught:
        t.step(case(*batch()))
    assert "\n" not in str(caught.value)
    assert same(before, weights(t.net)) and t.steps == 0


def test_dropout_is_a_function_of_seed_and_step_and_scores_never_drop():
    x, y = batch()
    a, b, other = trainer(), trainer(), trainer(net=network(0), seed=1)
    losses = []
    for t in (a, b, other):
        t.step(x, y)
        losses.append(t.step(x, y).losses[0].item())
    assert losses[0] == losses[1] != losses[2]
    a.net.train()
    assert torch.equal(a.net(x), a.net(x))


def test_cosine_learning_rate_per_epoch():
    t = trainer(lr=0.08, lr_min=0.008, epochs=10)
    for e in (0, 1, 5, 9, 3):  # going back replays
        expected = 0.008 + 0.072 * (1 + math.cos(math.pi * e / 10)) / 2
        t.step(*batch(), epoch=e)
        assert math.isclose(t.rate.now, expected, rel_tol=1e-12)


def test_own_scheduler():
    t = trainer(lr=1.0, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5))
    assert [t.rate.move_to(e) for e in range(5)] == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_recipe_comes_with_the_net_and_a_changed_rate_keeps_the_ratio():
    t = ff.Trainer(network(), lr=0.04, backend="reference")
    assert (t.settings.optimizer, t.settings.epochs, t.settings.weight_decay) == (
        "adamw", 150, 0.01)
    assert math.isclose(t.settings.lr_min, 0.004)


@pytest.mark.parametrize("precision, dtype", [("fp64", torch.float64), ("bf16", torch.float32),
                                              ("fp16", torch.float32), ("fp32", torch.float32)])
def test_precisions(precision, dtype):
    t = trainer(precision=precision)
    x, y = batch(dtype=dtype)
    assert all(loss.isfinite() for loss in t.step(x, y).losses)
    assert {p.dtype for p in t.net.parameters()} == {dtype}
    assert 0 <= t.evaluate([(x, y)]) <= 1


@pytest.mark.parametrize("options, text", [
    ({"precision": "fp8"}, "precision must be one of fp64, fp32, bf16, fp16"),
    ({"epochs": 0}, "epochs"), ({"lr": float("nan")}, "lr"), ({"batch_size": 0}, "batch_size"),
    ({"seed": -1}, "seed"), ({"optimizer": "lion"}, "adam"), ({"backend": "tpu"}, "reference"),
    ({"backend": "cuda", "precision": "fp64"}, "usable: reference"),
    ({"memory_budget": "12 parsecs"}, "440MB"),
])
def test_bad_settings_are_one_line(options, text):
    with pytest.raises(ValueError, match=text) as caught:
        trainer(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("amount, nbytes", [
    ("440MB", 440 * 10**6), ("256MiB", 256 * 2**20), ("1.5GB", 1_500_000_000), ("1GiB", 2**30),
    ("10 kB", 10_000), ("4096", 4096), (4096, 4096), (None, None)])
def test_parse_bytes(amount, nbytes):
    assert parse_bytes(amount) == nbytes


@pytest.mark.parametrize("amount", ["", "MB", "-3MB", "3XB", "1e3", "0", True, 0])
def test_parse_bytes_refuses(amount):
    with pytest.raises(ValueError, match="440MB"):
        parse_bytes(amount)


def test_budget_that_cannot_be_met_is_refused_before_any_work():
    with pytest.raises(ValueError, match="the smallest needs"):
        trainer(memory_budget="100kB", batch_size=16)
    t = trainer(memory_budget="100kB")  # no batch size given: at the first batch
    before = weights(t.net)
    with pytest.raises(ValueError, match="the smallest needs"):
        t.step(*batch())
    assert same(before, weights(t.net))


def test_budget_shapes_the_plan_and_smaller_batches_keep_its_cuts():
    free = trainer(batch_size=32)
    smallest = free.planning.planner(32).smallest().peak_bytes
    tight = trainer(batch_size=32, memory_budget=smallest)
    assert tight.plan.peak_bytes <= smallest
    assert tight.plan_for(9).cuts == tight.plan.cuts
    assert tight.plan_for(9).peak_bytes <= smallest
    x, y = batch(32)
    a, b = free.step(x, y).losses, tight.step(x, y).losses
    assert all(torch.allclose(p, q, rtol=1e-5) for p, q in zip(a, b, strict=True))


def test_fit_learns_and_meters_one_step(tmp_path):
    train, valid, test = loaders()
    t = trainer(epochs=6, out=tmp_path)
    rows = t.fit(train, valid).rows
    assert [r.epoch for r in rows] == list(range(6)) and rows[-1].loss < rows[0].loss
    assert t.peak_bytes > t.floor_bytes > 0 and rows[-1].images_per_second > 0
    assert t.evaluate(test) > 0.2 and len(t.evaluate_layers(test)) == 4


def test_metering_changes_no_bit():
    x, y = batch()
    plain, metered = trainer(), trainer()
    metered._meter_next = True
    plain.step(x, y)
    metered.step(x, y)
    assert metered.peak_bytes > 0 and same(weights(plain.net), weights(metered.net))


def test_any_iterable_of_batches_and_torch_loaders(tmp_path):
    x, y = batch(20)
    t = trainer(epochs=1)
    t.fit([(x[:8], y[:8]), (x[8:], y[8:])])
    dataset = torch.utils.data.TensorDataset(x, y)
    t = trainer(epochs=1)
    t.fit(torch.utils.data.DataLoader(dataset, batch_size=6))
    assert t.steps == 4
    with pytest.raises(ValueError, match="at least one batch"):
        trainer(epochs=1).fit([])


def test_nan_in_the_input_is_named_before_any_weight_moves():
    x, y = batch()
    x[2, 0, 1, 1] = float("nan")
    t = trainer()
    before = weights(t.net)
    with pytest.raises(ff.TrainingStopped, match=r"input of layer 0 holds NaN.* step 0"):
        t.step(x, y)
    assert same(before, weights(t.net))


def test_strided_labels_are_the_labels():
    x, y = batch()
    plain, strided = trainer(), trainer()
    for t, labels in ((plain, y), (strided, torch.stack([y, 9 - y], 1)[:, 0])):
        t.step(x, labels)
    assert same(weights(plain.net), weights(strided.net))


def test_a_loader_that_shuffles_by_torch_resumes_bit_for_bit(tmp_path):
    data = torch.utils.data.TensorDataset(*batch(40))

    def run(folder, *stops):
        for stop in stops:
            torch.manual_seed(5 if stop == stops[0] else 99)
            t = trainer(out=folder, epochs=3)
            if stop != stops[0]:
                t.resume(folder)
            t.fit(torch.utils.data.DataLoader(data, batch_size=8, shuffle=True), until=stop)
        return weights(t.net)

    assert same(run(tmp_path / "a", 3), run(tmp_path / "b", 1, 3))


def test_loss_that_is_not_finite_stops_naming_layer_step_and_epoch(tmp_path):
    train, valid, _ = loaders()
    t = trainer(out=tmp_path)
    t.fit(train, valid, until=1)
    kept = (tmp_path / "latest.safetensors").read_bytes()
    with torch.no_grad():
        t.net.layer(2).weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ff.TrainingStopped, match=r"layer 2 became nan at step 3 of epoch 1"):
        t.fit(train, valid)
    assert (tmp_path / "latest.safetensors").read_bytes() == kept


def test_watch_off_the_cpu_reads_rarely_and_names_the_first_bad_step():
    watch = FiniteCheck(torch.device("meta"), every=3)
    x, y = torch.zeros(2, 4), torch.tensor([0, 1])
    good, bad = [torch.ones(())] * 2, [torch.ones(()), torch.tensor(float("inf"))]
    watch.after(x, y, 2, good, 0, 0, now=False)
    watch.after(x, y, 2, bad, 0, 1, now=False)
    with pytest.raises(ff.TrainingStopped, match="layer 1 became inf at step 1 of epoch 0"):
        watch.after(x, y, 2, bad, 0, 2, now=False)
    watch.after(x, y + 1, 2, good, 1, 3, now=False)
    with pytest.raises(ff.TrainingStopped, match="labels out of range in the batch of epoch 1"):
        watch.check()


class Interrupting:
    """A loader that sends this process a signal before its batch number `at` in epoch 1."""

    def __init__(self, loader, at, number=signal.SIGINT):
        self.loader, self.at, self.epoch, self.number = loader, at, 0, number

    def __len__(self):
        return len(self.loader)

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.loader.set_epoch(epoch)

    def __iter__(self):
        for i, item in enumerate(self.loader):
            if self.epoch == 1 and i == self.at:
                os.kill(os.getpid(), self.number)
            yield item


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_and_the_run_goes_on_bit_for_bit(tmp_path, number):
    """And so does a batch system's SIGTERM."""
    train, valid, _ = loaders()
    straight = trainer()
    straight.fit(train, valid)
    stopped = trainer(out=tmp_path)
    handler = signal.getsignal(number)
    with pytest.raises(ff.TrainingInterrupted, match=r"epoch 1, batch 2; checkpoint") as caught:
        stopped.fit(Interrupting(train, 1, number), valid)
    assert signal.getsignal(number) is handler and caught.value.signal == number
    resumed = trainer(net=network(9), out=tmp_path)
    resumed.resume(tmp_path)
    assert (resumed.epoch, resumed.iteration, resumed.steps) == (1, 2, 5)
    rows = resumed.fit(train, valid).rows
    assert same(weights(straight.net), weights(resumed.net))
    assert [r.epoch for r in rows] == [0, 1, 2, 3]
    for mine, theirs in zip(rows, straight.history.rows, strict=True):
        assert (mine.losses, mine.train_accuracy) == (theirs.losses, theirs.train_accuracy)


def test_a_run_is_gone_on_with_or_stays(tmp_path):
    train, valid, _ = loaders()
    first = trainer(out=tmp_path / "run")
    first.fit(train, valid, until=1)
    first.fit(train, valid, until=2)  # its own run
    first.save(tmp_path / "elsewhere" / "latest.safetensors")
    kept = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    fresh = trainer(out=tmp_path / "run")
    for write in (lambda: fresh.fit(train, valid), lambda: fresh.save(),
                  lambda: fresh.resume(tmp_path / "elsewhere")):
        with pytest.raises(ValueError, match=r"^\[trainer\] out expected a folder without a run, "
                                             r"got .*/run; resume\('.*/run'\) goes on with it$"):
            write()
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == kept
    fresh.resume(tmp_path / "run")
    assert [row.epoch for row in fresh.fit(train, valid, until=3).rows] == [0, 1, 2]


def test_importing_is_light():
    import subprocess
    import sys

    code = "import sys, ffengine; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert ff.losses.ce().name == "ce"
    with pytest.raises(AttributeError, match="nothing"):
        _ = ff.nothing


def test_keywords_of_the_version_before_work_with_one_warning() -> None:
    """They settle what Recipe, Memory and the attributes settle now."""
    with pytest.warns(FutureWarning, match=r"^\[trainer\] optimizer, lr_min, weight_decay, states, "
                                           r"micro_batch, sip, notes will go: expected ") as told:
        old = ff.Trainer(network(), lr=0.2, epochs=4, lr_min=0.1, weight_decay=0.5,
                         optimizer="sgd", states="8bit", micro_batch=4, sip=False, notes={"a": 1})
    recipe = replace(network().recipe, lr=0.2, lr_min=0.1, weight_decay=0.5, optimizer="sgd")
    new = ff.Trainer(network(), epochs=4, recipe=recipe,
                     memory=ff.Memory(states="8bit", micro_batch=4))
    assert len(told) == 1 and told[0].filename == __file__
    assert old.settings == new.settings and old.micro_batch == new.micro_batch == 4
    assert old.settings.lr_min == 0.1 and old.settings.states == "8bit"
    assert not old.sip and old.notes == {"a": 1} and new.sip == new.net.selects_range
    with pytest.raises(TypeError, match="rate"):
        ff.Trainer(network(), rate=0.1)
