"""What every registered network can do: train its turn, save, move, resume, export, predict."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from models.every import NAMES, OPPONENTS, batch, moved, network, state, trainer

import ffengine as ff
from ffengine.engine.context import Turn
from ffengine.engine.schedules.backprop import Backprop
from ffengine.engine.schedules.collaborative import Collaborative
from ffengine.engine.schedules.schedule import Overlapping
from ffengine.nn import LabelChannel, LocalNet

every = pytest.mark.parametrize("name", NAMES)
#: A twin that reads goodness as its original does is the same program.
EXPORTED = [n for n in NAMES
            if not n.startswith("bp/") or n in OPPONENTS or len(network(n).heads)]


def layerwise(name: str) -> bool:
    return hasattr(network(name).schedule, "stage")


def parameters(net: LocalNet, prefix: str) -> set[str]:
    return {n for n, p in net.named_parameters() if n.startswith(prefix) and p.requires_grad}


def expected(net: LocalNet, turn: Turn) -> set[str]:
    """Names of the parameters that a turn trains."""
    if isinstance(net.schedule, Backprop):
        return parameters(net, "")
    layers = set(turn.layers)
    found: set[str] = set()
    if isinstance(net.schedule, Overlapping):
        layers |= {i - 1 for i in turn.layers if i}
        if 0 in turn.layers and isinstance(net.encoding, LabelChannel):
            found |= parameters(net, "encoding.")
    if isinstance(net.schedule, Collaborative):
        found |= parameters(net, "gamma")
    for i in layers:
        found |= parameters(net, f"layers.{i}.")
    for h in turn.heads:
        found |= parameters(net, f"heads.{h}.")
    return found


@every
def test_a_step_trains_whose_turn_it_is_and_nothing_else(name: str) -> None:
    net = network(name)
    t = trainer(net)
    weights = {n for n, _ in net.named_parameters()}
    for epoch, iteration in ((0, 0), (0, 1), (t.epochs - 1, 0)):
        before, turn = state(net), t.schedule.turn(epoch, iteration)
        report = t.step(*batch(net, seed=10 * epoch + iteration), epoch=epoch,
                        iteration=iteration)
        changed = moved(before, net)
        assert changed & weights == expected(net, turn)
        assert all(k.rsplit(".", 1)[1].startswith("running_") for k in changed - weights)
        takes = (len(net.layers) - 1,) if isinstance(net.schedule, Backprop) else turn.layers
        for i in range(len(net.layers)):
            loss, goodness = report.losses[i], report.goodness[i]
            assert (loss is not None) == (i in takes)
            assert loss is None or (loss.shape == () and loss.isfinite())
            if goodness is not None:
                assert goodness.isfinite().all() and i in turn.layers
                assert goodness.shape[0] == (16 if goodness.shape[1] == 1 else 8)
        trained = [] if isinstance(net.schedule, Backprop) else turn.heads
        for h, made in enumerate(report.heads):
            assert (made is not None) == (h in trained)
            assert made is None or (made[0].isfinite() and made[1].shape == (8, 10))


@every
def test_state_dict_round_trip(name: str) -> None:
    net, other = network(name), network(name, seed=1)
    t = trainer(net)
    for iteration in range(2):
        t.step(*batch(net), iteration=iteration)
    net.set_range(len(net.layers) - 1, len(net.layers) - 1)
    held = net.state_dict()
    assert {n for n, _ in [*net.named_parameters(), *net.named_buffers()]} | {
        "_extra_state"} == set(held)
    other.load_state_dict(held, strict=True)
    x, _ = batch(net, 5)
    assert other.layer_range == net.layer_range
    assert torch.equal(net(x), other(x))


def test_state_dicts_hold_what_is_not_a_weight() -> None:
    assert "gamma" in network("cff/adaptive").state_dict()
    assert "encoding.weight" in network("trifecta/shallow").state_dict()
    assert "layers.0.pre_norm.running_var" in network("trifecta/shallow").state_dict()
    assert "layers.0.running_mean" in network("hinton/peer-norm").state_dict()
    assert "layers.3.label_map" in network("sn/cifar100").state_dict()
    assert "hidden_1" in network("fflib/ffrnn").state_dict()
    assert {"heads.0.weight", "heads.0.bias"} <= set(network("fflib/ffnn-c").state_dict())


@every
def test_moves_with_everything_it_holds(name: str) -> None:
    net = network(name)
    trainer(net).step(*batch(net))
    x, _ = batch(net)
    before = net(x)
    wide = copy.deepcopy(net).to(torch.float64)
    assert {t.dtype for t in wide.state_dict().values()} <= {torch.float64, torch.int64}
    torch.testing.assert_close(wide(x.double()).float(), before, rtol=1e-3, atol=1e-3)
    assert torch.equal(wide.to(torch.float32)(x), before)
    assert torch.equal(net(x), before)
    away = copy.deepcopy(net).to("meta")
    assert {t.device.type for t in [*away.parameters(), *away.buffers()]} == {"meta"}


def loader(net: LocalNet) -> Any:
    splits = ff.data.load("synthetic", shape=net.in_shape, train=20, valid=2, test=2)
    return ff.data.loader(splits.train, batch_size=8, shuffle=True)


def fitted(name: str, folder: Path, *stops: int, **settings: Any) -> ff.Trainer:
    """A run of two epochs (a layer, where layer-wise) that ends and goes on at every stop."""
    for number, stop in enumerate(stops):
        net = network(name, seed=number)
        t = trainer(net, out=folder, **settings)
        if number:
            t.resume(folder)
        t.fit(loader(net), until=stop)
    return t


@every
def test_resume_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    epochs = 2 if layerwise(name) else 3
    straight = fitted(name, tmp_path / "a", 3, epochs=epochs)
    broken = fitted(name, tmp_path / "b", 1, 2, 3, epochs=epochs)
    assert not moved(state(straight.net), broken.net)
    mine, theirs = (t.optimizer.export_state() for t in (straight, broken))
    assert mine[0].keys() == theirs[0].keys() and mine[1] == theirs[1]
    assert all(torch.equal(m, theirs[0][k]) for k, m in mine[0].items())


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_with_any_batch(name: str) -> None:
    net = network(name).eval()
    if name.startswith("deeperforward"):  # tracing costs a tenth of a second a layer
        net.set_range(1, min(6, len(net.layers) - 1))
    rows = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (batch(net, 2)[0],), dynamic_shapes=({0: rows},)).module()
    for n in (1, 5):
        x, _ = batch(net, n)
        torch.testing.assert_close(program(x), net(x), rtol=1e-3, atol=1e-4)


@every
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
def test_what_jit_traces_computes_any_batch(name: str) -> None:
    """Kernels that torch does not see would leave the memory they write as it was found."""
    net = network(name).eval()
    traced = torch.jit.trace(net, batch(net, 2)[0], check_trace=False)
    for n in (1, 5):
        x, _ = batch(net, n)
        torch.testing.assert_close(traced(x), net(x), rtol=1e-3, atol=1e-4)


@every
def test_predictions_ignore_the_rest_of_the_batch_and_leave_no_trace(name: str) -> None:
    net = network(name)
    t = trainer(net, precision="fp64")
    t.step(*batch(net))
    x, _ = batch(net, 7)
    x.flatten(1)[:, -1] = 1.0  # an overlay may show the largest pixel of the batch
    before, generator = state(net), torch.get_rng_state()
    whole = net(x)
    assert whole.shape == (7, 10) and whole.dtype is torch.float64 and not whole.requires_grad
    torch.testing.assert_close(torch.cat([net(x[:1]), net(x[1:5]), net(x[5:])]), whole)
    net.goodness(x)
    t.evaluate([batch(net)])
    t.evaluate_layers([batch(net)])
    assert not moved(before, net) and torch.equal(generator, torch.get_rng_state())


def test_batch_statistics_tie_predictions_and_still_leave_no_trace() -> None:
    """CaFo as published: every set is normalised by its own statistics."""
    net = network("cafo/cnn", batch_statistics=True)
    trainer(net).step(*batch(net))
    x, _ = batch(net, 8)
    before, whole = state(net), net(x)
    assert not moved(before, net)
    assert not torch.allclose(net(x[:4]), whole[:4])
    program = torch.export.export(net.eval(), (x,)).module()
    torch.testing.assert_close(program(x), whole)


@pytest.mark.parametrize("name", ["sn/mlp", "hinton/threshold", "cff/adaptive", "cafo/cnn",
                                  "trifecta/shallow", "fflib/ffrnn"])
def test_an_interrupted_epoch_goes_on_bit_for_bit(name: str, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C inside the second stage (or epoch), then on from there."""
    epochs = 1 if layerwise(name) else 2
    straight = fitted(name, tmp_path / "a", 2, epochs=epochs)
    t = trainer(network(name), out=tmp_path / "b", epochs=epochs)
    step = t.step

    def interrupted(*args: Any, **keywords: Any) -> Any:
        if t.steps == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **keywords)

    monkeypatch.setattr(t, "step", interrupted)
    with pytest.raises(ff.TrainingInterrupted, match="epoch 1, batch 2"):
        t.fit(loader(t.net))
    again = trainer(network(name, seed=5), out=tmp_path / "b", epochs=epochs)
    again.resume(tmp_path / "b")
    again.fit(loader(again.net), until=2)
    assert not moved(state(straight.net), again.net)


@every
def test_trains_in_sixteen_bits(name: str) -> None:
    for precision in ("bf16", "fp16"):
        net = network(name)
        t = trainer(net, precision=precision)
        x, y = batch(net)
        if precision == "fp16" and isinstance(net.schedule, Backprop):
            with pytest.raises(ValueError, match=r"expected precision .* got fp16"):
                t.step(x, y)
            continue
        for iteration in range(2):
            report = t.step(x, y, iteration=iteration)
            assert all(loss is None or loss.isfinite() for loss in report.losses)
        assert {p.dtype for p in net.parameters()} == {torch.float32}
        assert all(p.isfinite().all() for p in net.parameters())
        assert 0 <= t.evaluate([(x, y)]) <= 1
        assert all(part is None or 0 <= part <= 1 for part in t.evaluate_layers([(x, y)]))
