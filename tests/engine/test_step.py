"""One training step: every plan is the same step, with dropout, biases and joined shortcuts."""

from __future__ import annotations

import pytest
import torch

from ffengine import models
from ffengine.engine.context import BatchReport, StepContext
from ffengine.engine.execute import train_batch
from ffengine.engine.memory.meter import MemoryMeter
from ffengine.engine.memory.planner import Planner
from ffengine.engine.memory.shapes import measure
from ffengine.engine.optim import LocalOptimizer
from ffengine.nn import LocalLinear, LocalNet
from ffengine.ops.config import LocalPassConfig, Norm, symba
from ffengine.ops.weight_update import OptimConfig

FP64 = torch.float64
BATCH = 7


def step(cuts: list[int], tile: int, **options: object) -> tuple[BatchReport, list[torch.Tensor]]:
    torch.manual_seed(0)
    net = models.create("deeperforward/resnet17", num_classes=5, planes=(5, 10, 20, 40),
                        image_size=16, **options).double()
    optimizer = LocalOptimizer(net.named_parameters(), OptimConfig("adamw", lr=0.01))
    x, y = torch.randn(BATCH, 3, 16, 16, dtype=FP64), torch.randint(0, 5, (BATCH,))
    before = x.clone()
    plans = Planner(measure(net, BATCH, FP64, states=2, backend="reference"))
    ctx = StepContext(net, optimizer, y, BATCH, seed=5, step=2, backend="reference")
    report = train_batch(ctx, x, plans.fixed(cuts, tile), FP64)
    assert torch.equal(x, before)
    return report, [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"dropout": 0.0, "bias": True},
                                     {"dropout": 0.0, "shortcuts": False}],
                         ids=["dropout", "bias", "plain"])
@pytest.mark.parametrize("tile", [1, 3, 7])
@pytest.mark.parametrize("cuts", [[], [4], [1, 2, 5, 11], list(range(16))],
                         ids=["depth-first", "one-cut", "mixed", "breadth-first"])
def test_every_plan_is_the_same_step(cuts: list[int], tile: int,
                                     options: dict[str, object]) -> None:
    report, weights = step(cuts, tile, **options)
    expected, right = step(list(range(16)), BATCH, **options)
    for got, want in ((report.losses, expected.losses), (report.goodness, expected.goodness),
                      (weights, right)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_tiled_plan_leaves_the_callers_batch_alone():
    config = LocalPassConfig(groups=2, norm=Norm("none"))
    net = LocalNet([LocalLinear(8, 8, config=config) for _ in range(3)], num_classes=2,
                   in_shape=(8,), input_norm="none")
    optimizer = LocalOptimizer(net.named_parameters(), OptimConfig())
    x, y = torch.randn(6, 8), torch.zeros(6, dtype=torch.int64)
    before = x.clone()
    plan = Planner(measure(net, 6, torch.float32, states=2)).fixed([0, 1], 2)
    train_batch(StepContext(net, optimizer, y, 6), x, plan, torch.float32)
    assert torch.equal(x, before)


def test_a_loss_on_pairs_keeps_both_halves_in_one_tile():
    config = LocalPassConfig(groups=1, goodness="mean_sq", loss=symba(), norm=Norm("length"))
    net = LocalNet([LocalLinear(8, 8, config=config)] * 2, num_classes=2, in_shape=(8,))
    planner = Planner(measure(net, 8, torch.float32, states=2))
    assert planner.tiles == [8] and planner.best().tile[0] == 8
    with pytest.raises(ValueError, match="tiles of the whole batch, 8, got"):
        planner.fixed([], 4)


def test_no_tile_outlives_its_turn() -> None:
    """Nothing of a tile is kept into the next: the plan, which keeps nothing, is met exactly."""
    net = models.create("deeperforward/resnet100", planes=(20, 20, 40, 40))
    optimizer = LocalOptimizer(net.named_parameters(), OptimConfig())
    x, y = torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64)
    plan = Planner(measure(net, 8, torch.bfloat16, states=2)).best()
    assert min(plan.tile) < 8
    with MemoryMeter(parameter=net.parameters(), state=optimizer.state_tensors(),
                     feature=[x, y]) as meter:
        train_batch(StepContext(net, optimizer, y, 8), x, plan, torch.bfloat16)
    assert abs(plan.peak_bytes - meter.report.peak_bytes) <= 0.001 * meter.report.peak_bytes


@pytest.mark.parametrize("tile", [1, 3])
@pytest.mark.parametrize("cuts", [[], [1, 2, 5, 11]], ids=["no-cut", "cuts"])
def test_layers_one_by_one_are_the_same_step(cuts: list[int], tile: int) -> None:
    """Every layer sees the features that it saw in one pass, dropout and all; to the last bit."""
    made = []
    for one_by_one in (False, True):
        torch.manual_seed(0)
        net = models.create("deeperforward/resnet17", image_size=8, dropout=0.3,
                            planes=(10, 20, 40, 80)).double()
        x = torch.randn(7, 3, 8, 8, dtype=FP64)
        optimizer = LocalOptimizer(net.named_parameters(), OptimConfig(lr=1e-3))
        plan = Planner(measure(net, 7, FP64, backend="reference")).fixed(cuts, tile, one_by_one)
        assert all(s.one_by_one == (one_by_one and len(s.layers) > 1) for s in plan.segments)
        report = train_batch(StepContext(net, optimizer, torch.arange(7), 7, seed=3, step=5,
                                         backend="reference"), x, plan, FP64)
        made.append([*report.losses, *report.goodness, *(p.detach() for p in net.parameters())])
    for got, want in zip(*made, strict=True):
        assert torch.equal(got, want)
