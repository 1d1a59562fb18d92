"""Nothing that is not finite is kept, and going on from a checkpoint is all or nothing."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine.training import batch, loaders, network, same, trainer, weights

import ffengine as ff
from ffengine.engine.run import checkpoint, header
from ffengine.engine.run.stopping import TrainingStopped


def dense(loss: Any = None, width: int = 40, layers: int = 1) -> Any:
    """A small network of dense layers on images of 8 x 8, its loss the caller's."""
    torch.manual_seed(0)
    net = ff.models.create("sn/mlp", in_channels=1, image_size=8, num_classes=10,
                           layers=(width,) * layers)
    for i in range(layers if loss is not None else 0):
        net.layer(i).config = replace(net.layer(i).config, loss=loss)
    return net


def data(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(8, 1, 8, 8, generator=generator), torch.arange(8)) for _ in range(count)]


def poisoned(at: int) -> Any:
    """Cross-entropy whose value is finite and whose gradient is NaN from call number `at` on."""
    calls = [0]

    def loss(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        row = F.cross_entropy(g, y, reduction="none")
        return row + (g[:, 0] * 0).abs().sqrt() * 0 if calls[0] >= at else row

    return loss


def test_a_bad_last_update_leaves_the_last_good_checkpoint(tmp_path: Any) -> None:
    """The ninth step of nine has a finite loss and a NaN gradient: nothing shows it but weights."""
    t = ff.Trainer(dense(poisoned(9)), epochs=3, out=tmp_path, progress=False)
    with pytest.raises(TrainingStopped, match=r"layers\.0\.weight holds NaN or infinity after 9 "):
        t.fit(data(3), data(1))
    found = checkpoint.load(tmp_path)
    assert found.meta["position"]["epoch"] == 2 and found.meta["position"]["steps"] == 6
    assert all(bool(v.isfinite().all()) for v in found.tensors.values())
    assert [row.epoch for row in t.history.rows] == [0, 1]
    before = (tmp_path / "latest.safetensors").read_bytes()
    with pytest.raises(TrainingStopped, match="holds NaN"):
        t.save()
    assert (tmp_path / "latest.safetensors").read_bytes() == before


@pytest.mark.parametrize("spoil, name", [
    (lambda t: t.net.layer(1).running_var.fill_(float("inf")), "running_var"),
    (lambda t: t.optimizer.states["layers.0.weight"].v.view(-1)[3:4].fill_(float("nan")),
     r"optimizer\.layers\.0\.weight\.v")])
def test_statistics_and_states_are_held_to_it_too(tmp_path: Any, spoil: Any, name: str) -> None:
    t = ff.Trainer(ff.models.create("cwcomp/ffcnn", num_classes=10, in_channels=1, image_size=8,
                                    channels=(10, 10), ilt="none"), progress=False)
    t.save(tmp_path / "a")
    kept = (tmp_path / "a").read_bytes()
    with torch.no_grad():
        spoil(t)
    with pytest.raises(TrainingStopped, match=name):
        t.save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == kept


def rewritten(path: Any, change: Any) -> None:
    """The checkpoint with its JSON changed by hand, and a digest that fits."""
    found = checkpoint.load(path)
    meta, tensors = copy.deepcopy(found.meta), dict(found.tensors)
    change(meta, tensors)
    checkpoint.save(path, tensors, {k: v for k, v in meta.items() if k != "format"})


@pytest.fixture
def saved(tmp_path: Any) -> Any:
    train, valid, _ = loaders()
    trainer(out=tmp_path).fit(train, valid, until=1)
    return tmp_path / "latest.safetensors"


def everything(t: Any) -> dict[str, Any]:
    return {"weights": weights(t.net), "states": {
        k: v.clone() for k, v in t.optimizer.export_state()[0].items()},
        "numbers": (t.epoch, t.iteration, t.steps, t.best_accuracy, t.ended, t.rate.now,
                    t.sums.export(), len(t.history.rows), str(t.planning.export()),
                    {k: s.step for k, s in t.optimizer.states.items()}),
        "generator": torch.get_rng_state()}


def refused(path: Any, expected: str, **options: Any) -> None:
    """A trainer that has trained refuses the file in one line, and is what it was."""
    t = trainer(**options)
    t.step(*batch())
    before = everything(t)
    with pytest.raises(ValueError, match=expected) as caught:
        t.resume(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    after = everything(t)
    assert before["numbers"] == after["numbers"]
    assert torch.equal(before["generator"], after["generator"])
    assert same(before["weights"], after["weights"]) and same(before["states"], after["states"])


GONE = ["plan", "best_accuracy", "optimizer", "settings", "architecture", "position", "model",
        "backend", "memory_budget", "notes", "position.sums", "position.epoch", "position.ended",
        "position.iteration", "position.steps", "optimizer.steps", "optimizer.lr",
        "optimizer.kind", "settings.precision", "plan.phases", "position.sums.hits"]


def test_a_header_that_lacks_a_value_is_refused(saved: Any) -> None:
    """Every value that going on reads, one at a time; the file is read once."""
    found = checkpoint.load(saved)
    found.meta["position"]["sums"] = {"samples": 1, "losses": [0.0] * 4, "hits": 1}
    for name in GONE:
        meta = copy.deepcopy(found.meta)
        *path, last = name.split(".")
        at = meta
        for part in path:
            at = at[part]
        del at[last]
        with pytest.raises(ValueError, match=rf"\[checkpoint\] {name} expected .* in ") as caught:
            header.check(meta, found.tensors, saved)
        assert "\n" not in str(caught.value)


def deep(name: str, value: Any) -> Any:
    def change(meta: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        *path, last = name.split(".")
        for part in path:
            meta = meta[part]
        meta[last] = value

    return change


def without_a_step_count(meta: dict[str, Any], tensors: Any) -> None:
    del meta["optimizer"]["steps"]["layers.3.weight"]


def strange_generator(meta: Any, tensors: dict[str, torch.Tensor]) -> None:
    tensors["shuffle"] = torch.full_like(tensors["shuffle"], 255)


def strange_range(meta: Any, tensors: dict[str, torch.Tensor]) -> None:
    tensors["net._extra_state"] = torch.tensor([3, 9])


def nan_weight(meta: Any, tensors: dict[str, torch.Tensor]) -> None:
    tensors["net.layers.2.weight"][0, 0] = float("nan")


def endless_scale(meta: Any, tensors: dict[str, torch.Tensor]) -> None:
    tensors["optimizer.layers.0.weight.m"].view(-1)[0] = float("inf")


@pytest.mark.parametrize("change, expected", [
    (deep("plan", {"samples": 1}), r"plan\.costs expected"),
    (without_a_step_count, r"number of steps of layers\.3\.weight"),
    (deep("optimizer.lr", [0.1, 0.2]), "1 learning rates, got 2"),
    (deep("position.epoch", 10**9), r"position\.epoch expected 0\.\.4, got 1000000000"),
    (deep("position.epoch", -1), r"position\.epoch expected a whole number"),
    (deep("position.epoch", 1.5), r"position\.epoch expected a whole number"),
    (deep("position.sums", {"samples": 3, "losses": [0.1], "hits": 1}), "4 numbers, got 1"),
    (deep("best_accuracy", float("nan")), "best_accuracy expected a finite number"),
    (deep("plan.phases", [[0, [7], [16, 16], [False, False]]]), "plan expected one of this"),
    (deep("plan.phases", [[1, [], [16], [False]]]), "epochs rise from 0"),
    (deep("structure.units", [10**9, 20, 20, 20]), r"structure\.units\[0\] expected"),
    (deep("structure.groups", [[0, 10], [0], [0, 20], [0, 20]]), r"structure\.groups\[1\]"),
    (strange_generator, "generator"), (strange_range, "layer range"),
    (nan_weight, r"finite numbers, got NaN or infinity in net\.layers\.2\.weight"),
    (endless_scale, r"finite numbers, .* optimizer\.layers\.0\.weight\.m"),
    (deep("micro_batch", 4), "expected micro_batch=None, got 4"),
    (deep("used", {"backend": "cpu", "device": "cpu"}), "expected backend reference, got cpu"),
    (deep("functions", {"python": "0.0", "scheduler": "f 00"}), "scheduler to be no function")])
def test_what_no_run_wrote_is_refused_before_anything_changes(saved: Any, change: Any,
                                                              expected: str) -> None:
    rewritten(saved, change)
    refused(saved, expected)


def test_a_damaged_history_is_refused_before_anything_changes(saved: Any) -> None:
    table = saved.parent / "history.csv"
    table.write_text(table.read_text().replace("\n0,", "\nnone,", 1))
    t = trainer(net=network(5), out=saved.parent)
    before = everything(t)
    with pytest.raises(ValueError, match=r"\[history\] expected the table of a run.*history\.csv"):
        t.resume(saved)
    assert same(before["weights"], weights(t.net)) and t.epoch == 0


def test_another_lambda_or_scheduler_is_refused(tmp_path: Any) -> None:
    def schedule(gamma: float) -> Any:
        return lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma)

    mine = [lambda g, y: F.cross_entropy(g, y, reduction="none"),
            lambda g, y: 2 * F.cross_entropy(g, y, reduction="none")]
    t = ff.Trainer(dense(mine[0]), scheduler=schedule(0.5), progress=False)
    t.step(*data(1)[0])
    t.save(tmp_path / "a")
    for loss, gamma, expected in ((mine[1], 0.5, "loss of layer 0"), (mine[0], 0.4, "scheduler")):
        other = ff.Trainer(dense(loss), scheduler=schedule(gamma), progress=False)
        with pytest.raises(ValueError, match=f"expected the {expected} to be"):
            other.resume(tmp_path / "a")
    with pytest.raises(ValueError, match="scheduler to be no function"):
        ff.Trainer(dense(mine[0]), progress=False).resume(tmp_path / "a")
    alike = ff.Trainer(dense(lambda g, y: F.cross_entropy(g, y, reduction="none")),
                       scheduler=schedule(0.5), progress=False)
    alike.resume(tmp_path / "a")
    assert same(weights(alike.net), weights(t.net))


def test_another_number_of_threads_is_told(saved: Any, caplog: Any) -> None:
    assert json.loads(json.dumps(checkpoint.load(saved).meta))["threads"] == torch.get_num_threads()
    rewritten(saved, deep("threads", 77))
    t = trainer(net=network(5))
    t.resume(saved)
    assert "threads" in caplog.text and "77" in caplog.text and t.epoch == 1


def test_a_scheduler_of_ones_own_still_goes_on(tmp_path: Any) -> None:
    def schedule(o: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(o, 1, 0.5)

    train, valid, _ = loaders()
    straight = trainer(scheduler=schedule)
    straight.fit(train, valid)
    half = trainer(scheduler=schedule, out=tmp_path)
    half.fit(train, valid, until=2)
    resumed = trainer(net=network(3), scheduler=schedule)
    resumed.resume(tmp_path)
    resumed.fit(train, valid)
    assert same(weights(straight.net), weights(resumed.net))
    assert resumed.rate.now == straight.rate.now
