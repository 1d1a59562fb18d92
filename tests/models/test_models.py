"""Every registered network: builds, moves, saves, compiles, exports; the paper's sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ffengine import models
from ffengine.models import recipe_files, registry
from ffengine.nn import LocalNet

SMALL = {
    "deeperforward/tinycnn": {"widths": (5, 10, 20, 20), "image_size": 8},
    "deeperforward/cnn14": {"widths": (5, 10, 10, 20, 20), "image_size": 16},
    "deeperforward/resnet17": {"planes": (5, 10, 20, 40), "image_size": 8},
    "deeperforward/resnet33": {"planes": (5, 10, 20, 40), "image_size": 8},
    "deeperforward/resnet100": {"planes": (5, 5, 10, 10), "image_size": 8},
}
DEPTH = {"tinycnn": 4, "cnn14": 14, "resnet17": 17, "resnet33": 33, "resnet100": 100}
#: Convolution weights of the full-size networks, from the paper's layer lists; the paper gives
#: ResNet-17 as 30.6 M.
PARAMETERS = {"tinycnn": 2_667_500, "cnn14": 17_774_190, "resnet17": 30_602_700}


def small(name: str, **options: object) -> LocalNet:
    torch.manual_seed(0)
    return models.create(name, num_classes=5, **(SMALL[name] | options))


def images(net: LocalNet, n: int = 3) -> torch.Tensor:
    return torch.randn(n, *net.in_shape, generator=torch.Generator().manual_seed(1))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for the order in which a compiler or another layout sums."""
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", SMALL)
def test_scores_and_shapes(name: str) -> None:
    net = small(name)
    assert len(net.layers) == DEPTH[name.split("/")[1]]
    assert net(images(net)).shape == (3, 5)
    assert not net(images(net)).requires_grad
    assert net.layer_range == (1, len(net.layers) - 1)
    goodness = net.goodness(images(net))
    assert [tuple(g.shape) for g in goodness] == [(3, 5)] * len(net.layers)


@pytest.mark.parametrize("name", SMALL)
def test_state_dict_round_trip(name: str) -> None:
    one, two = small(name), small(name)
    with torch.no_grad():
        for p in two.parameters():
            p.zero_()
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(images(one)), two(images(two)))
    assert sum(p.numel() for p in one.parameters()) == sum(
        t.numel() for k, t in one.state_dict().items() if k.endswith(("weight", "bias")))


@pytest.mark.parametrize("name", SMALL)
def test_moves_between_dtypes(name: str) -> None:
    net = small(name)
    before = net(images(net))
    assert net.double()(images(net).double()).dtype is torch.float64
    assert torch.equal(net.float()(images(net)), before)


def graphed(name: str) -> LocalNet:
    """Fewer blocks (tracing costs a quarter of a second a layer) and fp64, where the rounding that
    small groups amplify stays far below the comparison."""
    options = {"counts": (1, 1, 2, 1)} if name.endswith(("resnet33", "resnet100")) else {}
    return small(name, **options).double().eval()


@pytest.mark.parametrize("name", SMALL)
def test_compiles(name: str) -> None:
    torch._dynamo.reset()
    net = graphed(name)
    x = images(net).double()
    close(torch.compile(net, backend="aot_eager")(x), net(x))


@pytest.mark.parametrize("name", SMALL)
def test_exports(name: str) -> None:
    net = graphed(name)
    x = images(net).double()
    close(torch.export.export(net, (x,)).module()(x), net(x))


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameters_of_the_full_networks(name: str) -> None:
    with torch.device("meta"):
        net = models.create(f"deeperforward/{name}")
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]


def test_he_initialisation() -> None:
    torch.manual_seed(0)
    net = models.create("deeperforward/tinycnn")
    for layer in list(net.layers)[1:]:
        fan_out = layer.weight.shape[0] * layer.weight[0, 0].numel()
        expected = (2 / fan_out) ** 0.5
        assert abs(layer.weight.std().item() / expected - 1) < 0.02
        assert abs(layer.weight.mean().item()) < 0.02 * expected


def test_wider_planes() -> None:
    with torch.device("meta"):
        net = models.create("deeperforward/resnet17", scale=3)
    assert net.layers[0].weight.shape[0] == 300
    assert net.layers[-1].weight.shape[0] == 2400


@pytest.mark.parametrize("name", [n for n in SMALL if "resnet" in n])
def test_without_shortcuts(name: str) -> None:
    net = small(name, shortcuts=False)
    assert all(w.join == "none" and not w.branch for w in net.wires)
    assert net(images(net)).shape == (3, 5)


def test_concatenation_stands_at_the_end_of_a_stage_in_resnet17() -> None:
    net = small("deeperforward/resnet17")
    assert [i for i, w in enumerate(net.wires) if w.join == "concat"] == [4, 8, 12]
    assert [net.shapes[i + 1][0] for i in (4, 8, 12)] == [10, 20, 40]


def test_concatenation_stands_inside_a_stage_in_resnet33() -> None:
    net = small("deeperforward/resnet33")
    joins = [i for i, w in enumerate(net.wires) if w.join == "concat"]
    assert joins == [8, 16, 28]
    assert [net.layers[i].weight.shape[0] for i in joins] == [5, 10, 20]


def test_cwcomp_in_the_layers_of_cnn14() -> None:
    """Pools where the network named has them, spans for all 14 layers and the head."""
    recipe = recipe_files.load("cwcomp-cfse14-cifar10")
    with torch.device("meta"):
        net = models.create(recipe.model, **recipe.options)
        theirs = models.create("deeperforward/cnn14")
    assert [s[1:] for s in net.shapes[1:]] == [
        (16, 16) if i == 1 else (8, 8) if i == 4 else (4, 4) if i == 7 else (2, 2) if i == 10
        else s[1:] for i, s in enumerate(theirs.shapes[1:])]
    assert [layer.weight.shape[0] for layer in net.layers] == [
        layer.weight.shape[0] for layer in theirs.layers]
    assert [layer.geometry.groups for layer in net.layers] == [1, 10] * 7
    net.schedule.begin(net, 50)
    assert net.schedule.spans[3:] == ((0, 25),) * 11 + ((0, 50),)


def test_unknown_models_and_options() -> None:
    with pytest.raises(ValueError, match=r"^\[models\] unknown model 'nope'; known: .*tinycnn"):
        models.create("nope")
    with pytest.raises(TypeError, match=r"^\[models\] .*'depth'"):
        models.create("deeperforward/tinycnn", depth=3)


def test_widths_that_classes_do_not_divide_are_rounded_up(
        caplog: pytest.LogCaptureFixture) -> None:
    """And a line says so, once; first weights are those of a network that was asked for them."""
    registry.say.cache_clear()
    torch.manual_seed(0)
    net = models.create("deeperforward/tinycnn", num_classes=7)
    assert [net.layer(i).units for i in range(4)] == [105, 210, 420, 420]
    assert net.origin == ("deeperforward/tinycnn",
                          {"num_classes": 7, "widths": (105, 210, 420, 420)})
    torch.manual_seed(0)
    asked = models.create("deeperforward/tinycnn", num_classes=7, widths=(105, 210, 420, 420))
    assert torch.equal(net.layer(3).weight, asked.layer(3).weight)
    assert caplog.messages == [
        "[models] deeperforward/tinycnn: widths=(105, 210, 420, 420) in place of "
        "(100, 200, 400, 400), which do not fall into 7 classes"]


@pytest.mark.parametrize("name, options, said", [
    ("deeperforward/tinycnn", {"widths": (11, 20, 20, 20)},
     "multiple of the 10 groups, got 11 channels; widths=(20,20,20,20) would do"),
    ("sn/mlp", {"num_classes": 7, "layers": (100, 100)},
     "got 100 channels; layers=(105,105) would do"),
    ("deeperforward/resnet17", {"num_classes": 7, "planes": (10, 20, 40)},
     "got 10 channels; planes=(14,28,56) would do"),
    ("deeperforward/tinycnn", {"widths": (11, 20)}, "[deeperforward] expected 4 widths, got 2"),
    ("deeperforward/resnet33", {"planes": (10, 20)}, "[residual] expected 2 counts of blocks, got"),
    ("sn/mlp", {"layers": 100}, "[models] sn/mlp: layers expected a tuple of whole numbers, got"),
    ("sn/mlp", {"num_classes": 0}, "[models] sn/mlp: num_classes expected 1 or more, got 0"),
    ("bp/sn/mlp", {"phi": "x"}, "[models] bp/sn/mlp: phi expected a number or a tuple of numbers")])
def test_widths_of_ones_own_stay_or_are_refused(name: str, options: dict[str, Any],
                                                said: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        models.create(name, **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("classes", [7, 37])
def test_every_model_takes_any_number_of_classes(classes: int) -> None:
    for name in models.names():
        supers = {"superclasses": tuple(c % 2 for c in range(classes))} if (
            models.entry(name).options().get("superclasses")) else {}
        with torch.device("meta"):
            assert models.create(name, num_classes=classes, **supers).num_classes == classes
