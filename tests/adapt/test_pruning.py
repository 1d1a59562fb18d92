"""Pruning: what is kept, by the authors' selections transcribed; sizes; what follows; refusals."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import ffengine as ff
from ffengine.adapt import apply, invert
from ffengine.adapt.activity import goodness_parts
from ffengine.adapt.pruning import METHODS, order_of, parameter_bytes, prune_units

FFLIB = {"image_size": 8, "layers": (30, 24), "theta": 2.0}


def network(name="fflib/ffnn", **options):
    torch.manual_seed(2)
    return ff.models.create(name, **(options or FFLIB)).double()


def samples(net, n=20):
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(n, *net.in_shape, generator=generator, dtype=torch.float64)
    return [(x[:12], torch.arange(12) % 10), (x[12:], torch.arange(n - 12) % 10)]


def activity(net):
    """Sum of the activations with the true label, as the authors gather it, of an FFNN."""
    (x0, y0), (x1, y1) = samples(net)
    h = net.prepare(torch.cat([x0, x1]), torch.cat([y0, y1]))
    out = []
    for layer in net.layers:
        u = h if not out else h / (h.norm(2, 1, keepdim=True) + 1e-4)
        h = torch.relu(u @ layer.weight.T + layer.bias)
        out.append(h.sum(0))
    return out


def authors(scores, mode, keep):
    """The authors' selection among `scores`, ascending."""
    rising = scores.argsort(stable=True)
    picked = {"first": rising[:keep], "last": rising[-keep:], "activity": rising[-keep:],
              "ends": torch.cat([rising[:keep // 2], rising[-keep // 2:]])}[mode]
    return sorted(picked.tolist())


@pytest.mark.parametrize("mode", ["first", "last", "activity", "ends"])
@pytest.mark.parametrize("ratio", [2, 3.1])
def test_selections_by_activity_are_the_authors(mode, ratio):
    net = network()
    made = prune_units(net, mode, ratio, samples=samples(net))
    for i, scores in enumerate(activity(net)):
        assert made.kept[i] == authors(scores, mode, len(made.kept[i]))


def test_sum_and_threshold_are_the_authors():
    net = network()
    weight = net.layer(0).weight
    kept = prune_units(net, "sum", 2).kept[0]
    assert kept == sorted(weight.sum(1).argsort(descending=True)[:len(kept)].tolist())
    kept = prune_units(net, "threshold", 2).kept[0]
    size = weight.abs()
    k = int(len(kept) / 30 * size.numel())
    counts = (size >= size.flatten().kthvalue(size.numel() - k + 1).values).sum(1)
    gone = sorted({*range(30)} - {*kept})
    assert counts[kept].min() >= counts[gone].max()
    recurrent = network("fflib/ffrnn", **FFLIB)
    kept = prune_units(recurrent, "sum", 2).kept[1]
    forward = recurrent.layer(1).weight[:, :30]
    assert kept == sorted(forward.sum(1).argsort(descending=True)[:len(kept)].tolist())


def test_random_is_one_permutation_a_layer_nested_in_the_ratio():
    net = network()
    by_ratio = [prune_units(net, "random", r, seed=3).kept for r in (1.5, 2, 4, 8)]
    generator = torch.Generator().manual_seed(3)
    for i, size in enumerate((30, 24)):
        order = torch.randperm(size, generator=generator).tolist()
        for more, less in pairwise(by_ratio):
            assert set(less[i]) < set(more[i])
        assert by_ratio[1][i] == sorted(order[:len(by_ratio[1][i])])
    assert prune_units(net, "random", 2, seed=4).kept != by_ratio[1]


def test_goodness_keeps_what_separates():
    net = network("sn/mlp", image_size=8, layers=(20, 20))
    (x0, y0), (x1, y1) = samples(net)
    x = net.transform(0, net.prepare(torch.cat([x0, x1])))
    h = torch.relu(net.layer(0).preactivation(x))
    y, group = torch.cat([y0, y1]), torch.arange(20) // 2
    mine = y[:, None] == group
    part = torch.stack([(h[:, u]**2)[mine[:, u]].mean() - (h[:, u]**2)[~mine[:, u]].mean()
                        for u in range(20)])
    order = order_of(net, "goodness", samples(net))
    assert order(0, 5) == part.argsort(descending=True, stable=True).tolist()
    down = network()  # L-: positive goodness is to be low
    up = network(**FFLIB, maximize=True)
    for low, high in zip(*(goodness_parts(n, samples(n)) for n in (down, up)), strict=True):
        assert torch.equal(low, -high) and bool(high.any())


@pytest.mark.parametrize("name, options", [
    ("fflib/ffnn", FFLIB), ("fflib/ffnn-c", FFLIB), ("fflib/ffrnn", FFLIB),
    ("bp/fflib/bpnn", {"image_size": 8, "layers": (30, 24)}),
    ("sn/cifar10", {"in_channels": 1, "image_size": 8, "widths": (20, 20, 20, 20)}),
    ("cwcomp/cfse", {"in_channels": 1, "image_size": 8, "channels": (160, 160, 160, 160)}),
    ("deeperforward/resnet17", {"in_channels": 1, "image_size": 8, "num_classes": 2,
                                "planes": (12, 24, 48, 96)})])
def test_smaller_networks_of_every_kind(name, options):
    net = network(name, **options)
    size, before = parameter_bytes(net), {k: v.clone() for k, v in net.state_dict().items()}
    for ratio in (1, 1.8):
        made = prune_units(net, "random", ratio)
        assert made.bytes_before == size and made.bytes_after == parameter_bytes(made.net)
        assert made.ratio >= ratio
        assert made.ratio < 1.5 * ratio  # and not much more: layers have few units here
        x = torch.rand(3, *net.in_shape, dtype=torch.float64)
        scores = made.net(x)
        assert scores.shape == (3, net.num_classes) and bool(scores.isfinite().all())
        if ratio == 1:
            assert torch.equal(scores, net(x)) and made.edit is None
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    units = [made.net.layer(i).units for i in range(len(net.layers))]
    assert [len(made.kept[i]) for i in range(len(units))] == units
    for i, kept in made.kept.items():
        own = net.layer(i).weight.flatten(1)[kept]
        small = made.net.layer(i).weight.flatten(1)
        assert small.shape[0] == len(kept) and small.shape[1] <= own.shape[1]
        if i == 0 and name != "fflib/ffrnn":
            assert torch.equal(small, own)


def test_both_weights_of_a_recurrent_layer_shrink():
    net = network("fflib/ffrnn", **FFLIB)
    made = prune_units(net, "random", 2)
    low, high = made.kept[0], made.kept[1]
    columns = [*range(64), *(64 + u for u in high)]
    assert torch.equal(made.net.layer(0).weight, net.layer(0).weight[low][:, columns])
    columns = [*low, *range(30, 40)]
    assert torch.equal(made.net.layer(1).weight, net.layer(1).weight[high][:, columns])
    assert torch.equal(made.net.hidden_0, net.hidden_0[:, low])


def test_a_head_on_all_layers_shrinks():
    net = network("fflib/ffnn-c", **FFLIB)
    made = prune_units(net, "random", 2)
    columns = [*made.kept[0], *(30 + u for u in made.kept[1])]
    assert torch.equal(made.net.heads[0].weight, net.heads[0].weight[:, columns])


def test_an_edit_that_undoes_it():
    net = network("fflib/ffnn-c", **FFLIB)
    made = prune_units(net, "random", 3)
    back = apply(made.net, invert(made.edit))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in back.state_dict().items())


def test_channel_groups_of_a_convolution_keep_as_many_units_each():
    net = network("cwcomp/cfse", in_channels=1, image_size=8, channels=(40, 80, 40, 40))
    made = prune_units(net, "activity", 2.5, samples=samples(net))
    for i in (0, 1):  # layer 1 convolves in ten groups, and reads layer 0
        size = net.layer(i).units // 10
        counts = torch.bincount(torch.tensor(made.kept[i]) // size, minlength=10)
        assert len(set(counts.tolist())) == 1 and 1 <= counts[0] < size


def test_some_layers_alone_and_groups_that_keep_a_unit():
    net = network()
    made = prune_units(net, "random", 1.3, layers=[1])
    assert len(made.kept[0]) == 30 and len(made.kept[1]) < 24
    sets = network("sn/mlp", image_size=8, layers=(30, 30))
    made = prune_units(sets, "first", 2.5, samples=samples(sets))
    for kept in made.kept.values():
        assert {u // 3 for u in kept} == set(range(10))
    assert made.net(torch.rand(2, *net.in_shape, dtype=torch.float64)).shape == (2, 10)


@pytest.mark.parametrize("ratio", [0.5, 0, -1, math.nan, math.inf, 1000])
def test_impossible_ratios(ratio):
    with pytest.raises(ValueError, match=r"^\[prune\] a compression ratio expected [^\n]*, got"):
        prune_units(network(), "random", ratio)


def test_refusals_are_one_line():
    net = network()
    for by, more, word in (("magic", {}, r"\[prune\] method must be"),
                           ("random", {"layers": [2]}, r"\[edits\] expected a layer of 0..1"),
                           ("random", {"layers": []}, r"\[prune\] expected one layer"),
                           ("activity", {}, r"\[prune\] activity expected samples"),
                           ("goodness", {"samples": []}, r"\[prune\] expected at least one")):
        with pytest.raises(ValueError, match=f"^{word}[^\n]*got[^\n]*$"):
            prune_units(net, by, 2, **more)
    assert set(METHODS) >= {"random", "activity", "threshold", "first", "last", "ends", "sum"}
