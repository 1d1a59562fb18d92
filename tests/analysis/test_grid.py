"""Grids: what is there is not trained again; processes; probes and t-SNE of small networks."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ffengine import data, models
from ffengine.analysis import tsne
from ffengine.analysis.grid import Grid, run
from ffengine.analysis.probes import ProbeOptions, Probes, flat
from ffengine.nn.maps import layer_maps


def product(base: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, Any]:
    base["asked"].append(cell)
    return {"value": cell["a"] * cell["b"], "diverged": False}


def test_only_missing_cells_are_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    def train(base: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, Any]:
        return product({"asked": asked}, cell)

    grid = Grid({"a": [1, 2], "b": [10, 20]}, {"epochs": 1})
    assert [c["value"] for c in run(grid, tmp_path, train)] == [10, 20, 20, 40]
    assert len(asked) == len(list(tmp_path.glob("*.json"))) == 4
    assert capsys.readouterr().err.splitlines() == [f"cell {i}/4" for i in range(1, 5)]
    half = grid.path(tmp_path, {"a": 2, "b": 10})
    half.write_text(half.read_text()[:5])  # not a whole file
    wider = Grid({"a": [1, 2, 3], "b": [10, 20]}, {"epochs": 1})
    assert [c["value"] for c in run(wider, tmp_path, train, progress=False)] == [
        10, 20, 20, 40, 30, 60]
    assert asked[4:] == [{"a": 2, "b": 10}, {"a": 3, "b": 10}, {"a": 3, "b": 20}]
    run(Grid(grid.axes, {"epochs": 2}), tmp_path, train, progress=False)
    assert len(asked) == 11  # other epochs are other cells


def test_a_grid_that_stopped_goes_on(tmp_path: Path) -> None:
    asked: list[Any] = []

    def train(base: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, Any]:
        if len(asked) == 1:
            raise KeyboardInterrupt
        return product({"asked": asked}, cell)

    grid = Grid({"a": [1, 2], "b": [5]}, {})
    with pytest.raises(KeyboardInterrupt):
        run(grid, tmp_path, train, progress=False)
    asked.append(None)
    assert [c["value"] for c in run(grid, tmp_path, train, progress=False)] == [5, 10]


def test_cells_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cell_of_a_test.py").write_text(
        "import os\ndef train(base, cell):\n"
        "    return {'value': cell['a'] + base['more'], 'process': os.getpid()}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    train = importlib.import_module("cell_of_a_test").train
    found = run(Grid({"a": [1, 2, 3]}, {"more": 10}), tmp_path / "cells", train, jobs=2,
                progress=False)
    assert [c["value"] for c in found] == [11, 12, 13]
    assert os.getpid() not in {c["process"] for c in found}
    assert [json.loads(p.read_text())["value"] for p in sorted(
        (tmp_path / "cells").iterdir())] == [11, 12, 13]


def test_a_cell_that_fails_ends_the_others(tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_cell.py").write_text(
        "import time\ndef train(base, cell):\n"
        "    if cell['a'] == 1:\n        raise ValueError('[cell] no')\n"
        "    time.sleep(600)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"^\[cell\] no$"):
        run(Grid({"a": [1, 2, 3]}, {}), tmp_path / "cells",
            importlib.import_module("failing_cell").train, jobs=2, progress=False)
    assert time.monotonic() - began < 120


@pytest.mark.parametrize("axes, said", [
    ({}, "expected one or two settings, got 0"),
    ({"a": [1], "b": [1], "c": [1]}, "expected one or two settings, got 3"),
    ({"a": []}, r"a expected values that differ, got \[\]"),
    ({"a": [1, 1]}, r"a expected values that differ, got \[1, 1\]")])
def test_grids_that_cannot_be(axes: dict[str, list[int]], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^\[grid\] {said}"):
        Grid(axes, {})
    with pytest.raises(ValueError, match=r"^\[grid\] expected 1 job or more, got 0"):
        run(Grid({"a": [1]}, {}), tmp_path, product, jobs=0)


def digits() -> tuple[Any, data.Splits]:
    torch.manual_seed(0)
    net = models.create("sn/mlp", layers=(20, 10), image_size=8)
    return net, data.load("digits")


def test_heads_learn_and_the_network_stays(tmp_path: Path) -> None:
    net, splits = digits()
    with torch.no_grad():
        net.layer(1).weight.zero_()  # tells nothing, but by its bias, which is the same for all
    before = {k: v.clone() for k, v in net.state_dict().items() if isinstance(v, torch.Tensor)}
    heads = Probes(net, ProbeOptions((16,), epochs=4, lr=0.01), "reference")
    state = torch.get_rng_state()
    heads.fit(lambda e: data.loader(splits.train, batch_size=64, shuffle=True, epoch=e))
    assert torch.equal(state, torch.get_rng_state())
    first, second = heads.accuracy(data.loader(splits.test, batch_size=500))
    assert first > 0.8 and second < 0.2
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items() if k in before)
    assert [h[1].in_features for h in heads.heads] == [20, 10]


def test_large_maps_are_averaged_before_a_head() -> None:
    x = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    assert flat(x).shape == (2, 48) and float(flat(x)[0, 0]) == float(x[0, 0, :2, :2].mean())
    assert flat(x[..., :2, :2]).shape == (2, 12)


@pytest.mark.parametrize("options", [{"hidden": (0,)}, {"epochs": 0}, {"lr": 0.0},
                                     {"features": "a"}])
def test_probe_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^\[probes\] "):
        ProbeOptions(**options)


def test_features_of_a_layer_for_tsne() -> None:
    net, splits = digits()
    h, z, y = tsne.features(net, data.loader(splits.test, batch_size=16), 1, 20,
                            backend="reference")
    x, labels = splits.test.batch(slice(0, 20))
    maps = list(layer_maps(net, x, labels, label="neutral", backend="reference"))[1]
    torch.testing.assert_close(h, maps.h)
    assert torch.equal(h, z) and torch.equal(y, labels)
    for layer, count, said in ((2, 20, "a layer from 0 to 1, got 2"),
                               (-1, 20, "a layer from 0 to 1, got -1"),
                               (0, 2001, "expected 2 to 2000 samples, got 2001"),
                               (0, 1, "expected 2 to 2000 samples, got 1")):
        with pytest.raises(ValueError, match=said):
            tsne.features(net, [], layer, count)


def test_an_embedding_keeps_clusters_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(24, 60, generator=generator)
    rows[12:] += 8
    at = tsne.embed(rows)
    assert at.shape == (24, 2) and torch.equal(at, tsne.embed(rows))
    a, b = at[:12], at[12:]
    spread = max(float((part - part.mean(0)).norm(dim=1).max()) for part in (a, b))
    assert float((a.mean(0) - b.mean(0)).norm()) > 2 * spread
