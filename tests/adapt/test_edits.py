"""Structural edits: what follows a unit, inverses bit for bit, training that goes on."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from models.every import batch, network, trainer

import ffengine as ff
from ffengine.adapt import (
    add_units,
    apply,
    invert,
    remove_units,
    reorder_units,
    restructure,
)
from ffengine.adapt.responses import below
from ffengine.adapt.training import decoded, reshape
from ffengine.engine.run import checkpoint
from ffengine.engine.schedules.schedule import Schedule
from ffengine.nn import LocalConv2d, LocalLinear, LocalNet
from ffengine.nn.network import Wire
from ffengine.ops.config import LocalPassConfig, Norm

#: Concatenated and added shortcuts, batch norms before and after, flattened maps, heads on z and h,
#: peers, layers that see the layer above, label channels.
NAMES = ("deeperforward/resnet17", "cwcomp/ffcnn", "sn/cifar100", "fflib/ffnn-c", "fflib/ffrnn",
         "hinton/peer-norm", "trifecta/shallow", "cafo/cnn", "bp/fflib/ffrnn", "bp/sn/cifar10")


def lively(name: str) -> LocalNet:
    """In fp64, every parameter and statistic its own number, so that a wrong column shows."""
    wide = {"planes": (20, 40, 80, 160)} if name == "deeperforward/resnet17" else {}
    net = network(name, **wide).double().eval()
    for head in net.heads:
        torch.nn.init.normal_(head.weight)
    for key, value in net.state_dict().items():
        if key.endswith(("norm_weight", "running_var", "norm_bias", "running_mean", "bias")) or (
                "pre_norm" in key):
            value.copy_(torch.rand_like(value) + 0.5)
    return net


def places(net: LocalNet) -> list[int]:
    return sorted({0, len(net.layers) // 2, len(net.layers) - 1})


def turned(net: LocalNet, layer: int) -> list[int]:
    """An order that turns every group round."""
    edges = net.layer(layer).config.offsets(net.layer(layer).units)
    return [u for s, e in pairwise(edges) for u in reversed(range(s, e))]


def removable(net: LocalNet, layer: int) -> list[int]:
    """The last unit of the first group that has more than one, if there is such a group."""
    edges = net.layer(layer).config.offsets(net.layer(layer).units)
    return [e - 1 for s, e in pairwise(edges) if e - s > 1][:1]


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_and_its_inverse_restore_every_bit(name: str) -> None:
    net = lively(name)
    x, _ = batch(net, 3)
    before, held = net.scores(x, backend="reference"), net.state_dict()
    for layer in places(net):
        size = net.layer(layer).units
        edits = [add_units(net, layer, at=[0, size], like=size // 2, seed=1)]
        edits += [remove_units(net, layer, [u]) for u in removable(net, layer)]
        for changed, edit in edits:
            grown = len(edit.new(layer)) - len(edit.gone(layer))
            assert changed.layer(layer).units == size + grown != size
            back = apply(changed, invert(edit))
            assert torch.equal(back.scores(x, backend="reference"), before)
            assert all(torch.equal(v, held[k]) for k, v in back.state_dict().items())
            assert [str(m.config) for m in back.layers] == [str(m.config) for m in net.layers]


@pytest.mark.parametrize("name", NAMES)
def test_whatever_reads_a_unit_follows_it(name: str) -> None:
    net = lively(name)
    x, _ = batch(net, 3)
    before = net.scores(x, backend="reference")
    for layer in places(net):
        try:
            other, edit = reorder_units(net, layer, turned(net, layer))
        except ValueError:  # a tie puts one group's channels into several
            assert name == "deeperforward/resnet17"
            continue
        assert edit.new(layer) == edit.gone(layer) == []
        torch.testing.assert_close(other.scores(x, backend="reference"), before, rtol=1e-11,
                                   atol=1e-12)


def test_a_shortcut_that_adds_ties_the_channels_of_its_layers() -> None:
    net = lively("deeperforward/resnet17")
    smaller, edit = remove_units(net, 0, [0])
    joined = [i for i, wire in enumerate(net.wires) if wire.join == "add"]
    assert len(edit.units) > 2 and set(edit.units) - {0} <= set(joined)
    assert all(smaller.layer(i).units == net.layer(i).units - 1 for i in edit.units)
    unequal = smaller.layer(2).config
    assert isinstance(unequal.groups, tuple) and unequal.groups[-1] == smaller.layer(2).units


@pytest.mark.parametrize("name", ["sn/mlp", "sn/cifar10"])
def test_units_without_outgoing_effect_change_nothing(name: str) -> None:
    net = lively(name)
    last = len(net.layers) - 1
    net.set_range(last, last)
    x, _ = batch(net, 4)
    reads, size = net.layer(last), net.layer(last - 1).units
    pixels = reads.weight.shape[1] // size
    with torch.no_grad():
        reads.weight[:, 3 * pixels:4 * pixels] = 0
        reads.weight[:, 6 * pixels:7 * pixels] = 0
    before = net.scores(x, backend="reference")
    smaller, _ = remove_units(net, last - 1, [3, 6])
    assert smaller.layer(last).weight.shape[1] == (size - 2) * pixels
    torch.testing.assert_close(smaller.scores(x, backend="reference"), before, rtol=1e-12,
                               atol=1e-14)
    bigger, _ = add_units(smaller, last - 1, group=2, count=2, seed=0)
    torch.testing.assert_close(bigger.scores(x, backend="reference"), before, rtol=1e-12,
                               atol=1e-14)


def test_a_clone_moves_the_mean_of_its_own_group_alone() -> None:
    net = lively("deeperforward/tinycnn")
    x, _ = batch(net, 5)
    before = net.goodness(x, backend="reference")
    bigger, edit = add_units(net, 1, group=4, like=9)
    after = bigger.goodness(x, backend="reference")
    others = [k for k in range(10) if k != 4]
    assert edit.new(1) == [10] and torch.equal(after[0], before[0])
    # the library convolves 21 channels in another order of sums than 20
    torch.testing.assert_close(after[1][:, others], before[1][:, others], rtol=1e-14, atol=0)
    own = torch.relu(net.layer(1).preactivation(below(net, 1, x)))[:, 8:10].mean((2, 3))
    torch.testing.assert_close(after[1][:, 4], (own[:, 0] + 2 * own[:, 1]) / 3)


def test_own_values_and_columns_of_new_units() -> None:
    net = lively("fflib/ffnn-c")
    weight, columns = torch.rand(2, net.layer(0).in_size), torch.rand(16, 2)
    bigger, edit = add_units(net, 0, at=[4, 20], values={"weight": weight},
                             outgoing={"layers.1.weight": columns})
    assert edit.new(0) == [4, 21]
    assert torch.equal(bigger.layer(0).weight[[4, 21]], weight.double())
    assert torch.equal(bigger.layer(1).weight[:, [4, 21]], columns.double())
    assert not bigger.heads[0].weight[:, [4, 21]].any()
    with pytest.raises(ValueError, match=r"expected weight of shape \(1, .*got \(2,"):
        add_units(net, 0, group=0, values={"weight": weight})


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
def test_moments_go_with_their_units(states: str) -> None:
    net = network("fflib/ffnn", layers=(64, 80))
    run = trainer(net, states=states, batch_size=8)
    for seed in range(3):
        run.step(*batch(net, seed=seed))
    moment = second_moment(run, "layers.1.weight")
    smaller, edit = remove_units(net, 0, [2, 5])
    reshape(run, edit)
    kept = [u for u in range(64) if u not in (2, 5)]
    after = second_moment(run, "layers.1.weight")
    assert after.shape == (80, 62) and run.optimizer.states["layers.1.weight"].step == 3
    if states == "fp32":
        assert torch.equal(after, moment[:, kept])
        assert torch.equal(run.net.layer(1).weight, smaller.layer(1).weight)
    step = {"fp32": 0.0, "bf16": 2**-8, "8bit": 2**-3}[states]
    scale = moment.abs().max()
    torch.testing.assert_close(after, moment[:, kept], rtol=step, atol=float(step * scale) / 8)
    run.step(*batch(net))
    assert run.net.layer(0).units == 62


def second_moment(run: ff.Trainer, name: str) -> torch.Tensor:
    moment = decoded(run.optimizer.states[name], "v")
    assert moment is not None
    return moment.clone()


def test_training_goes_on_as_if_the_units_had_always_stood_so() -> None:
    plain, turned_run = (trainer(network("sn/mlp").double(), precision="fp64", lr=1e-3,
                                 backend="reference", schedule=Schedule()) for _ in range(2))
    for run in (plain, turned_run):
        for seed in range(2):
            run.step(*batch(run.net, seed=seed))
    _, edit = reorder_units(turned_run.net, 0, turned(turned_run.net, 0))
    reshape(turned_run, edit)
    for run in (plain, turned_run):
        run.step(*batch(run.net, seed=5))
    back = apply(turned_run.net, invert(edit))
    for key, value in back.state_dict().items():
        torch.testing.assert_close(value, plain.net.state_dict()[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["sn/mlp", "cwcomp/ffcnn"])
@pytest.mark.isa
def test_unequal_groups_train_alike_on_both_back_ends(name: str) -> None:
    net, _ = remove_units(network(name), 1, [0, 3])
    assert isinstance(net.layer(1).config.groups, tuple)
    twin, edit = add_units(net, 0, group=1, like=2)
    net = apply(net, edit)
    made = {}
    for backend, held in (("reference", net), ("cpu", twin)):
        run = trainer(held, backend=backend, schedule=Schedule(), optimizer="sgd", lr=0.1)
        report = run.step(*batch(held))
        made[backend] = (report.losses, held.state_dict())
    for one, other in zip(*(m[0] for m in made.values()), strict=True):
        assert one is not None and float(one) == pytest.approx(float(other), rel=1e-5)
    for key, value in made["reference"][1].items():
        torch.testing.assert_close(made["cpu"][1][key], value, rtol=1e-4, atol=1e-5)


def test_an_edited_run_resumes_in_a_network_built_anew(tmp_path) -> None:
    run = trainer(network("sn/cifar10"), schedule=Schedule(), out=tmp_path)
    run.step(*batch(run.net))
    reshape(run, add_units(run.net, 1, group=3, count=2, seed=0)[1])
    run.step(*batch(run.net))
    run.save()
    found = checkpoint.load(tmp_path).meta["structure"]
    assert found["units"][1] == 12 and found["groups"][1][3:5] == [3, 6]
    again = trainer(network("sn/cifar10", seed=9), schedule=Schedule())
    again.resume(tmp_path)
    other = trainer(network("sn/cifar10"), schedule=Schedule(), lr=0.5)
    with pytest.raises(ValueError, match=r"expected lr 0\.5"):
        other.resume(tmp_path)
    assert other.net.layer(1).units == 10
    built = network("sn/cifar10", seed=9)
    restructure(built, found)
    assert [m.config for m in built.layers] == [m.config for m in run.net.layers]
    for each in (run, again):
        each.step(*batch(each.net, seed=7))
    assert all(torch.equal(v, again.net.state_dict()[k]) for k, v in run.net.state_dict().items())


def test_an_edited_network_exports() -> None:
    net, _ = remove_units(lively("sn/cifar10"), 3, [0])
    net = net.float()
    x, _ = batch(net, 2)
    program = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(program(x), net(x), rtol=1e-4, atol=1e-5)


def needs_equal(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(g, y, reduction="none")


needs_equal.equal_groups = True  # type: ignore[attr-defined]


@pytest.mark.parametrize(("change", "said"), [
    (lambda net: remove_units(net, 7, [0]), r"expected a layer of 0\.\.1, got 7"),
    (lambda net: remove_units(net, 1, [0, 1]), "group 0 of layer 1 expected to keep a unit"),
    (lambda net: remove_units(net, 1, [20]), r"expected units of 0\.\.19, got \[20\]"),
    (lambda net: remove_units(net, 1, [3, 3]), "expected every unit once"),
    (lambda net: remove_units(net, 1, []), "got none"),
    (lambda net: add_units(net, 0, group=1), "the loss of layer 0 expected equal groups"),
    (lambda net: add_units(net, 1, group=10), r"expected a group of 0\.\.9"),
    (lambda net: add_units(net, 1), "expected at= or group=, got neither"),
    (lambda net: add_units(net, 1, at=[5, 2]), "expected rising places"),
    (lambda net: add_units(net, 1, at=[2], like=[1, 2]), "like expected one unit or 1, got 2"),
    (lambda net: reorder_units(net, 1, [1, 0]), "expected all 20 units"),
    (lambda net: reorder_units(net, 1, [2, 1, 0, *range(3, 20)]), "got unit 2 of layer 1"),
    (lambda net: apply(net, add_units(network("sn/cifar10"), 1, group=0)[1]), "expected 10 units"),
    (lambda net: apply(net, add_units(network("sn/mlp"), 0, group=0)[1]), "got another network"),
])
def test_what_cannot_be_edited_is_said_in_a_line_and_nothing_changes(change, said: str) -> None:
    config = LocalPassConfig(groups=10, goodness="sum_sq", norm=Norm("none"), loss=needs_equal)
    net = LocalNet([LocalLinear(4, 20, config=config), LocalLinear(
        20, 20, config=LocalPassConfig(groups=10, norm=Norm("none")))], num_classes=10,
        in_shape=(4,), input_norm="none")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=said) as caught:
        change(net)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_channel_groups_of_a_convolution_change_together() -> None:
    net = network("cwcomp/cfse", channels=(20, 20, 10, 20)).double().eval()
    x, _ = batch(net, 3)
    before = net.scores(x, backend="reference")
    for layer in (0, 1):
        with pytest.raises(ValueError, match=r"as many .* in each, got 19 in all"):
            remove_units(net, layer, [3])
        with pytest.raises(ValueError, match="unevenly"):
            add_units(net, layer, group=3, count=10)
        order = [u ^ 1 for u in range(20)]  # pairs change places
        other, _ = reorder_units(net, layer, order)
        torch.testing.assert_close(other.scores(x, backend="reference"), before)
        smaller, edit = remove_units(net, layer, range(0, 20, 2))
        assert smaller.layer(1).weight.shape[:2] == ((20, 1) if layer == 0 else (10, 2))
        smaller.scores(x, backend="reference")
        assert torch.equal(apply(smaller, invert(edit)).scores(x, backend="reference"), before)


def test_a_map_before_flattening_is_several_columns_a_channel() -> None:
    config = LocalPassConfig(groups=1, norm=Norm("none"), pool="max2")
    net = LocalNet([LocalConv2d(1, 3, 3, config=config), LocalLinear(
        27, 4, config=LocalPassConfig(groups=2, norm=Norm("none")))], num_classes=2,
        in_shape=(1, 6, 6), wires=[Wire(), Wire()], input_norm="none", layer_range=(1, 1))
    smaller, _ = remove_units(net, 0, [1])
    assert torch.equal(smaller.layer(1).weight,
                       net.layer(1).weight[:, [*range(9), *range(18, 27)]])
