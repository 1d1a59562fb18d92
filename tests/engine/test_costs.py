"""Measured costs: the real turn is timed, curves are sane, the file is reused or ignored."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from ffengine import models
from ffengine.engine.memory import costs, curves
from ffengine.engine.run.recipe import Recipe
from ffengine.engine.run.settings import Settings
from ffengine.engine.schedules.schedule import of
from ffengine.ops import backends

SMALL = {"in_channels": 1, "image_size": 8, "widths": (10, 20, 20, 20)}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, and none in memory."""
    monkeypatch.setenv("FFENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(curves, "_curves", {})
    return tmp_path / "costs.json"


def job(model: str = "deeperforward/tinycnn", **options: Any) -> Any:
    with torch.device("meta"):
        net = models.create(model, **(SMALL if model.endswith("tinycnn") else {}), **options)
    settings = Settings.resolve(net.recipe or Recipe(), epochs=2, batch_size=16)
    schedule = of(net, None)
    schedule.begin(net, settings.epochs)
    return SimpleNamespace(net=net, schedule=schedule, settings=settings, device="cpu",
                           backend="cpu")


class Timed:
    """A timer that costs nothing: a turn takes 1 ms and 1 ms a sample, 2 ms to step."""

    calls = 0
    BESIDE: ClassVar[dict[str, float]] = {"step": 2.0, "once": -0.5}

    def __init__(self, *where: Any) -> None:
        pass

    def time(self, kind: str, n: int) -> float:
        type(self).calls += 1
        return 1e-3 * self.BESIDE.get(kind, 1.0 + n)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> type[Timed]:
    monkeypatch.setattr(costs, "LayerTimer", Timed)
    monkeypatch.setattr(Timed, "calls", 0)
    return Timed


def seconds_of(job: Any, rows: int, epoch: int = 0) -> costs.Seconds:
    found = costs.Costs(job, rows).at(epoch)
    assert found is not None
    return found


def test_real_turns_are_timed_and_nothing_else_moves() -> None:
    made = job()
    before, devices = torch.get_rng_state(), [p.device for p in made.net.parameters()]
    seconds = seconds_of(made, 8)
    for i in range(4):
        whole, tiled = seconds(i, 8), seconds(i, 1)
        assert 0 < whole < 10 and 0 < tiled < 10
    assert torch.equal(torch.get_rng_state(), before)
    assert [p.device for p in made.net.parameters()] == devices


def test_the_trained_weights_are_left_alone() -> None:
    made = job()
    torch.manual_seed(0)
    made.net = models.create("deeperforward/tinycnn", **SMALL)
    before = {k: v.clone() for k, v in made.net.state_dict().items()}
    seconds_of(made, 4)(1, 2)
    assert all(torch.equal(v, before[k]) for k, v in made.net.state_dict().items())


@pytest.mark.parametrize("model", [
    "fflib/ffnn", "sn/mlp", "cwcomp/cfse", "cafo/cnn", "hinton/peer-norm", "cff/adaptive"])
def test_every_kind_of_layer_can_be_timed(model: str) -> None:
    made = job(model)
    costs_of = costs.Costs(made, 4)
    last = len(made.net.layers) - 1
    seconds = costs_of.at(made.schedule.total - 1)
    assert seconds is not None
    assert all(seconds(i, 4) >= 0 for i in (0, last))


@pytest.mark.parametrize("model", ["trifecta/shallow", "fflib/ffrnn"])
def test_layers_that_do_not_train_alone_are_not_timed(model: str) -> None:
    assert costs.Costs(job(model), 4).at(0) is None


def test_a_batch_in_tiles_is_its_turns_and_one_step(timed: type[Timed]) -> None:
    seconds = seconds_of(job(), 10)
    assert seconds(0, 10) == pytest.approx(11e-3 - 0.5e-3)
    assert seconds(0, 4) == pytest.approx(1e-3 * (2 * 5 + 3 + 2))  # 4, 4, 2 and a step
    assert seconds(0, 1) == pytest.approx(1e-3 * (10 * 2 + 2))


def test_beyond_the_largest_tile_a_curve_is_a_line(timed: type[Timed]) -> None:
    seconds = seconds_of(job(), 512)
    assert seconds(0, 64) == pytest.approx(1e-3 * (8 * 65 + 2))
    assert seconds(0, 512) == pytest.approx(1e-3 * (513 - 0.5))


def test_layers_that_rest_only_pass(timed: type[Timed]) -> None:
    made = job("cff/adaptive")  # layer-wise
    made.schedule.begin(made.net, 1)
    second, first = (seconds_of(made, 4, epoch=e) for e in (1, 0))
    assert second(0, 4) == pytest.approx(5e-3)
    assert first(1, 4) == 0.0  # the batch never gets there


@pytest.mark.parametrize(("points", "n", "wanted"), [
    ({1: 1.0, 2: 5.0}, 2, 2.0),  # two tiles of 1 do as much
    ({1: 9.0, 2: 3.0}, 1, 3.0),  # and so does a larger tile
    ({1: 1.0, 2: 2.0, 4: 4.0}, 3, 3.0), ({8: 2.0}, 16, 3.0), ({8: 2.0}, 4, 1.0)])
def test_noise_is_taken_out(points: dict[int, float], n: int, wanted: float) -> None:
    assert curves.at(points, n) == pytest.approx(wanted)


def test_equal_layers_are_measured_once(timed: type[Timed]) -> None:
    made = job("deeperforward/resnet17")
    seconds = seconds_of(made, 1)
    seconds(1, 1)
    first = timed.calls
    seconds(3, 1)  # the same convolution of the next block
    assert timed.calls == first


def test_the_file_is_reused(timed: type[Timed], folder: Path,
                            monkeypatch: pytest.MonkeyPatch) -> None:
    seconds_of(job(), 8)(0, 2)
    curves.curves().save()
    assert timed.calls and folder.exists()
    monkeypatch.setattr(curves, "_curves", {})
    timed.calls = 0
    seconds_of(job(), 8)(0, 2)
    assert timed.calls == 0


@pytest.mark.parametrize("spoil", [
    lambda text: text[:40], lambda text: "[]", lambda text: text.replace(
        '"format": 1', '"format": 0'), lambda text: text.replace(curves.versions()[0], "0.0")])
def test_a_damaged_or_foreign_file_is_rewritten(spoil: Any, timed: type[Timed], folder: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    seconds_of(job(), 8)(0, 2)
    curves.curves().save()
    good = folder.read_text()
    folder.write_text(spoil(good))
    monkeypatch.setattr(curves, "_curves", {})
    timed.calls = 0
    seconds_of(job(), 8)(0, 2)
    assert timed.calls
    curves.curves().save()
    assert json.loads(folder.read_text()) == json.loads(good)


def test_another_machine_measures_its_own(timed: type[Timed], folder: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    seconds_of(job(), 8)(0, 2)
    curves.curves().save()
    here = curves.machine()
    monkeypatch.setattr(curves, "machine", lambda: "another machine")
    timed.calls = 0
    seconds_of(job(), 8)(0, 2)
    assert timed.calls
    curves.curves().save()
    assert set(json.loads(folder.read_text())["machines"]) == {here, "another machine"}


def test_another_instruction_set_measures_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ext = backends.extension()
    assert ext is not None
    try:
        machines = {ext.set_isa(isa) or curves.machine() for isa in ext.isas()}
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        assert curves.machine() not in machines  # the library's own counts too
    finally:
        ext.set_isa("auto")
    assert len(machines) == len(ext.isas())


def test_a_folder_that_cannot_be_written_is_said(timed: type[Timed], tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FFENGINE_CACHE", str(tmp_path / "file" / "below"))
    seconds_of(job(), 8)(0, 2)
    curves.curves().save()
    assert "[costs] measured costs are not kept" in caplog.text
