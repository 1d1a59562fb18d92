"""Trying all labels at once equals one forward pass a label, within bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import assert_alike, assert_close

from ffengine.engine.memory.meter import MemoryMeter
from ffengine.nn import (
    Concat,
    LabelChannel,
    LocalConv2d,
    LocalLinear,
    LocalNet,
    Overlay,
    PreNorm,
    Wire,
    try_labels,
)
from ffengine.ops.config import BatchNorm, LocalPassConfig, Norm

K, IMAGE = 5, (2, 6, 6)
LAST = Norm("length", eps=1e-4, length="l2")
INPUT = {"none": "none", "length-l2": LAST, "in-layer": "layer",
         "length-rms": Norm("length", eps=1e-8, length="rms"), "in-norm": Norm("layer")}
PRE = ("batch", "batch-running", "layer", "layer-no-mean")


def network(encoding: str, norm: str, linear: bool, bias: bool = True,
            wire: Wire | None = None) -> LocalNet:
    torch.manual_seed(0)
    shown = {"overlay": lambda: Overlay(K, IMAGE), "concat": lambda: Concat(K, IMAGE),
             "overlay-max": lambda: Overlay(K, IMAGE, value="max"),
             "channel": lambda: LabelChannel(K, IMAGE)}[encoding]()
    shape = shown.shape if not linear else (torch.Size(shown.shape).numel(),)
    config = LocalPassConfig(groups=1, goodness="mean_sq", norm=LAST,
                             pool="none" if linear else "max2")
    options: dict[str, Any] = {"config": config, "bias": bias, "init": "torch"}
    if norm in PRE:
        options["pre_norm"] = PreNorm(norm, shape)
    if linear:
        layers: list[Any] = [LocalLinear(shape[0], 12, **options)]
    else:
        layers = [LocalConv2d(shape[0], 6, 3, **options)]
    size = layers[0].z_shape(shape if wire is None else (shape[0], 3, 3))
    flat = LocalPassConfig(groups=1, goodness="mean_sq", norm=LAST)
    layers.append(LocalLinear(torch.Size(size).numel(), 8, config=flat))
    net = LocalNet(layers, None if wire is None else [wire, Wire()], num_classes=K, in_shape=IMAGE,
                   encoding=shown, input_norm=INPUT.get(norm, "none"), layer_range=(0, 1))
    for name, t in [*net.named_parameters(), *net.named_buffers()]:
        if "norm" in name and t is not None:  # statistics and maps that are no identity
            t.data.add_(torch.rand_like(t) * 0.5)
    return net.double()


def images(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *IMAGE, generator=generator, dtype=torch.float64).to(dtype) + 0.5


def label_by_label(net: LocalNet, x: torch.Tensor) -> list[torch.Tensor]:
    columns = []
    for k in range(K):
        labels = torch.full((x.shape[0],), k)
        columns.append(net.run(net.normalise_input(net.encoding(x, labels))))
    return [torch.cat(parts, 1) for parts in zip(*columns, strict=True)]


CASES = [*((e, n, True) for e in ("overlay", "overlay-max", "concat", "channel")
           for n in INPUT),
         *(("channel", n, False) for n in ("none", "length-l2", "in-layer")),
         *(("channel", n, linear) for n in PRE for linear in (True, False)),
         *((e, n, True) for e in ("overlay", "concat") for n in PRE)]


@pytest.mark.parametrize(("encoding", "norm", "linear"), CASES)
def test_equals_one_pass_a_label(encoding: str, norm: str, linear: bool) -> None:
    for bias in (True, False):
        net, x = network(encoding, norm, linear, bias), images(4)
        exact = label_by_label(net, x)
        for mine, slow in zip(net.goodness(x), exact, strict=True):
            assert_alike(mine, slow, reduction=net.layer(0).weight[0].numel())
        narrow = net.float()
        for mine, slow, one in zip(narrow.goodness(x.float()), exact,
                                   label_by_label(narrow, x.float()), strict=True):
            assert_close(mine, slow, one, reduction=net.layer(0).weight[0].numel())


def test_a_pool_before_the_first_layer() -> None:
    for norm in ("length-l2", "in-layer"):
        net, x = network("channel", norm, False, wire=Wire(pool_before=True)), images(3)
        for mine, slow in zip(net.goodness(x), label_by_label(net, x), strict=True):
            assert_alike(mine, slow, reduction=30)


@pytest.mark.parametrize("encoding", ["overlay-max", "channel"])
def test_chunks_are_the_whole(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest pixel is the batch's, not a chunk's."""
    net, x = network(encoding, "in-layer", True), images(11)
    whole = net.goodness(x)
    monkeypatch.setattr(try_labels, "CHUNK_BYTES", 1)
    for mine, theirs in zip(net.goodness(x), whole, strict=True):
        assert mine.shape == (11, K)
        assert_alike(mine, theirs, reduction=72)
    assert [tuple(g.shape) for g in net.goodness(x[:0])] == [(0, K)] * 2


@pytest.mark.parametrize("linear", [True, False])
def test_memory_does_not_grow_with_the_samples(linear: bool,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(try_labels, "CHUNK_BYTES", 32 << 10)
    net, used = network("channel", "batch", linear).float(), []
    for n in (40, 160):
        x = images(n, torch.float32)
        with MemoryMeter(parameter=net.parameters(), feature=[x]) as meter:
            goodness = net.goodness(x)
        results = sum(g.numel() * g.element_size() for g in goodness)
        at_peak = meter.report.at_peak
        used.append(at_peak["feature"] + at_peak["scratch"] - x.numel() * 4 - 2 * results)
    assert used[1] <= used[0] * 1.02
    assert used[0] <= 6 * (32 << 10)


def test_a_batch_norm_after_the_weight() -> None:
    """The pass from the first pre-activation on is the network's own."""
    torch.manual_seed(0)
    config = LocalPassConfig(groups=1, goodness="mean_sq", norm=Norm("none"))
    layers = [LocalLinear(72 + K, 12, config=config, batch_coupling=BatchNorm()),
              LocalLinear(12, 8, config=config)]
    net = LocalNet(layers, num_classes=K, in_shape=IMAGE, encoding=Concat(K, IMAGE),
                   input_norm="none").double()
    net.layer(0).running_mean.add_(0.3)
    x = images(4)
    for mine, slow in zip(net.goodness(x), label_by_label(net, x), strict=True):
        assert_alike(mine, slow, reduction=72)
