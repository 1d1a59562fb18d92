"""The memory plan of every network's schedule, phase by phase, against the meter on real steps."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from ffengine import models
from ffengine.engine import micro
from ffengine.engine.batch import Batch
from ffengine.engine.context import StepContext
from ffengine.engine.execute import train_batch
from ffengine.engine.inputs import rows_of
from ffengine.engine.memory.meter import MemoryMeter
from ffengine.engine.memory.plan import Plan
from ffengine.engine.memory.planner import Planner
from ffengine.engine.memory.plans import Job, phase_starts, planner_for, plans_for
from ffengine.engine.memory.shapes import measure
from ffengine.engine.optim import LocalOptimizer, own_settings
from ffengine.engine.run.settings import Settings
from ffengine.engine.schedules.schedule import of
from ffengine.engine.trainer import Trainer
from ffengine.nn import LocalNet
from ffengine.nn.layers import as_laid_out
from ffengine.ops.weight_update import OptimConfig

#: Prediction and meter agree within this.
AGREEMENT = 0.02
#: What makes a network quick to step, where its own size is not.
SMALL: dict[str, dict[str, Any]] = {
    "cwcomp/ffcnn": {"channels": (20, 20, 20, 20)},
    "deeperforward/cnn14": {"image_size": 16, "widths": (10, 20, 40, 40, 40)},
    "deeperforward/resnet17": {"image_size": 8, "planes": (10, 20, 40, 80)},
    "deeperforward/resnet33": {"image_size": 8, "planes": (10, 20), "counts": (2, 2)},
    "deeperforward/resnet100": {"image_size": 8, "planes": (10, 20), "counts": (2, 2)},
    "deeperforward/tinycnn": {"widths": (20, 40, 80, 80)},
    "fflib/ffnn": {"layers": (200, 200)},
    "fflib/ffnn-c": {"layers": (200, 200)},
    "hinton/peer-norm": {"layers": (200, 200)},
    "symba/mlp": {"layers": (200, 200)},
    "trifecta/fcn": {"width": 200},
}
MODELS = [name for name in models.names() if not name.startswith(("bp/", "baselines/"))]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@functools.cache
def job(name: str, precision: str = "fp32") -> Job:
    """The network as its recipe trains digits, made small; two epochs a layer."""
    entry = models.entry(name)
    options = {"image_size": 8, **entry.options_for("digits"), "in_channels": 1, "num_classes": 10}
    net = models.create(name, **{**options, **SMALL.get(name, {})})
    settings = Settings.resolve(
        entry.recipe_for("digits"), epochs=2, batch_size=32, precision=precision)
    schedule = of(net, None)
    schedule.begin(net, settings.epochs)
    return Job(net, schedule, settings)


def metered(made: Job, samples: int, when: tuple[int, int], plan: Plan,
            stored: bool = False) -> tuple[int, int]:
    """(peak, floor) that the meter reads of a real step."""
    net, schedule, optim = made.net, made.schedule, made.settings.optim()
    optimizer = LocalOptimizer(
        [(n, p) for n, p in net.named_parameters() if p.requires_grad], optim,
        own=own_settings(net, optim), second=schedule.owners(), active=schedule.active(when[0]))
    x, y = torch.randn(samples, *net.in_shape), torch.arange(samples) % net.num_classes
    item, rows = Batch(x, y), rows_of(net, samples)
    if stored:
        x = as_laid_out(torch.rand(rows, *schedule.stored_shape(schedule.phase(when[0]))))
        item = Batch(x, y, features=x, below=torch.rand(rows))
    ctx = StepContext(net, optimizer, y, rows, turn=schedule.turn(*when))
    with MemoryMeter(parameter=net.parameters(), state=optimizer.state_tensors(),
                     feature=[x, y]) as meter:
        schedule.train(ctx, item, plan, made.settings.dtype)
    return meter.report.peak_bytes, meter.report.floor_bytes


@pytest.mark.parametrize("precision", [
    pytest.param(p, marks=pytest.mark.isa if p == "bf16" else ()) for p in PRECISIONS])
@pytest.mark.parametrize("name", MODELS)
def test_every_phase_is_planned_as_metered(name: str, precision: str) -> None:
    made, wrong = job(name, precision), []
    # batch statistics of one sample do not exist
    for samples in (2 if made.net.layer(0).uses_batch_statistics else 1, 5, 32):
        for epoch in phase_starts(made.schedule):
            planner = planner_for(made, samples, epoch)
            for plan in {planner.best(), planner.smallest()}:
                # losses may take turns: the plan holds for both
                seen = [metered(made, samples, (epoch, i), plan) for i in (0, 1)]
                peak = max(p for p, _ in seen)
                assert seen[0][1] == plan.floor_bytes
                if abs(plan.peak_bytes / peak - 1) > AGREEMENT:
                    wrong.append(f"batch {samples}, epoch {epoch}: planned {plan.peak_bytes}, "
                                 f"metered {peak} (cuts {plan.cuts}, tiles {plan.tile})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["cff/fixed", "cafo/cnn", "sn/mlp", "sn/cifar10"])
def test_a_stage_that_reads_kept_features_is_planned_as_metered(name: str) -> None:
    made, held = job(name), 12345
    last = phase_starts(made.schedule)[-1]
    planner = planner_for(made, 32, last, stored=True, held=held)
    for plan in {planner.best(), planner.smallest()}:
        peak, floor = metered(made, 32, (last, 0), plan, stored=True)
        assert floor == plan.floor_bytes
        assert abs(plan.peak_bytes / (peak + held) - 1) <= AGREEMENT


@pytest.mark.parametrize("name", ["deeperforward/tinycnn", "sn/cifar10", "trifecta/shallow"])
def test_a_piece_of_a_batch_is_planned_as_metered(name: str) -> None:
    """The sums of the gradients lie in memory all the while."""
    made, optim = job(name), job(name).settings.optim()
    net, schedule, last = made.net, made.schedule, phase_starts(job(name).schedule)[-1]
    plan = planner_for(made, 5, last, micro=True).smallest()
    optimizer = LocalOptimizer([(n, p) for n, p in net.named_parameters() if p.requires_grad],
                               optim, own=own_settings(net, optim), second=schedule.owners(),
                               active=schedule.active(last))
    x, y = torch.randn(10, *net.in_shape), torch.arange(10)
    peaks = []
    for iteration in (0, 1):  # losses may take turns
        def step(ctx: StepContext, part: Batch) -> Any:
            return schedule.train(ctx, part, plan, made.settings.dtype)

        def context(part: Batch, when: tuple[int, int] = (last, iteration)) -> StepContext:
            return StepContext(net, optimizer, part.y, rows_of(net, 5), turn=schedule.turn(*when))

        with MemoryMeter(parameter=net.parameters(), state=optimizer.state_tensors(),
                         feature=[x, y]) as meter:
            micro.train(context, Batch(x, y), 5, step)
        peaks.append(meter.report.peak_bytes)
    rest = 5 * (x[0].numel() * 4 + 8)
    assert abs((plan.peak_bytes + rest) / max(peaks) - 1) <= AGREEMENT


def test_a_run_needs_what_its_largest_phase_needs() -> None:
    made = job("sn/cifar10")
    run = plans_for(made, 32)
    assert [start for start, _ in run.phases] == phase_starts(made.schedule)
    peaks = [plan.peak_bytes for _, plan in run.phases]
    assert run.peak_bytes == max(peaks) > min(peaks)
    assert all(run.at(start + 1) is plan for start, plan in run.phases)
    # a layer-wise stage holds the states of its own layer alone
    sizes = {sum(p.numel() for p in made.net.layer(i).parameters())
             for i in range(len(made.net.layers))}
    assert len({plan.floor_bytes for _, plan in run.phases}) >= len(sizes)


def test_a_run_that_cannot_fit_names_what_its_phase_needs() -> None:
    made = job("sn/cifar10")
    need = max(planner_for(made, 32, e).smallest().peak_bytes
               for e in phase_starts(made.schedule))
    assert plans_for(made, 32, need).peak_bytes <= need
    with pytest.raises(ValueError, match=r"^\[plan\] no plan fits"):
        plans_for(made, 32, need - 1)


def deep(blocks: int, planes: tuple[int, ...], image_size: int) -> LocalNet:
    """Stages of `blocks` basic blocks: doubling them doubles the depth at equal width. Of a stage's
    two first blocks one joins another map and, in the last stage, one is joined by nobody."""
    return models.create("deeperforward/resnet33", planes=planes, counts=(blocks,) * len(planes),
                         image_size=image_size)


@pytest.mark.parametrize("batch", [32, 128])
def test_twice_the_depth_adds_parameters_and_states_only(batch: int) -> None:
    planes = (100, 200, 400, 800)
    with torch.device("meta"):
        once, twice = (deep(blocks, planes, 32) for blocks in (3, 6))
    first, second = (Planner(measure(net, batch, torch.float32)).smallest()
                     for net in (once, twice))
    assert len(twice.layers) > 1.8 * len(once.layers)
    assert second.working_bytes < 1.02 * first.working_bytes


def test_twice_the_depth_as_metered() -> None:
    working = []
    for blocks in (3, 6):
        net = deep(blocks, (40, 80), 16)
        plan = Planner(measure(net, 32, torch.float32)).smallest()
        optimizer = LocalOptimizer(net.named_parameters(), OptimConfig(lr=1e-5))
        x, y = torch.randn(32, *net.in_shape), torch.arange(32) % 10
        with MemoryMeter(parameter=net.parameters(), state=optimizer.state_tensors(),
                         feature=[x, y]) as meter:
            train_batch(StepContext(net, optimizer, y, 32), x, plan, torch.float32)
        working.append(meter.report.working_bytes)
    assert working[1] < 1.02 * working[0]


def test_the_recurrent_twin_trains_though_no_plan_describes_it() -> None:
    net = models.create("bp/fflib/ffrnn", image_size=8, in_channels=1)
    trainer = Trainer(net, epochs=1, progress=False)
    trainer.meter_next()
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    trainer.step(x, y)
    assert trainer.peak_bytes > trainer.floor_bytes
    assert 0 <= trainer.evaluate([(x, y)]) <= 1
