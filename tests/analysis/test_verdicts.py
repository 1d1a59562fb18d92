"""Verdicts of layers against the engine's own evaluation and SIP; weights; t-tests by textbook."""

from __future__ import annotations

import math

import pytest
import torch

from ffengine import models
from ffengine.adapt import sip
from ffengine.analysis.ttest import compare
from ffengine.analysis.verdicts import judge, tells_classes
from ffengine.analysis.weights import clamped, weight_statistics
from ffengine.engine.run.evaluation import accuracy, layer_accuracy
from ffengine.nn import LocalNet

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def made(name: str, **options: object) -> LocalNet:
    torch.manual_seed(0)
    return models.create(name, image_size=6, in_channels=1, **options).eval()


def batches(net: LocalNet) -> Batches:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(41, *net.in_shape, generator=generator)
    y = torch.randint(net.num_classes, (41,), generator=generator)
    return [(x[:17], y[:17]), (x[17:], y[17:])]


@pytest.mark.parametrize("name, options", [
    ("sn/mlp", {"layers": (20, 30, 20), "readout": "olr"}),
    ("fflib/ffnn", {"layers": (16, 12)}),
    ("fflib/ffnn", {"layers": (16, 12), "maximize": True}),
    ("fflib/ffnn-c", {"layers": (16, 12)}),
], ids=["sn", "ffnn-minus", "ffnn-plus", "ffnn-c"])
def test_verdicts_are_the_engines(name: str, options: dict[str, object]) -> None:
    net = made(name, **options)
    data = batches(net)
    found = judge(net, data, backend="reference")
    assert found.samples == 41
    assert found.accuracy == accuracy(net, data, "reference")
    assert [layer.accuracy for layer in found.layers] == layer_accuracy(net, data, "reference")
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    predicted = net.scores(x, backend="reference").argmax(1)
    for k, share in enumerate(found.class_accuracy()):
        own = predicted[y == k] == k
        assert math.isnan(share) if not len(own) else share == pytest.approx(
            float(own.double().mean()))
    with torch.no_grad():
        goodness = net.goodness(x, backend="reference")
    for layer, g in zip(found.layers, goodness, strict=True):
        own = torch.nn.functional.one_hot(y, 10).bool()
        assert layer.positive == pytest.approx(float(g[own].double().mean()), rel=1e-5)
        assert layer.negative == pytest.approx(float(g[~own].double().mean()), rel=1e-5)
        assert layer.separation == layer.positive - layer.negative
        assert layer.largest == float(g.max())
    assert (found.ranges is None) == (name == "fflib/ffnn-c")


def test_ranges_are_sips_and_those_of_the_readout() -> None:
    net = made("sn/mlp", layers=(20, 30, 20))
    data = batches(net)
    found, wanted = judge(net, data, backend="reference"), sip.select(
        net, data, backend="reference", apply=False)
    assert found.ranges is not None
    torch.testing.assert_close(found.ranges, wanted.table)
    assert found.best_range() == (wanted.start, wanted.end)
    lowered = made("fflib/ffnn", layers=(16, 12))  # goodness of the right label is the lowest
    told = judge(lowered, batches(lowered), backend="reference")
    assert told.ranges is not None and float(told.ranges[0, 1]) == told.accuracy


def test_layers_on_superclasses_and_twins() -> None:
    net = made("sn/mlp", layers=(20, 20))
    net.layer(0).relabel((0, 0, 1, 1, 2, 2, 3, 3, 4, 4))
    found = judge(net, batches(net), backend="reference")
    assert [layer.on_superclasses for layer in found.layers] == [True, False]
    with pytest.raises(ValueError, match=r"^\[analyze\] sip expected a network whose layers'"):
        found.best_range()
    assert not tells_classes(models.create("cafo/cnn"))
    assert not tells_classes(made("bp/fflib/ffnn", layers=(8, 8)))  # labels could be tried
    assert tells_classes(made("fflib/ffrnn", layers=(8, 8)))
    twin = made("bp/fflib/bpnn", layers=(8, 8))
    assert not tells_classes(twin)
    told = judge(twin, batches(twin), backend="reference")
    assert told.layers == [] and told.accuracy == accuracy(twin, batches(twin), "reference")
    with pytest.raises(ValueError, match=r"^\[analyze\] expected one sample or more, got none$"):
        judge(net, [])


def test_statistics_of_every_weight() -> None:
    net = made("fflib/ffnn-c", layers=(16, 12))
    found = weight_statistics(net)
    assert [s.name for s in found] == ["layer 0", "layer 1", "head 0"]
    w = net.layer(1).weight.detach().double()
    assert (found[1].least, found[1].most) == (float(w.min()), float(w.max()))
    assert found[1].largest == float(w.abs().max())
    assert found[1].deviation == pytest.approx(float(w.std()), rel=1e-12)
    n = w.numel()
    hoyer = (math.sqrt(n) - float(w.abs().sum() / w.norm())) / (math.sqrt(n) - 1)
    assert found[1].sparsity["hoyer"] == pytest.approx(hoyer, abs=1e-12)


def test_clamped() -> None:
    weight = torch.tensor([[-2.0, 0.1], [0.25, 9.0]])[..., None]
    assert clamped(weight, 0.25).tolist() == [[-0.25, pytest.approx(0.1)], [0.25, 0.25]]
    assert weight[1, 1, 0] == 9
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^\[analyze\] a clamp expected a number above 0"):
            clamped(weight, bad)


#: Student's sleep data (1908): hours of extra sleep under two drugs, ten patients.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_student_1908() -> None:
    """t, degrees of freedom and p as every textbook and R's t.test print them."""
    paired = compare(FIRST, SECOND, "paired")
    assert (paired.t, paired.freedom, paired.p) == (
        pytest.approx(-4.0621, abs=5e-5), 9, pytest.approx(0.002833, abs=5e-7))
    assert paired.difference == pytest.approx(-1.58)
    assert paired.d == pytest.approx(-1.58 / 1.2299955, rel=1e-6)
    welch = compare(FIRST, SECOND)
    assert (welch.t, welch.freedom, welch.p) == (
        pytest.approx(-1.8608, abs=5e-5), pytest.approx(17.776, abs=5e-4),
        pytest.approx(0.07939, abs=5e-6))
    student = compare(FIRST, SECOND, "student")
    assert (student.t, student.freedom, student.p) == (
        pytest.approx(-1.8608, abs=5e-5), 18, pytest.approx(0.07919, abs=5e-6))
    assert student.d == welch.d == pytest.approx(-0.8321811, abs=5e-7)
    back = compare(SECOND, FIRST)
    assert (back.t, back.p, back.d) == (-welch.t, welch.p, -welch.d)


def test_groups_of_unequal_size() -> None:
    found = compare([1.0, 2.0, 3.0, 4.0], [2.0, 6.0])
    # by hand: means 2.5 and 4, variances 5/3 and 8
    assert found.t == pytest.approx(-1.5 / math.sqrt(5 / 12 + 4))
    assert found.freedom == pytest.approx((5 / 12 + 4)**2 / ((5 / 12)**2 / 3 + 16))
    assert found.d == pytest.approx(-1.5 / math.sqrt((5 + 8) / 4))


def test_nothing_deviates() -> None:
    same, apart = compare([0.5, 0.5], [0.5, 0.5]), compare([0.5, 0.5], [0.4, 0.4])
    assert math.isnan(same.t) and math.isnan(same.p) and math.isnan(same.d)
    assert (apart.t, apart.p, apart.d) == (math.inf, 0.0, math.inf)


def test_too_few_runs() -> None:
    with pytest.raises(ValueError, match=r"^\[ttest\] expected two runs or more in each group, "
                       "got 1 and 3$"):
        compare([1.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"^\[ttest\] pairs expected as many runs in each group"):
        compare([1.0, 2.0], [1.0, 2.0, 3.0], "paired")
    with pytest.raises(ValueError, match="kind expected one of welch, student, paired"):
        compare([1.0, 2.0], [1.0, 2.0], "anova")  # type: ignore[arg-type]
