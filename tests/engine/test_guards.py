"""Numbers at the ends of the range: finite and right, or a named stop before anything moves."""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from engine.test_refusals import network
from engine.training import loaders, same, weights

import ffengine as ff
from ffengine.engine.run.overtraining import Overtraining
from ffengine.engine.run.recipe import Recipe
from ffengine.engine.run.stopping import TrainingStopped
from ffengine.ops.config import LocalPassConfig, Norm
from ffengine.ops.local_pass import local_pass
from ffengine.reference import local_pass as reference

X, Y = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(4)), torch.arange(8)


def made(name: str, **options: Any) -> ff.Trainer:
    torch.manual_seed(0)
    return ff.Trainer(network(name), progress=False, **options)


def poor(x: torch.Tensor, value: float) -> torch.Tensor:
    x = x.clone()
    x[3, 0, 2, 2] = value
    return x


@pytest.mark.parametrize("name", ["deeperforward/tinycnn", "hinton/threshold"])
@pytest.mark.parametrize("precision, x", [
    ("fp32", poor(X.double(), 1e300)), ("fp32", poor(X, 1e30)), ("fp32", poor(X, -1e19)),
    ("fp16", poor(X, 7e4)), ("fp16", poor(X, 65520.0)), ("bf16", poor(X.bfloat16(), 1e30)),
    ("fp32", poor(X.half(), float("inf"))), ("fp64", poor(X.double(), 1e200))])
def test_samples_are_held_to_the_runs_own_range(name: str, precision: str,
                                                x: torch.Tensor) -> None:
    t = made(name, precision=precision, backend="reference" if precision == "fp64" else "auto")
    before = weights(t.net)
    with pytest.raises(TrainingStopped, match=r"input of layer 0 .*step 0 of epoch 0") as caught:
        t.step(x, Y)
    assert "\n" not in str(caught.value) and same(before, weights(t.net)) and t.steps == 0


@pytest.mark.parametrize("precision, x", [
    ("fp32", poor(X, 1e16)), ("fp16", poor(X, 65504.0)), ("fp32", poor(X.half(), 65504.0)),
    ("bf16", 1e10 * X), ("fp32", 1e-30 * X), ("fp32", X + 1000), ("fp32", 0 * X)])
def test_what_is_within_it_trains(precision: str, x: torch.Tensor) -> None:
    t = made("deeperforward/tinycnn", precision=precision)
    t.step(x, Y)
    assert t.steps == 1 and all(bool(v.isfinite().all()) for v in weights(t.net).values())


def test_negatives_and_states_are_looked_at_as_samples_are() -> None:
    t = made("fflib/ffnn")
    with pytest.raises(TrainingStopped, match="input of layer 0"):
        t.step({"x": X, "y": Y, "negatives": torch.full((8, 10), float("nan"))})
    t = made("fflib/ffrnn")
    hidden = [[torch.zeros(1, 12), torch.full((1, 10), float("inf"))] for _ in range(2)]
    with pytest.raises(TrainingStopped, match="input of layer 0"):
        t.step({"x": X, "y": Y, "hidden": hidden})


@pytest.mark.parametrize("kind", ["group", "layer", "length"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_activations_whose_squares_overflow_are_normalised_all_the_same(kind: Any,
                                                                        backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a = 2e19 * torch.randn(6, 8, 3, 3, generator=generator)
    a[1] *= 1e-19  # an ordinary sample beside them
    config = LocalPassConfig(groups=4, norm=Norm(kind))
    right = reference.local_pass(a.double(), config=config)[0]
    assert right is not None and right[0].max() > 1
    made = local_pass(a, Y[:6] % 4, config=config, want_da=True, backend=backend)
    assert made.z is not None and (made.z - right).abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"\[local_pass\] out=a expected .* got a goodness of"):
        local_pass(a, config=config, out=a, backend=backend)


@pytest.mark.parametrize("name", ["deeperforward/tinycnn", "hinton/threshold", "fflib/ffnn"])
def test_predictions_do_not_depend_on_the_scale_of_huge_samples(name: str) -> None:
    """Inputs are normalised: 1e20 and 1e30 times an image is the same image."""
    torch.manual_seed(0)
    net = network(name)
    right = net(1e10 * X)
    for scale in (1e20, 1e30):
        found = net(scale * X)
        assert right.std() > 0 and (found - right).abs().max() < 1e-4 * right.abs().max()


def test_a_step_whose_activations_overflow_is_stopped_by_name() -> None:
    t = made("deeperforward/tinycnn")
    with torch.no_grad():
        t.net.layer(1).weight.abs_().mul_(1e20)
    with pytest.raises(TrainingStopped, match=r"loss of layer 1 is of activations .* step 0: "):
        t.step(X, Y)
    torch.manual_seed(0)
    t = ff.Trainer(network("cwcomp/ffcnn", ilt="none"), progress=False)
    with torch.no_grad():
        t.net.layer(1).weight.abs_().mul_(1e20)
    with pytest.raises(TrainingStopped, match=r"loss of layer 1 .* step 0: \[batch_pass\] .*var"):
        t.step(X, Y)


@pytest.mark.parametrize("epoch, valid, best, told", [
    (9, 0.80, 0.95, False), (10, 0.945, 0.95, False), (10, 0.93, 0.95, True),
    (30, None, 0.95, False), (30, 0.5, None, False)])
def test_a_run_past_its_recipe_that_gets_worse_says_so_once(
        caplog: Any, epoch: int, valid: float | None, best: float | None, told: bool) -> None:
    caplog.set_level(logging.WARNING, "ffengine")
    watch = Overtraining(10)
    for _ in range(2):
        watch.look(epoch, valid, best)
    found = [r.getMessage() for r in caplog.records]
    assert len(found) == told
    assert not told or ("93.0 %" in found[0] and "2.0 points" in found[0] and "10 ep" in found[0])


def test_the_trainer_watches_past_the_recipes_epochs(caplog: Any) -> None:
    recipe = Recipe(epochs=1)
    t = made("sn/mlp", recipe=recipe, epochs=2)
    assert t.overtraining.usual == t.epochs / 2 == 2  # two layers, an epoch each
    t.best_accuracy = 1.0
    train, valid, _ = loaders()
    t.fit(train, valid)
    assert "points less than the best epoch did" in caplog.text


@contextmanager
def default_device() -> Any:
    torch.set_default_device("meta")  # what is made without a device would have no numbers
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype() -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["fflib/ffrnn", "deeperforward/tinycnn"])
def test_a_fit_takes_over_nothing_of_its_callers(name: str) -> None:
    def fitted(around: Any) -> tuple[Any, ...]:
        t, (train, valid, test) = made(name, epochs=1), loaders()
        with around:
            t.fit(train, valid)
            found = t.evaluate(test), t.evaluate_layers(test), t.best_accuracy
        return weights(t.net), found

    alone, found = fitted(nullcontext())
    for around in (default_device(), default_dtype(), torch.autocast("cpu", torch.bfloat16)):
        mine, here = fitted(around)
        assert same(mine, alone) and here == found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["cafo/cnn", "trifecta/shallow", "fflib/ffrnn"])
def test_a_network_in_16_bits_predicts(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = network(name)
    right = net(X)
    found = net.to(dtype)(X.to(dtype)).float()
    assert (found - right).abs().max() < 0.05 * right.abs().max()


def test_frames_may_be_predicted_under_autocast() -> None:
    torch.manual_seed(0)
    net = network("fflib/ffrnn")
    right = net(X)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(X)
    assert (found.float() - right).abs().max() < 0.05 * right.abs().max()
