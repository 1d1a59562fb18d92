"""Schedules: whose turn it is, who owns memory, where layer-wise features live; equal plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine.training import assert_same, grouped

import ffengine as ff
from ffengine.engine.inputs import rows_of
from ffengine.engine.memory.planner import Planner
from ffengine.engine.memory.plans import TrainingPlan
from ffengine.engine.memory.shapes import measure
from ffengine.engine.memory.store import FeatureStore
from ffengine.engine.run.history import read_rows
from ffengine.engine.schedules.layerwise import Layerwise
from ffengine.engine.schedules.schedule import Interleaved, Together
from ffengine.nn import LinearHead, LocalConv2d, LocalLinear, LocalNet, Readout
from ffengine.ops.config import BatchNorm, LocalPassConfig, Norm, cwc, pvn

WIDTHS = (12, 8, 16)


def mlp(depth: int = 3, heads: int = 0, seed: int = 0, **options: Any) -> LocalNet:
    """16 -> 12 -> 8 -> 16 in four class groups."""
    torch.manual_seed(seed)
    ins = (16, *WIDTHS[:depth - 1])
    config = LocalPassConfig(groups=4, goodness="mean_sq", norm=Norm("layer"))
    layers = [LocalLinear(i, o, config=config) for i, o in zip(ins, WIDTHS, strict=False)]
    made = [LinearHead((depth - 1,), WIDTHS[depth - 1], 4) for _ in range(heads)]
    return LocalNet(layers, num_classes=4, in_shape=(16,), heads=made, **options)


def trainer(net: LocalNet, schedule: Any, **options: Any) -> ff.Trainer:
    return grouped(net, schedule=schedule, **{
        "epochs": 2, "lr": 0.01, "optimizer": "adam", "progress": False, "sip": False, **options})


def samples(n: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (n,), generator=generator)
    x = torch.rand(n, 16, generator=generator)
    x[torch.arange(n), y] += 3  # easily told apart
    return x, y


def loader(shape: tuple[int, ...], shuffle: bool = True, batch_size: int = 8,
           train: int = 20) -> Any:
    splits = ff.data.load("synthetic", shape=shape, train=train, valid=2, test=2)
    return ff.data.loader(splits.train, batch_size=batch_size, shuffle=shuffle)


def parameters(net: LocalNet) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def changed(before: dict[str, torch.Tensor], net: LocalNet) -> set[str]:
    """Layers and heads whose parameters moved, as "layers.0"."""
    return {".".join(n.split(".")[:2]) for n, p in net.named_parameters()
            if not torch.equal(p, before[n])}


@pytest.mark.parametrize(("share", "alone", "first", "second"), [
    (0.0, False, {"layers.0", "layers.1", "heads.0"}, {"layers.0", "layers.1", "heads.0"}),
    (0.5, False, {"layers.0", "layers.1"}, {"layers.0", "layers.1", "heads.0"}),
    (0.5, True, {"layers.0", "layers.1"}, {"heads.0"}),
    (1.0, False, {"layers.0", "layers.1"}, {"layers.0", "layers.1"})])
def test_together(share: float, alone: bool, first: set[str], second: set[str]) -> None:
    net = mlp(2, heads=1)
    t = trainer(net, Together(share, alone))
    for epoch, expected in ((0, first), (1, second)):
        before = parameters(net)
        report = t.step(*samples(), epoch=epoch)
        assert changed(before, net) == expected
        assert (report.heads[0] is None) == ("heads.0" not in expected)
        assert [loss is not None for loss in report.losses] == [
            f"layers.{i}" in expected for i in range(2)]


def test_interleaved_spans() -> None:
    net = mlp(3, heads=1)
    t = trainer(net, Interleaved(((0, 2), (1, 3), (2, 2), (3, 4))), epochs=5)
    for epoch, expected in enumerate(({"layers.0"}, {"layers.0", "layers.1"}, {"layers.1"},
                                      {"heads.0"}, {"heads.0"})):
        before = parameters(net)
        t.step(*samples(), epoch=epoch)
        assert changed(before, net) == expected, epoch


def test_resting_layers_pass_batches_on_with_their_statistics() -> None:
    """CwComp: a layer at rest still normalises by the batch, and its running statistics move."""
    net = ff.models.create("cwcomp/ffcnn", image_size=8, channels=(10, 10), in_channels=1,
                           ilt="none")
    t = trainer(net, Interleaved(((0, 1), (1, 2), (2, 3))), epochs=3)
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    before = {n: b.clone() for n, b in net.named_buffers()}
    t.step(x, y, epoch=1)
    assert all(not torch.equal(b, before[n]) for n, b in net.named_buffers())


def test_only_the_stage_s_layer_trains_and_has_states(tmp_path: Path) -> None:
    net = mlp(3, heads=1)
    t = trainer(net, Layerwise())
    assert t.epochs == 2 * 4
    owners = ["layers.0", "layers.1", "layers.2", "heads.0"]
    for epoch in range(t.epochs):
        before = parameters(net)
        t.step(*samples(), epoch=epoch)
        assert changed(before, net) == {owners[epoch // 2]}
        assert set(t.optimizer.states) == {f"{owners[epoch // 2]}.{n}" for n in ("weight", "bias")}
    largest = 12 * 16 + 12  # layer 0, whose turn needs the most
    assert t.floor_bytes == 4 * (sum(p.numel() for p in net.parameters()) + 2 * largest)


def test_the_rate_starts_anew_with_every_layer() -> None:
    t = trainer(mlp(2), Layerwise(), epochs=4, lr_min=0.0)
    rates = []
    for epoch in range(8):
        t.step(*samples(), epoch=epoch)
        rates.append(t.rate.now)
    assert rates[:4] == rates[4:] and rates == sorted(rates[:4], reverse=True) * 2
    assert rates[0] == 0.01


def test_stop_at_ends_training_and_sets_the_range(tmp_path: Path) -> None:
    net = mlp(3)
    t = trainer(net, Layerwise(stop_at=0.8), epochs=40, lr=0.05, out=tmp_path)
    before = parameters(net)
    rows = t.fit([samples(40)]).rows
    assert rows[-1].train_accuracy >= 0.8 > rows[-2].train_accuracy and len(rows) < 40
    assert net.layer_range == (0, 0) and t.ended
    assert changed(before, net) == {"layers.0"}
    kept = parameters(net)
    again = trainer(mlp(3, seed=1), Layerwise(stop_at=0.8), epochs=40, lr=0.05, out=tmp_path)
    again.resume(tmp_path)
    again.fit([samples(40)])
    assert again.net.layer_range == (0, 0)
    assert not changed(kept, again.net)


def test_a_layer_on_top_of_trained_ones() -> None:
    net = mlp(2)
    t = trainer(net, Layerwise(), epochs=1)
    t.fit([samples()])
    before = parameters(net)
    config = net.layer(1).config
    net.append(LocalLinear(8, 16, config=config))
    net.set_range(2, 2)
    before |= {n: p.detach().clone() for n, p in net.named_parameters() if n not in before}
    more = trainer(net, Layerwise(start=2), epochs=3)
    assert more.epochs == 3
    assert set(more.optimizer.states) == {"layers.2.weight", "layers.2.bias"}
    more.fit([samples()])
    assert changed(before, net) == {"layers.2"}
    with pytest.raises(ValueError, match=r"layer 3 expected an input of 9 .*, got \(16,\)"):
        net.append(LocalLinear(9, 16, config=config))
    assert len(net.layers) == len(net.wires) == 3 and net(samples()[0]).shape == (12, 4)


def fitted(name: str, kind: str, shuffle: bool, batch_size: int, folder: Path,
           **options: Any) -> LocalNet:
    torch.manual_seed(0)
    net = ff.models.create(name, num_classes=10, in_channels=1, image_size=8, **options)
    schedule = type(net.schedule)(features=kind)
    t = trainer(net, schedule, optimizer="sgd", out=folder)
    t.fit(loader(net.in_shape, shuffle, batch_size))
    assert t.stored is None
    return net


@pytest.mark.parametrize(("name", "options", "shuffle", "batch_size"), [
    ("sn/mlp", {"layers": (20, 20, 20)}, True, 8),
    ("sn/cifar10", {"widths": (10, 10, 20, 20)}, True, 8),
    ("hinton/threshold", {"layers": (20, 16, 12)}, False, 20),
    ("hinton/threshold", {"layers": (20, 16), "negatives": "inverse"}, True, 20),
    ("cff/adaptive", {"layers": (20, 16, 12)}, False, 20),
    ("cafo/cnn", {"width": 2}, True, 8)])
def test_features_may_live_anywhere(name: str, options: dict[str, Any], shuffle: bool,
                                    batch_size: int, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    made, create = [], FeatureStore.create

    def remember(*args: Any, **keywords: Any) -> FeatureStore:
        made.append(create(*args, **keywords))
        return made[-1]

    monkeypatch.setattr(FeatureStore, "create", staticmethod(remember))
    nets, stores = {}, {}
    for kind in ("recompute", "ram", "disk"):
        made.clear()
        nets[kind] = fitted(name, kind, shuffle, batch_size, tmp_path / kind, **options)
        stores[kind] = len(made)
        assert all(s._closed for s in made)
        assert {p.name for p in (tmp_path / kind).iterdir() if "tfevents" not in p.name} == {
            "latest.safetensors", "history.csv"}
    assert stores["recompute"] == 0 < stores["ram"] == stores["disk"]
    for n, p in nets["recompute"].named_parameters():
        ram, disk = (dict(nets[k].named_parameters())[n] for k in ("ram", "disk"))
        assert torch.equal(ram, disk), n
        assert (p - ram).abs().max() <= 1e-6, n


def test_shuffled_permutations_are_not_stored() -> None:
    """A permutation of a shuffled batch pairs anew every epoch; random negatives are new, too."""
    net = ff.models.create("hinton/threshold", image_size=8, layers=(20, 16), negatives="random")
    schedule = Layerwise()
    schedule.begin(net, 1)
    assert not schedule.keeps_input(1, shuffle=False)
    net.negatives = "permuted"
    assert schedule.keeps_input(1, shuffle=False)
    assert not schedule.keeps_input(1, shuffle=True)


def test_a_layer_with_its_own_optimizer() -> None:
    net = mlp(2)
    net.layer(1).optim = {"kind": "sgd", "lr": 0.5}
    t = trainer(net.double(), Together(), precision="fp64",
                scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0))
    slow = [(p.detach().clone().requires_grad_()) for p in net.parameters()]
    optimizers = [torch.optim.Adam(slow[:2], lr=0.01), torch.optim.SGD(slow[2:], lr=0.5)]
    for step in range(3):
        x, y = samples(seed=step)
        t.step(x.double(), y)
        z = F.layer_norm(x.double(), (16,))
        for i, optimizer in enumerate(optimizers):
            h = F.relu(z @ slow[2 * i].t() + slow[2 * i + 1])
            optimizer.zero_grad()
            F.cross_entropy((h * h).view(len(y), 4, -1).mean(2), y).backward()
            z = F.layer_norm(h, h.shape[1:]).detach()
            optimizer.step()
    for mine, theirs in zip(net.parameters(), slow, strict=True):
        assert_same(mine, theirs)
    assert t.optimizer.states["layers.1.weight"].m is None


def test_a_layer_with_its_own_labels_and_loss() -> None:
    """Layer 0 tells two super-classes apart by CwC, layer 1 the four classes by PvN."""
    torch.manual_seed(0)
    configs = [LocalPassConfig(groups=2, goodness="mean_sq", norm=Norm("none"), loss=cwc()),
               LocalPassConfig(groups=4, goodness="mean_sq", norm=Norm("none"), loss=pvn(2.0))]
    layers = [LocalLinear(16, 8, config=configs[0]), LocalLinear(8, 8, config=configs[1])]
    net = LocalNet(layers, num_classes=4, in_shape=(16,), input_norm="none").double()
    net.layer(0).relabel((1, 0, 0, 1))
    t = trainer(net, Together(), precision="fp64")
    x, y = samples()
    report = t.step(x.double(), y)
    g0, g1 = report.goodness
    assert g0.shape == (12, 2) and g1.shape == (12, 4)
    supers = torch.tensor([1, 0, 0, 1])[y]
    powers = g0.clamp(-50, 50).exp()
    share = (powers.gather(1, supers[:, None])[:, 0] + 1e-9) / (powers.sum(1) + 1e-9)
    assert_same(report.losses[0], -share.log().mean())
    own = g1.gather(1, y[:, None])
    rest = (g1.sum(1, keepdim=True) - own) / 3
    assert_same(report.losses[1], ((F.softplus(2 - own) + F.softplus(rest - 2)) / 2).mean())


PLANS = [("deeperforward/tinycnn", {"widths": (10, 10, 20, 20), "dropout": 0.2}),
         ("fflib/ffnn", {"layers": (20, 16), "propagate": "stale"}),
         ("symba/mlp", {"layers": (20, 16, 12)}), ("sn/mlp", {"layers": (20, 20)}),
         ("cff/fixed", {"layers": (20, 16)}), ("trifecta/fcn", {"width": 12, "depth": 3})]


@pytest.mark.parametrize(("name", "options"), PLANS, ids=[n for n, _ in PLANS])
def test_every_allowed_plan_gives_the_same_result(name: str, options: dict[str, Any]) -> None:
    results = []
    for choice in range(3):
        torch.manual_seed(0)
        net = ff.models.create(name, image_size=8, in_channels=1, **options)
        planner = Planner(measure(net.double(), rows_of(net, 8), torch.float64, states=2,
                                  device="cpu"))
        cuts = [[], [0], list(range(len(net.layers) - 1))][choice]
        tile = [1, 4, 16][choice] if not planner.sizes.whole else 16
        t = trainer(net, None, precision="fp64", plan=planner.fixed(cuts, tile))
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            x = torch.rand(8, 1, 8, 8, generator=generator, dtype=torch.float64)
            report = t.step(x, torch.randint(10, (8,), generator=generator))
        results.append((report, net))
    for report, net in results[1:]:
        for mine, first in zip(report.losses, results[0][0].losses, strict=True):
            assert (mine is None) == (first is None)
            if mine is not None:
                assert_same(mine, first)
        for (n, p), q in zip(net.named_parameters(), results[0][1].parameters(), strict=True):
            assert_same(p, q, n)


def test_training_accuracy_counts_what_a_step_computed() -> None:
    x, y = samples(40)
    net = mlp(2, heads=1, readout=Readout("head"))
    rows = trainer(net, Together(), epochs=40, lr=0.05).fit([(x, y)]).rows
    assert rows[-1].train_accuracy > 0.9 >= rows[0].train_accuracy


def test_pairs_and_classes_are_two_accuracies(tmp_path: Path) -> None:
    """Pairs as they pass; classes of the first thousand samples, every label tried, afterwards."""
    splits = ff.data.load("synthetic", shape=(1, 8, 8), train=40, valid=4, test=4)
    torch.manual_seed(0)
    net = ff.models.create("symba/mlp", image_size=8, layers=(20, 16))
    t = trainer(net, None, out=tmp_path)
    rows = t.fit(ff.data.loader(splits.train, batch_size=8, shuffle=True)).rows
    shown = t.evaluate([splits.train.batch(slice(0, 1000))])
    assert rows[-1].train_accuracy == shown
    assert rows[-1].pair_accuracy is not None and rows[-1].pair_accuracy != shown
    assert read_rows(tmp_path / "history.csv") == rows
    (plain,) = trainer(mlp(2), Together(), epochs=1).fit([samples()]).rows
    assert plain.pair_accuracy is None and plain.train_accuracy is not None
    x, y = splits.train.batch(slice(0, 40))
    parts = [(x[:10], y[:10]), (x[10:], y[10:])]
    (listed,) = trainer(ff.models.create("symba/mlp", image_size=8, layers=(20, 16)), None,
                        epochs=1).fit(parts).rows
    assert listed.train_accuracy is not None
    (drawn,) = trainer(ff.models.create("symba/mlp", image_size=8, layers=(20, 16)), None,
                       epochs=1).fit(Once(parts)).rows
    assert drawn.train_accuracy is None and drawn.pair_accuracy is not None


class Once:
    """A loader that only iterates."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)


def test_layers_of_super_classes_tell_no_classes() -> None:
    net = ff.models.create("sn/cifar100", num_classes=10, in_channels=1, image_size=8,
                           widths=(5, 10, 10, 10, 20, 20, 20),
                           superclasses=(0, 1, 2, 3, 4, 4, 3, 2, 1, 0))
    t = trainer(net, None, epochs=1)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(12, 1, 8, 8, generator=generator), torch.arange(12) % 10
    found = t.evaluate_layers([(x, y)])
    assert found[:4] == [None] * 4 and all(0 <= a <= 1 for a in found[4:] if a is not None)
    assert found[-1] == t.evaluate([(x, y)])


def test_head_features_do_not_depend_on_the_plan() -> None:
    """A tiled run must not write over a map that a head still reads."""
    def logits(cuts: list[int], tile: list[int]) -> torch.Tensor:
        torch.manual_seed(0)
        config = LocalPassConfig(groups=10)
        net = LocalNet([LocalConv2d(10, 10, 3, config=config) for _ in range(3)], num_classes=10,
                       in_shape=(10, 4, 4), heads=[LinearHead((0,), 160, 10)])
        t = ff.Trainer(net, progress=False, seed=0)
        t.planning.base = TrainingPlan(((0, t.planning.planner(16).fixed(cuts, tile)),))
        x = torch.randn(16, 10, 4, 4, generator=torch.Generator().manual_seed(1))
        made = t.step(x, torch.arange(16) % 10).heads[0]
        assert made is not None
        return made[1]

    whole = logits([], [16])
    for cuts, tile in (([0, 1], [16, 4, 4]), ([0], [16, 4]), ([], [4])):
        assert torch.allclose(logits(cuts, tile), whole, atol=1e-5)


def test_a_head_that_blows_up_stops_training() -> None:
    net = LocalNet([LocalConv2d(1, 10, 3, config=LocalPassConfig(groups=10))], num_classes=10,
                   in_shape=(1, 4, 4), heads=[LinearHead((0,), 160, 10, optim={"lr": 1e38})])
    t = ff.Trainer(net, progress=False)
    with pytest.raises(ff.TrainingStopped, match="the loss of head 0 became"):
        for _ in range(5):
            t.step(torch.rand(4, 1, 4, 4), torch.arange(4))


def test_updated_features_refuse_batch_statistics() -> None:
    layers = [LocalConv2d(1, 10, 3, config=LocalPassConfig(groups=10, norm=Norm("none")),
                          batch_coupling=BatchNorm())]
    with pytest.raises(ValueError, match="expected layers without dropout and batch statistics"):
        LocalNet(layers, num_classes=10, in_shape=(1, 4, 4), propagate="updated")


@pytest.mark.parametrize(("name", "options"), [
    ("sn/mlp", {"layers": (2000, 10)}), ("sn/cifar10", {"widths": (10, 20, 20, 20)}),
    ("cafo/cnn", {}), ("cff/adaptive", {"layers": (200, 100)})])
def test_a_store_counts_and_is_planned(name: str, options: dict[str, Any]) -> None:
    """The store is in the metered peak and in the plan of every phase."""
    splits = ff.data.load("digits")

    def peaks(features: str) -> list[tuple[int, int]]:
        """(planned, metered) of every phase."""
        torch.manual_seed(0)
        net = ff.models.create(name, in_channels=1, image_size=8, **options)
        t = ff.Trainer(net, epochs=1, batch_size=64, progress=False,
                       schedule=type(net.schedule)(features=features))  # type: ignore[arg-type]
        found = []
        for epoch in range(t.epochs):
            t.peak_bytes = 0
            t.meter_next()
            t.fit(ff.data.loader(splits.train, batch_size=64), until=epoch + 1)
            found.append((t.planning.plans(64).at(epoch).peak_bytes, t.peak_bytes))
        return found

    kept, again = peaks("ram"), peaks("recompute")
    for planned, metered in (*kept, *again):
        assert abs(planned / metered - 1) <= 0.02, (kept, again)
    if name == "sn/mlp":
        assert kept[-1][1] - again[-1][1] > 0.9 * 1257 * 2000 * 4
