"""Maps, class sums and their colours: against the engine's own goodness, dense sums, by hand."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from ffengine import models
from ffengine.analysis.hsv import colours, grey, shaped
from ffengine.analysis.responses import gather
from ffengine.nn import LocalNet
from ffengine.nn.maps import layer_maps, shown
from ffengine.nn.recurrent import RecurrentNet
from ffengine.ops.config import LocalPassConfig

NETS = {
    "sn/mlp": {"layers": (20, 30), "image_size": 6},
    "sn/cifar10": {"widths": (10, 10, 20, 20), "image_size": 8},
    "deeperforward/resnet17": {"planes": (10, 20, 40, 80), "image_size": 16},
    "fflib/ffnn": {"layers": (24, 16), "image_size": 6},
    "trifecta/shallow": {"image_size": 16},
    "cwcomp/cfse": {"image_size": 16},
    "hinton/peer-norm": {"layers": (12, 12, 12), "image_size": 6},
}


def made(name: str, **options: object) -> LocalNet:
    torch.manual_seed(0)
    known = models.entry(name).options()
    given = {k: v for k, v in {**NETS.get(name, {}), **options}.items() if k in known}
    return models.create(name, **given).eval()


def samples(net: LocalNet, n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, *net.in_shape, generator=generator), torch.arange(n) % net.num_classes


def goodness(h: torch.Tensor, config: LocalPassConfig) -> torch.Tensor:
    """(N, K) of h, as the layer defines it."""
    offsets = config.offsets(h.shape[1])
    taken = h if config.goodness == "mean" else h * h
    parts = [taken[:, s:e].flatten(1) for s, e in pairwise(offsets)]
    return torch.stack([p.sum(1) if config.goodness == "sum_sq" else p.mean(1) for p in parts], 1)


@pytest.mark.parametrize("name", NETS)
def test_every_layers_h_gives_the_goodness_that_the_engine_computes(name: str) -> None:
    net = made(name)
    x, y = samples(net)
    with torch.no_grad():
        wanted = net.run(shown(net, x, y, "true"), backend="reference")
    found = [goodness(m.h, net.layer(i).config) for i, m in enumerate(
        layer_maps(net, x, y, label="true", backend="reference"))]
    assert len(found) == len(net.layers)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_z_is_what_the_next_layer_sees() -> None:
    net = made("fflib/ffnn")
    x, y = samples(net)
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        net.run(net.blank(x), features=seen, backend="reference")
    for maps, z in zip(layer_maps(net, x, y, backend="reference"), seen, strict=True):
        torch.testing.assert_close(maps.z, z)
        assert not torch.equal(maps.z, maps.h)


def test_labels_shown() -> None:
    """Zero: nothing where FFLib's label goes; true: the sample's own; neutral: none favoured."""
    net = made("fflib/ffnn")
    x, y = samples(net)
    rows = {label: shown(net, x, y, label)[:, -10:] for label in ("zero", "true")}
    assert not rows["zero"].any() and torch.equal(rows["true"].argmax(1), y)
    assert (rows["true"] > 0).sum() == len(y)
    with pytest.raises(ValueError, match=r"\[maps\] label expected|\[maps\] label must"):
        next(layer_maps(net, x, y, label="wrong"))  # type: ignore[arg-type]


def test_recurrent_states_are_those_of_the_last_frame() -> None:
    net = made("fflib/ffrnn", layers=(8, 8), image_size=4)
    assert isinstance(net, RecurrentNet)
    x, y = samples(net)
    rows = torch.nn.functional.one_hot(y, 10).float()
    with torch.no_grad():
        *_, (last, states) = net.play(x, rows, net.initial(), "reference")
        assert torch.equal(torch.stack(last), torch.stack(
            net.frame_goodness(x, rows, net.initial(), "reference")[-1]))
    found = list(layer_maps(net, x, y, label="true", backend="reference"))
    for maps, state in zip(found, states, strict=True):
        torch.testing.assert_close(maps.h, state)
    blank = list(layer_maps(net, x, y, backend="reference"))
    assert not torch.equal(blank[1].h, found[1].h)


def batches(x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield x[:7], y[:7]
    yield x[7:], y[7:]


@pytest.mark.parametrize("name", ["sn/cifar10", "fflib/ffnn"])
def test_sums_are_those_of_all_samples_at_once(name: str) -> None:
    net = made(name, num_classes=10)
    x, y = samples(net, 23)
    found = gather(net, batches(x, y), backend="reference")
    for sums, maps in zip(found, layer_maps(net, x, y, backend="reference"), strict=True):
        h = maps.h.double().flatten(2) if maps.h.dim() > 2 else maps.h.double()[..., None]
        for k in range(10):
            own = h[y == k]
            for mine, theirs in ((sums.plain[k], own), (sums.magnitude[k], own.abs()),
                                 (sums.square[k], own**2)):
                torch.testing.assert_close(mine, theirs.mean(2).sum(0), rtol=1e-5, atol=1e-5)
            taken = own if net.layer(0).config.goodness == "mean" else own**2
            torch.testing.assert_close(sums.mean_response()[k], taken.mean((0, 2)), rtol=1e-5,
                                       atol=1e-5)
        assert sums.counts.tolist() == torch.bincount(y, minlength=10).tolist()
        assert sums.inactive() == pytest.approx(float((h <= 0).double().mean()), abs=1e-6)
        assert sums.dead() == int(((h > 0).sum((0, 2)) == 0).sum())
        sets = sums.set_of()
        assert (sets is None) == (name == "fflib/ffnn")
        assert sets is None or sets.tolist() == [k for k in range(10)
                                                 for _ in range(sums.neurons // 10)]


def test_nothing_of_a_batch_is_kept() -> None:
    """When a batch is asked for, none but the last one, which the loop still names, is alive."""
    net, alive = made("sn/mlp"), list[int]()

    def stream() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        given = list[weakref.ref[torch.Tensor]]()
        for _ in range(5):
            alive.append(sum(ref() is not None for ref in given))
            x, y = samples(net)
            given.append(weakref.ref(x))
            yield x, y
            del x, y

    gather(net, stream(), backend="reference")
    assert alive == [0, 1, 1, 1, 1]


def test_no_samples() -> None:
    with pytest.raises(ValueError, match=r"^\[responses\] expected one sample or more, got none$"):
        gather(made("sn/mlp"), [])


def test_colours_by_hand() -> None:
    """FFLib's published picture: hue of the highest class, its share, its place in the layer."""
    sums = torch.tensor([[4.0, 0.0, 1.0, 0.0], [0.0, 0.0, 3.0, 0.0], [0.0, 2.0, 0.0, 0.0],
                         [4.0, 6.0, 0.0, 0.0]], dtype=torch.float64)
    found = colours(sums)
    assert found.preferred.tolist() == [0, 3, 1, -1]
    assert found.hue.tolist() == [0.0, 0.75, 0.25, 0.0]
    torch.testing.assert_close(found.saturation, torch.tensor(
        [4 / 8.00001, 6 / 8.00001, 3 / 4.00001, 0.0], dtype=torch.float64))
    torch.testing.assert_close(found.value, torch.tensor(
        [4 / 6, 1.0, 0.5, 0.0], dtype=torch.float64))
    assert found.sorted().tolist() == [0, 2, 1, 3]
    assert colours(torch.full((3, 2), 5.0)).value.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"^\[hsv\] expected sums \(classes, neurons\)"):
        colours(torch.zeros(3))


def test_grey_and_rows() -> None:
    assert grey(torch.tensor([-1.0, 0.0, 3.0])).tolist() == [0.0, 0.25, 1.0]
    assert grey(torch.ones(4)).tolist() == [0.0] * 4
    rows = shaped(torch.arange(7.0))
    assert rows.shape == (3, 3) and rows[2, 0] == 6 and rows[2, 1:].isnan().all()
    assert shaped(torch.zeros(2000, 3)).shape == (50, 40, 3)  # FFLib's pictures
    assert shaped(torch.zeros(1)).shape == (1, 1)
