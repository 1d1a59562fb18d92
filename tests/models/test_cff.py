"""Collaborative FF: Lorberbom's special case, gamma's gradient, whose turn, stored features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_paired import Watched

import ffengine as ff
from ffengine.engine.batch import Batch
from ffengine.engine.memory.plan import Plan, one_tile
from ffengine.engine.schedules import layerwise
from ffengine.engine.schedules.collaborative import Collaborative
from ffengine.engine.schedules.layerwise import Layerwise
from ffengine.engine.schedules.schedule import Schedule

FP64 = torch.float64
LAYERS = (7, 6, 5)
SAMPLES = 9


def network(kind: str = "fixed", **options: Any) -> Any:
    torch.manual_seed(0)
    return ff.models.create(f"cff/{kind}", **({"num_classes": 4, "image_size": 4,
                                               "layers": LAYERS} | options))


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(4, (SAMPLES,), generator=generator)
    x = torch.rand(SAMPLES, 1, 4, 4, generator=generator, dtype=FP64)
    return Batch(x, y, (y + torch.randint(1, 4, (SAMPLES,), generator=generator)) % 4)


def trainer(net: Any, epochs: int = 1, **options: Any) -> Watched:
    return Watched(net, epochs=epochs, precision="fp64", backend="reference", progress=False,
                   **options)


def rows_of(item: Batch) -> torch.Tensor:
    """Positive, then negative rows: the label's pixel holds the batch's largest value."""
    rows = item.x.flatten(1).repeat(2, 1)
    rows[:, :4] = F.one_hot(torch.cat([item.y, item.negatives]), 4) * item.x.max()
    return rows


def unit(v: torch.Tensor) -> torch.Tensor:
    return v / (v.norm(dim=1, keepdim=True) + 1e-4)


def activations(net: Any, rows: torch.Tensor) -> list[torch.Tensor]:
    """f_i of plain PyTorch; no gradient crosses a layer."""
    found = []
    for layer in net.layers:
        rows = F.relu(F.linear(unit(rows.detach()), layer.weight, layer.bias))
        found.append(rows)
    return found


@pytest.mark.parametrize("stage", range(len(LAYERS)))
def test_lorberbom_is_the_special_case(stage: int) -> None:
    """AAAI 2024: P(positive) = sigmoid(|f_i|^2 + gamma - theta), gamma the sum of the others'."""
    theta, item = 1.3, batch()
    run = trainer(network(goodness="sum_sq", weight=1.0, gamma=1.0, theta=theta))
    before = {n: p.detach().clone() for n, p in run.net.named_parameters()}
    squares = [f.square().sum(1) for f in activations(run.net, rows_of(item))]
    others = sum(s.detach() for i, s in enumerate(squares) if i != stage)
    probability = torch.sigmoid(squares[stage] + others - theta)
    target = torch.cat([torch.ones(SAMPLES), torch.zeros(SAMPLES)]).to(FP64)
    layer = run.net.layer(stage)
    loss = F.binary_cross_entropy(probability, target)
    wanted = torch.autograd.grad(loss, [layer.weight, layer.bias])
    report = run.step(item, epoch=stage)
    torch.testing.assert_close(report.losses[stage], loss.detach(), rtol=0, atol=1e-12)
    for name, grad in zip(("weight", "bias"), wanted, strict=True):
        torch.testing.assert_close(run.grads[f"layers.{stage}.{name}"], grad, rtol=0, atol=1e-12)
    for name, p in run.net.named_parameters():
        moved = not torch.equal(p.detach(), before[name])
        assert moved == name.startswith(f"layers.{stage}."), name


@pytest.mark.parametrize("goodness", ["mean_sq", "sum_sq"])
@pytest.mark.parametrize("stage", range(len(LAYERS)))
def test_gamma_learns_its_own_gradient(stage: int, goodness: str) -> None:
    item, run = batch(), trainer(network("adaptive", goodness=goodness, theta=0.4, gamma=0.3))
    net = run.net
    kind = torch.sum if goodness == "sum_sq" else torch.mean
    g = [kind(f.square(), 1) for f in activations(net, rows_of(item))]
    others = sum(s.detach() for i, s in enumerate(g) if i != stage) / (len(LAYERS) - 1)
    excess = g[stage] + net.gamma[stage] * others - 0.4
    loss = torch.cat([F.softplus(-excess[:SAMPLES]), F.softplus(excess[SAMPLES:])]).mean()
    layer = net.layer(stage)
    wanted = torch.autograd.grad(loss, [net.gamma, layer.weight, layer.bias])
    before = net.gamma.detach().clone()
    run.step(item, epoch=stage)
    names = ("gamma", f"layers.{stage}.weight", f"layers.{stage}.bias")
    for name, grad in zip(names, wanted, strict=True):
        torch.testing.assert_close(run.grads[name], grad, rtol=0, atol=1e-12)
    step = torch.zeros(len(LAYERS), dtype=FP64)
    step[stage] = -0.01 * wanted[0][stage].sign()  # Adam's first step of its own rate
    torch.testing.assert_close(net.gamma.detach() - before, step, rtol=1e-4, atol=0)


def test_a_fixed_gamma_stays() -> None:
    run = trainer(network(gamma=0.25), epochs=2)
    for epoch in range(run.epochs):
        run.step(batch(), epoch=epoch)
    assert torch.equal(run.net.gamma, torch.full((len(LAYERS),), 0.25, dtype=FP64))
    assert "gamma" not in run.optimizer.states


def test_without_gamma_layers_train_alone() -> None:
    """gamma = 0 is Hinton's layer-wise form, to the last bit."""
    alone = ff.models.create("hinton/threshold", num_classes=4, image_size=4, layers=LAYERS)
    together = network(gamma=0.0)
    alone.load_state_dict({k: v for k, v in together.state_dict().items() if k != "gamma"})
    runs = [trainer(net, epochs=3, lr=0.03) for net in (together, alone)]
    for run in runs:
        for epoch in range(run.epochs):
            run.step(batch(), epoch=epoch)
    for name, p in alone.named_parameters():
        assert torch.equal(p, dict(together.named_parameters())[name])


def fitted(model: str, schedule: Schedule, out: Path) -> dict[str, torch.Tensor]:
    """Weights after a few epochs a layer on a part of the digits."""
    torch.manual_seed(0)
    net = ff.models.create(model, image_size=8, layers=(16, 12, 10))
    train = ff.data.load("digits").train
    loader = ff.data.loader(train, batch_size=500, shuffle=False)
    run = ff.Trainer(net, epochs=3, precision="fp64", backend="reference", progress=False, out=out,
                     schedule=schedule)
    run.fit(loader)
    assert run.epoch == 9
    return {n: p.detach().clone() for n, p in net.named_parameters()}


@pytest.mark.parametrize(("model", "kind"), [
    ("cff/fixed", Collaborative), ("cff/adaptive", Collaborative), ("hinton/threshold", Layerwise)])
def test_stored_features_change_nothing(model: str, kind: Any, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = fitted(model, kind(features="recompute"), tmp_path / "recompute")
    stored: list[tuple[int, str]] = []
    create = layerwise.Stored.__init__

    def watched(self: Any, run: Any, loader: Any, schedule: Any, stage: int, where: str) -> None:
        stored.append((stage, where))
        create(self, run, loader, schedule, stage, where)

    monkeypatch.setattr(layerwise.Stored, "__init__", watched)
    for features in ("ram", "disk"):
        got = fitted(model, kind(features=features), tmp_path / features)
        assert stored == [(1, features), (2, features)]
        stored.clear()
        for name, weight in wanted.items():
            torch.testing.assert_close(got[name], weight, rtol=0, atol=1e-12)


def test_a_full_batch_holds_its_samples_and_a_tile() -> None:
    """50,000 samples of MNIST, layer after layer: 879 MB where rows are encoded all at once."""
    made = ff.Trainer(ff.models.create("cff/fixed"), batch_size=50_000, epochs=1, progress=False)
    samples = 50_000 * (28 * 28 * 4 + 8)
    made.schedule.expect(made.planning, 50_000, 50_000, shuffle=False)
    first, second = (plan for _, plan in made.planning.plans(50_000).phases)
    assert samples < first.peak_bytes < 1.3 * samples
    kept = 100_000 * 500 * 4
    assert kept < second.peak_bytes < 1.1 * kept


@pytest.mark.parametrize("kind", ["fixed", "adaptive"])
@pytest.mark.parametrize("tile", [None, 700])
def test_its_plan_is_what_the_meter_reads(kind: str, tile: int | None) -> None:
    """Of the set at once, in one tile or in four of which one holds rows of both halves; in the
    second phase of features that are kept, and are the batch."""
    train = ff.data.load("digits").train
    net = network(kind, num_classes=10, image_size=8, layers=(60, 50))
    rows = 2 * len(train)
    plan = Plan(one_tile(range(2), tile or rows).segments, rows, 0, 0)
    run = ff.Trainer(net, epochs=1, batch_size=len(train), progress=False,
                     memory=ff.Memory(plan=plan))
    peaks = []
    for epoch in range(2):
        run.peak_bytes = 0
        run.fit(ff.data.loader(train, batch_size=len(train), shuffle=False), until=epoch + 1)
        peaks.append((run.peak_bytes, run.planning.plans(len(train)).at(epoch).peak_bytes))
    assert all(0.98 * planned <= metered <= planned for metered, planned in peaks), peaks
