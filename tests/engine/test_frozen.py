"""A frozen parameter stays as it is, whenever it was frozen; one that was replaced is named."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine.test_refusals import network
from engine.training import grouped, same, weights
from torch import nn

import ffengine as ff
from ffengine.engine.schedules.backprop import Backprop
from ffengine.engine.schedules.layerwise import Layerwise
from ffengine.engine.schedules.schedule import Interleaved, Together
from ffengine.nn.heads import LinearHead


def batch(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(n, 1, 8, 8, generator=generator), torch.arange(n) % 10


def made(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return network(name, **options)


def stepped(net: Any, freeze: tuple[str, ...], before: bool, steps: int = 1, n: int = 8,
            **options: Any) -> dict[str, torch.Tensor]:
    """The weights after some steps with parameters frozen before, or after, the trainer is built.
    """
    named = dict(net.named_parameters())
    if before:
        for name in freeze:
            named[name].requires_grad_(False)
    if type(net.schedule) in (Layerwise, Interleaved):  # a layer at a time
        options["schedule"] = Together()
    t = grouped(net, progress=False, lr=0.05, weight_decay=0.1, **options)
    if not before:
        for name in freeze:
            named[name].requires_grad_(False)
    for _ in range(steps):
        t.step(*batch(n))
    return weights(net)


#: A network, and the parameters of it that are frozen.
CASES = {
    "a dense layer's bias": ("hinton/threshold", ("layers.0.bias",), {}),
    "a dense layer's weight": ("hinton/threshold", ("layers.1.weight",), {}),
    "both of a dense layer": ("hinton/threshold", ("layers.1.weight", "layers.1.bias"), {}),
    "a convolution's weight": ("cwcomp/ffcnn", ("layers.1.weight",), {}),
    "a convolution's bias": ("cwcomp/ffcnn", ("layers.0.bias",), {}),
    "a head's weight": ("trifecta/shallow", ("heads.0.weight",), {"readout": "head"}),
    "a head's bias": ("trifecta/shallow", ("heads.0.bias",), {"readout": "head"}),
    "an affine map": ("trifecta/shallow", ("layers.2.pre_norm.weight",), {}),
    "a frame's weight": ("fflib/ffrnn", ("layers.1.weight",), {}),
    "a frame's bias": ("fflib/ffrnn", ("layers.0.bias",), {}),
    "a streamed weight": ("hinton/threshold", ("layers.1.weight",), {}),
    "a streamed bias": ("hinton/threshold", ("layers.0.bias",), {}),
}


#: Whose step is slow: once is enough.
ONCE = {"a head's weight": True, "a head's bias": False, "an affine map": False}


@pytest.mark.parametrize("case, before", [
    (case, before) for case in CASES for before in (True, False)
    if ONCE.get(case, before) == before])
def test_what_is_frozen_stays_and_all_else_moves_as_ever(case: str, before: bool) -> None:
    name, freeze, options = CASES[case]
    n = 40 if "streamed" in case else 8  # which linear_step takes, whole
    first = made(name, **options)
    start, free = weights(first), stepped(copy.deepcopy(first), (), False, n=n)
    held = stepped(copy.deepcopy(first), freeze, before, n=n)
    for frozen in freeze:
        assert torch.equal(held[frozen], start[frozen]), frozen
        assert not torch.equal(free[frozen], start[frozen]), f"{frozen} never moves"
    # a step in which all layers see the weights before it: the others do not feel it
    if name != "fflib/ffrnn":
        assert all(torch.equal(held[k], free[k]) for k in start if k not in freeze)
    if name == "hinton/threshold":
        stepped(first, freeze, before, steps=2, n=n, batch_size=n)  # planned, and twice


def test_a_layer_of_a_later_stage_stays() -> None:
    net = made("sn/mlp")
    net.layer(1).weight.requires_grad_(False)
    t = ff.Trainer(net, schedule=Layerwise(), epochs=1, progress=False)
    start = weights(net)
    t.fit([batch()] * 2)
    assert torch.equal(net.layer(1).weight, start["layers.1.weight"])
    assert not torch.equal(net.layer(0).weight, start["layers.0.weight"]) and t.epoch == 2


def test_backpropagation_leaves_it_too() -> None:
    net = made("sn/mlp")
    t = ff.Trainer(net, schedule=Backprop(), progress=False)
    start = weights(net)
    net.layer(1).weight.requires_grad_(False)
    t.step(*batch())
    assert torch.equal(net.layer(1).weight, start["layers.1.weight"])
    assert not torch.equal(net.layer(0).weight, start["layers.0.weight"])


def test_freed_again_it_trains_with_states_of_its_own() -> None:
    net = made("hinton/threshold")
    t = ff.Trainer(net, progress=False)
    bias = net.layer(0).bias
    t.step(*batch())
    bias.requires_grad_(False)
    t.step(*batch())
    assert "layers.0.bias" not in t.optimizer.states
    kept = bias.detach().clone()
    t.step(*batch())
    assert torch.equal(bias, kept)
    bias.requires_grad_(True)
    t.step(*batch())
    assert not torch.equal(bias, kept) and t.optimizer.states["layers.0.bias"].step == 1


def replaced_parameter(net: Any) -> None:
    net.layer(1).weight = nn.Parameter(net.layer(1).weight.detach().clone())


def replaced_layer(net: Any) -> None:
    net.layers[1] = copy.deepcopy(net.layer(1))


def replaced_head(net: Any) -> None:
    net.heads.append(LinearHead((1,), 10, 10))


def other_dtype(net: Any) -> None:
    net.layer(1).weight.data = net.layer(1).weight.data.double()


def freed(net: Any) -> None:
    net.layer(0).bias.requires_grad_(True)


@pytest.mark.parametrize("change, expected", [
    (replaced_parameter, r"expected layers\.1\.weight to be what"),
    (replaced_layer, r"expected layers\.1 to be what"),
    (replaced_head, r"expected heads\.0 to be what"),
    (other_dtype, r"expected layers\.1\.weight of float32, .* got float64"),
    (freed, r"expected layers\.0\.bias frozen")])
def test_what_was_replaced_is_named_before_anything_moves(change: Any, expected: str) -> None:
    net = made("hinton/threshold")
    net.layer(0).bias.requires_grad_(False)
    t = ff.Trainer(net, progress=False)
    t.step(*batch())
    change(net)
    before, states = weights(net), {k: v.clone() for k, v in t.optimizer.export_state()[0].items()}
    with pytest.raises(ValueError, match=rf"^\[trainer\] {expected}") as caught:
        t.step(*batch())
    assert "\n" not in str(caught.value) and t.steps == 1
    assert same(before, weights(net)) and same(states, t.optimizer.export_state()[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))],
                         ids=["deepcopy", "pickle"])
def test_a_trainer_is_copied_whole(copied: Any) -> None:
    t = ff.Trainer(made("sn/mlp"), progress=False)
    t.step(*batch())
    other = copied(t)
    assert same(weights(t.net), weights(other.net)) and other.steps == 1
    for each in (t, other):
        each.step(*batch())
    assert same(weights(t.net), weights(other.net))
    assert other.net.layer(0).weight.data_ptr() != t.net.layer(0).weight.data_ptr()


class Scaled(nn.Module):
    """A loss that would learn its own temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.scale * g, y, reduction="none")


def test_parameters_of_a_loss_are_refused_and_fixed_ones_are_not() -> None:
    net, loss = made("sn/mlp"), Scaled()
    net.layer(1).config = replace(net.layer(1).config, loss=loss)
    with pytest.raises(ValueError, match=r"loss of layer 1 expected no parameters.*got scale"):
        ff.Trainer(net, progress=False)
    loss.requires_grad_(False)
    ff.Trainer(net, progress=False).step(*batch())


@pytest.mark.parametrize("loss", [
    lambda g, y: torch.ones(len(g)), lambda g, y: g.detach().sum(1),
    lambda g, y: torch.ones(len(g), requires_grad=True) * 2], ids=["constant", "cut", "another's"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_loss_without_the_goodness_is_named(loss: Any, backend: str) -> None:
    net = made("sn/mlp")
    net.layer(0).config = replace(net.layer(0).config, loss=loss)
    with pytest.raises(ValueError, match="a loss function must depend on the goodness"):
        ff.Trainer(net, progress=False, backend=backend).step(*batch())


@pytest.mark.parametrize("place", [{"epoch": -1}, {"epoch": 1.0}, {"iteration": -2},
                                   {"epoch": True}])
def test_a_place_that_is_no_count_is_refused(place: dict[str, Any]) -> None:
    t = ff.Trainer(made("sn/mlp"), progress=False)
    before = weights(t.net)
    (name, value), = place.items()
    with pytest.raises(ValueError, match=rf"\[train\] {name} expected a whole number.*{value}"):
        t.step(*batch(), **place)
    assert same(before, weights(t.net)) and (t.epoch, t.iteration, t.steps) == (0, 0, 0)
