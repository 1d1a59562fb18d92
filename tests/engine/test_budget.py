"""Training within a memory budget: the plan keeps it, the precisions say what it took."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from engine.training import grouped
from training import batch, trainer

import ffengine as ff
from ffengine.engine import trainer as trainers
from ffengine.engine.memory import costs, curves, limit, precision_fallback
from ffengine.engine.memory.budget import megabytes, parse_bytes
from ffengine.engine.memory.limit import AllocatorLimit, enforced, limit_for
from ffengine.engine.memory.plan import Plan
from ffengine.engine.schedules import layerwise

#: What a step may hold over its plan.
AGREEMENT = 1.02
NETS: dict[str, dict[str, Any]] = {
    "deeperforward/tinycnn": training.OPTIONS,
    "deeperforward/resnet17": {"planes": (10, 20, 40, 80), "image_size": 16},
    "sn/mlp": {}, "fflib/ffnn": {"image_size": 8}}


def made(model: str = "deeperforward/tinycnn", size: int = 32, **options: Any) -> ff.Trainer:
    torch.manual_seed(0)
    net = ff.models.create(model, **NETS[model])
    return grouped(net, **{"epochs": 2, "batch_size": size, "backend": "cpu", "costs": "modelled",
                      "progress": False, **options})


def metered(t: ff.Trainer, size: int = 32) -> int:
    x, y = torch.randn(size, *t.net.in_shape), torch.arange(size) % t.net.num_classes
    t.meter_next()
    t.step(x, y)
    return t.peak_bytes


def smallest(precision: str, states: str, weights: str = "fp32") -> int:
    free = made(precision=precision, states=states, weights=weights)
    return free.planning.planner(32).smallest().peak_bytes


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("model", NETS)
def test_plan_and_step_keep_the_budget(model: str, share: float) -> None:
    free = made(model)
    low = max(free.planning.planner(32, e).smallest().peak_bytes
              for e, _ in free.planning.plans(32).phases)
    top = free.planning.planner(32).fastest().peak_bytes
    budget = low + int(share * max(0, top - low))
    t = made(model, memory_budget=budget, costs="measured" if share == 0.3 else "modelled")
    assert t.settings.states == t.settings.weights == "fp32"
    assert t.planning.plans(32).peak_bytes <= budget
    assert metered(t) <= AGREEMENT * budget


RUNGS = [("fp32", "fp32"), ("bf16", "fp32"), ("8bit", "fp32"), ("8bit", "bf16")]


@pytest.mark.parametrize("rung", range(4))
def test_the_first_rung_that_fits_is_taken(rung: int) -> None:
    budget = smallest("bf16", *RUNGS[rung])
    t = made(precision="bf16", memory_budget=budget)
    assert (t.settings.states, t.settings.weights) == RUNGS[rung]
    assert t.planning.plans(32).peak_bytes <= budget
    assert {p.dtype for n, p in t.net.named_parameters() if p.numel() >= 4096} <= {
        torch.bfloat16 if rung == 3 else torch.float32}
    assert metered(t) <= AGREEMENT * budget
    said = " | ".join(t.planning.gave_up)
    assert ("optimizer states in" in said) == (rung > 0)
    assert ("weights in bf16" in said) == (rung == 3)


def test_fp32_keeps_its_weights() -> None:
    with pytest.raises(ValueError, match=r"8-bit blocks and weights in fp32$"):
        made(memory_budget=smallest("fp32", "8bit") - 1)


def test_what_was_given_up_is_said_with_its_size() -> None:
    t = made(memory_budget=smallest("fp32", "8bit"))
    wide = made(memory_budget="1GB")
    states, time = t.planning.gave_up
    assert states == ("optimizer states in 8-bit blocks instead of fp32: saves "
                      f"{megabytes(wide.floor_bytes - t.floor_bytes)}")
    assert re.fullmatch(r"the fastest plan needs \d+\.\d [kM]B: this one takes \d+\.\d\d x its "
                        "time", time)
    assert wide.planning.gave_up == []


@pytest.mark.parametrize("states", ["fp32", "bf16"])
def test_precisions_the_caller_gave_stand(states: str) -> None:
    low = smallest("fp32", states)
    t = made(memory_budget=low, states=states)
    assert t.settings.states == states
    spoken = f"optimizer states in {states} and weights in fp32$"
    with pytest.raises(ValueError, match=spoken):
        made(memory_budget=low - 1, states=states)


def test_the_smallest_that_is_named_is_enough() -> None:
    with pytest.raises(ValueError, match=r"^\[plan\] no plan fits 1\.0 kB: ") as refused:
        made(memory_budget=1000)
    named = re.search(r"smallest needs (\d+\.\d [kM]B) at batch 32", str(refused.value))
    assert named is not None
    assert made(memory_budget=named[1].replace(" ", "")).settings.states == "8bit"
    with pytest.raises(ValueError, match="no plan fits"):
        made(memory_budget=smallest("fp32", "8bit") - 1)


@pytest.mark.parametrize(("nbytes", "enough", "text"), [
    (440_049_999, False, "440.0 MB"), (440_000_001, True, "440.1 MB"), (999_949, False, "999.9 kB"),
    (12, True, "0.1 kB"), (1_000_000, True, "1.0 MB")])
def test_sizes_for_people(nbytes: int, enough: bool, text: str) -> None:
    assert megabytes(nbytes, enough=enough) == text
    assert not enough or (parse_bytes(text.replace(" ", "")) or 0) >= nbytes


@pytest.mark.parametrize("favourite", [1, 4, 32])
def test_the_choice_follows_the_measured_costs(favourite: int,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    def table(self: costs.Costs, epoch: int) -> costs.Seconds:
        return lambda i, tile: 1.0 if tile == favourite else 100.0

    monkeypatch.setattr(precision_fallback.Costs, "at", table)
    t = made(memory_budget="1GB", costs="measured")
    assert t.plan is not None and set(t.plan.tile) == {favourite}
    assert (t.planning.costs, t.planning.seconds) == ("measured", 4.0)


def test_a_layer_that_cannot_be_timed_leaves_the_model(monkeypatch: pytest.MonkeyPatch,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    def fails(self: costs.LayerTimer, kind: str, n: int) -> float:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(curves, "_curves", {})
    monkeypatch.setattr(curves, "read", lambda path, machine: {})
    monkeypatch.setattr(costs.LayerTimer, "time", fails)
    t = made(memory_budget="1GB", costs="measured")
    assert (t.planning.costs, t.planning.seconds) == ("modelled", None)
    assert "could not be timed" in caplog.text


def test_without_a_budget_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_fallback, "Costs", None)
    t = made(costs="measured")
    assert (t.planning.costs, t.planning.gave_up) == ("modelled", [])


def test_unknown_costs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^\[trainer\] costs must be one of measured, modelled"):
        made(costs="guessed")


def test_a_resumed_run_keeps_precisions_and_tiles(tmp_path: Path) -> None:
    low = smallest("fp32", "8bit")
    first = trainer(backend="cpu", batch_size=32, memory_budget=low, costs="modelled")
    first.step(*batch(32))
    path = first.save(tmp_path / "run.safetensors")
    again = trainer(backend="cpu", batch_size=32, memory_budget=2 * low, costs="modelled",
                    states="8bit")
    again.resume(path)
    assert again.plan is not None and first.plan is not None
    assert (again.plan.cuts, again.plan.tile) == (first.plan.cuts, first.plan.tile)
    x, y = batch(32)
    first.step(x, y), again.step(x, y)
    assert training.same(training.weights(first.net), training.weights(again.net))


@pytest.mark.parametrize(("kind", "said"), [
    ("ram", None), ("disk", "on disk"), ("recompute", "made again every epoch")])
@pytest.mark.parametrize("budget", [10**9, None])
def test_features_that_are_not_kept_in_ram_are_said(budget: int | None, kind: str, said: str | None,
                                                    monkeypatch: pytest.MonkeyPatch,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(layerwise, "choose_store", lambda *amounts: kind)
    splits = ff.data.load("synthetic", shape=(1, 8, 8), train=40, valid=8, test=16)
    t = trainer(schedule=layerwise.Layerwise(), batch_size=16, memory_budget=budget,
                costs="modelled", epochs=1, backend="cpu")
    t.schedule.expect(t.planning, len(splits.train), 16, shuffle=True)
    assert t.schedule.chosen_store(t.planning, 40, 16, 1, None) == kind
    texts = [f"what layer {i} sees is {said} instead of in RAM: saves {megabytes(nbytes)}"
             for i, nbytes in ((1, 40 * 10 * 64 * 4), (2, 40 * 20 * 16 * 4), (3, 40 * 20 * 4 * 4))]
    assert t.planning.gave_up == (texts if said and budget else [])
    assert all((text in caplog.text) == bool(said and budget) for text in texts)


def test_room_for_features_is_beside_a_step_on_the_batch_that_comes() -> None:
    """A trainer without a batch size learns it from the loader."""
    t = trainer(schedule=layerwise.Layerwise(), memory_budget=10**7, costs="modelled", epochs=1,
                backend="cpu")
    assert t.plan is None
    t.schedule.expect(t.planning, 40, 32, shuffle=True)
    kept = 40 * (10 * 64 * 4 + 4)  # of what layer 1 sees, and a sum of goodness a sample
    plan = t.planning.plans(32).at(1)
    assert plan.batch == 32
    assert t.planning.room(32, 1) == 10**7 + kept - plan.peak_bytes
    assert t.planning.room(16, 1) > t.planning.room(32, 1)


def test_micro_batches_count_their_sums() -> None:
    t = made(micro_batch=8)
    gradients = sum(4 * p.numel() for p in t.net.parameters())
    piece = made(size=8)
    assert t.plan is not None and piece.plan is not None
    assert t.plan.peak_bytes >= piece.planning.planner(8).smallest().peak_bytes + gradients
    assert metered(t) <= AGREEMENT * t.plan.peak_bytes


def test_the_limit_is_the_sum_of_its_rows() -> None:
    rows = AllocatorLimit(440_000_000, others=1000, library_workspaces=50, allocator_rounding=7)
    assert rows.bytes == 440_001_057
    assert rows.fraction(880_002_114) == 0.5
    assert rows.fraction(1000) == 1.0


def fake_allocator(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The fraction in force, of a GPU with 1 GB."""
    now = [0.75]
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda d: type("Properties", (), {"total_memory": 10**9}))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda d: now[0])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction",
                        lambda fraction, d: now.__setitem__(0, fraction))
    return now


def test_the_limit_is_in_force_inside_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now, device = fake_allocator(monkeypatch), torch.device("cuda", 0)
    with pytest.raises(KeyError), enforced(AllocatorLimit(10**8, 0, 10**7, 0), device):
        assert now == [0.11]
        raise KeyError
    assert now == [0.75]
    with enforced(AllocatorLimit(10**9), device):  # never above a limit that was there
        assert now == [0.75]
    with enforced(None, device):
        assert now == [0.75]


def test_limits_of_two_threads_leave_room_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    now, device = fake_allocator(monkeypatch), torch.device("cuda", 0)
    first, second, third = (enforced(AllocatorLimit(10**7 * n, 0, 0, 0), device)
                            for n in (10, 20, 60))
    first.__enter__()
    second.__enter__()
    assert now == pytest.approx([0.3])
    third.__enter__()
    assert now == [0.75]
    third.__exit__()
    first.__exit__()  # the first to come is not the last to go
    assert now == pytest.approx([0.2])
    second.__exit__()
    assert now == [0.75]


def test_what_others_hold_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda d: 5000)
    found = limit_for(10**6, [torch.zeros(1000)], device)
    assert found is not None and (found.budget, found.others) == (10**6, 1000)
    assert limit_for(None, [], device) is None
    assert limit_for(10**6, [], torch.device("cpu")) is None


def test_every_step_runs_under_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, asked = AllocatorLimit(10**9), []
    monkeypatch.setattr(trainers, "limit_for", lambda budget, planned, device: asked.append(
        (budget, sum(t.numel() for t in planned))) or rows)
    monkeypatch.setattr(trainers, "enforced", lambda found, device: asked.append(found) or (
        enforced(found, device)))
    t = made(memory_budget="1GB")
    metered(t)
    metered(t)
    values = 3 * sum(p.numel() for p in t.net.parameters()) + 32 * 8 * 8 + 32
    assert asked == [(10**9, values), rows, rows]  # what is not the plan's is looked up once


@pytest.mark.gpu
def test_a_lie_in_the_plan_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a small batch would hold; a step that needs a gigabyte more does not."""
    options = {"in_channels": 3, "image_size": 32, "widths": (200, 200, 200, 200)}
    net = ff.models.create("deeperforward/tinycnn", **options)
    free = ff.Trainer(net, epochs=1, batch_size=64, device="cuda", progress=False)
    assert free.plan is not None
    t = ff.Trainer(net, epochs=1, batch_size=64, device="cuda", progress=False,
                   memory_budget=free.plan.peak_bytes)
    x, y = torch.randn(64, 3, 32, 32), torch.arange(64) % 10
    before = torch.cuda.get_per_process_memory_fraction()
    t.step(x, y)
    assert torch.cuda.get_per_process_memory_fraction() == before
    train = t.schedule.train

    def lies(ctx: Any, item: Any, plan: Plan, dtype: torch.dtype) -> Any:
        hidden = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        report = train(ctx, item, plan, dtype)
        del hidden
        return report

    monkeypatch.setattr(t.schedule, "train", lies)
    with pytest.raises(torch.OutOfMemoryError):
        t.step(x, y)
    assert torch.cuda.get_per_process_memory_fraction() == before
    assert limit.LIBRARY_WORKSPACES + limit.ALLOCATOR_ROUNDING < 2**28
