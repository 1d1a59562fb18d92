"""A learned label channel without overlap: the first layer's loss, and no other, trains it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine.test_plan_every_model import AGREEMENT, metered
from engine.training import assert_same, grouped

import ffengine as ff
from ffengine.baselines.steps import UnfusedStep
from ffengine.engine.memory.plans import Job, phase_starts, planner_for
from ffengine.engine.run.recipe import Recipe
from ffengine.engine.schedules.backprop import Backprop
from ffengine.engine.schedules.layerwise import Layerwise
from ffengine.engine.schedules.schedule import Interleaved, Schedule, Together
from ffengine.models.trifecta import network
from ffengine.nn import LocalNet, Wire
from ffengine.ops.weight_update import OptimConfig

CLASSES, LR = 5, 0.01
IMAGE = (2, 8, 8)
NORMS = ("batch", "batch-running", "layer", "layer-no-mean", "none")


def net_of(depth: int = 3, **options: Any) -> LocalNet:
    torch.manual_seed(0)
    rows = ((6, True), (8, False), (8, False))[:depth]
    if options.get("dense"):
        rows = ((12, False), (10, False), (10, False))[:depth]
    net = network(rows, CLASSES, IMAGE, **{"dense": False, "update": "layer",
                                           "embedding": "learned", **options})
    for name, p in net.named_parameters():  # affine maps that are no identity
        if "pre_norm" in name:
            p.data.add_(0.3 * torch.randn_like(p))
    return net


def batch(step: int, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(rows, *IMAGE, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (rows,), generator=generator))


def trainer(net: LocalNet, **settings: Any) -> ff.Trainer:
    return grouped(net, **{"precision": "fp64", "progress": False, "recipe": Recipe(
        "adam", LR, epochs=4), "scheduler": (
            lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)), **settings})


@pytest.mark.parametrize("spans", [(), ((0, 1), (0, 2), (1, 2))], ids=["together", "in turns"])
@pytest.mark.parametrize("options", [
    *({"norm": norm} for norm in NORMS if norm != "batch-running"),
    {"norm": "none", "loss": "threshold"},
    {"norm": "batch", "dense": True}, {"norm": "layer", "dense": True, "loss": "threshold"},
    {"norm": "layer", "residual": True}, {"norm": "none", "dense": True, "depth": 1},
], ids=str)
def test_against_autograd(options: dict[str, Any], spans: tuple[tuple[int, int], ...]) -> None:
    ours, slow = net_of(**options), net_of(**options).double()
    if spans:
        for net in (ours, slow):
            net.schedule = Interleaved(spans[:len(net.layers)])
    made = trainer(ours)
    other = UnfusedStep(slow, OptimConfig(lr=LR), torch.float64, epochs=4)
    for step in range(4):
        epoch, iteration = divmod(step, 2)
        made.step(*batch(step), epoch=epoch, iteration=iteration)
        other.step(*batch(step), epoch=epoch, iteration=iteration)
        for (name, p), q in zip(ours.named_parameters(), slow.parameters(), strict=True):
            assert_same(p, q, (step, name))
    assert set(made.optimizer.states) == {n for n, _ in ours.named_parameters()}


def test_it_rests_with_the_first_layer() -> None:
    for schedule, trains in ((Interleaved([(0, 1), (0, 2), (0, 2)]), (True, False)),
                             (Layerwise(), (True, False)), (Layerwise(start=1), (False, False))):
        net = net_of(norm="none")
        made = trainer(net, schedule=schedule, epochs=1)
        for epoch, moves in enumerate(trains):
            before = net.encoding.weight.detach().clone()
            made.step(*batch(0), epoch=epoch, iteration=0)
            assert moves != torch.equal(before, net.encoding.weight)


@pytest.mark.parametrize("how", ["tiles above the first layer", "pieces"])
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_tiles_and_pieces_give_the_batch_s_gradient(norm: str, how: str) -> None:
    results = []
    for parts in (False, True):
        net = net_of(norm=norm, loss="threshold")
        made, settings = trainer(net), {}
        if parts and how == "pieces":
            settings = {"micro_batch": 5}
        elif parts and norm == "none":  # a layer that normalises its input takes no tiles
            settings = {"plan": made.planning.planner(12).fixed([0], [24, 5])}
        made = trainer(net, optimizer="sgd", **settings)
        for step in range(3):
            x, y = batch(step, 12)
            made.step(ff.Batch(x, y, negatives=(y + 1) % CLASSES))
        results.append(dict(net.named_parameters()))
    for name, p in results[0].items():
        assert_same(results[1][name], p, name)


def test_the_first_layer_takes_no_tiles() -> None:
    planner = trainer(net_of(norm="none", loss="threshold")).planning.planner(12)
    with pytest.raises(ValueError, match=r"layers 0 to 0 expected tiles of the whole batch, 24"):
        planner.fixed([0], [5, 5])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("schedule", [Together, Layerwise])
@pytest.mark.parametrize("norm", NORMS)
def test_it_is_planned_as_metered(norm: str, schedule: type[Schedule], precision: str) -> None:
    net = net_of(norm=norm, loss="threshold")
    run = trainer(net, precision=precision, schedule=schedule(), epochs=2)
    made = Job(net, run.schedule, run.settings)
    for samples in (3, 32):
        for epoch in phase_starts(made.schedule):
            planner = planner_for(made, samples, epoch)
            for plan in {planner.best(), planner.smallest()}:
                peak, floor = metered(made, samples, (epoch, 0), plan)
                assert floor == plan.floor_bytes
                assert abs(plan.peak_bytes / peak - 1) <= AGREEMENT


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_it(precision: str) -> None:
    exact, ours = net_of(norm="layer"), net_of(norm="layer")
    for net, how in ((exact, "fp64"), (ours, precision)):
        made = trainer(net, precision=how, optimizer="sgd", lr=100.0)  # far beyond fp32's steps
        x, y = batch(0, 32)
        made.step(ff.Batch(x.to(made.settings.weight_dtype), y, negatives=(y + 1) % CLASSES))
    start = net_of(norm="layer").encoding.weight.detach()
    moved = exact.encoding.weight.detach() - start
    assert moved.abs().max() > 0
    off = (ours.encoding.weight.detach() - start - moved).abs().max() / moved.abs().max()
    assert off < {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}[precision]


@pytest.mark.parametrize(("change", "said"), [
    (lambda net: setattr(net, "input_norm", "layer"), "got input_norm=layer"),
    (lambda net: setattr(net, "wires", (Wire(pool_before=True), *net.wires[1:])), "got a pool"),
])
def test_networks_whose_channel_no_gradient_reaches(change: Any, said: str) -> None:
    net = net_of(norm="none")
    change(net)
    with pytest.raises(ValueError, match=r"^\[schedule\] a learned label channel expected "
                       f"input_norm=none and no pool before the first layer, {said}$"):
        trainer(net)


@pytest.mark.parametrize("update", ["layer", "olu-both"])
def test_encoded_rows_that_say_no_labels_are_refused(update: str) -> None:
    net = net_of(update=update)
    made, (x, y) = trainer(net), batch(0)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    rows = net.encoding(x.repeat(2, 1, 1, 1), torch.cat([y, (y + 1) % CLASSES]))
    with pytest.raises(ValueError, match=r"^\[train\] a learned label channel expected samples, or "
                       r"features with the negatives that they show, got features alone$"):
        made.step(ff.Batch(x, y, features=rows))
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    made.step(ff.Batch(x, y, negatives=(y + 1) % CLASSES, features=rows))
    assert not torch.equal(net.encoding.weight, before["encoding.weight"])


def test_backpropagation_refuses_it() -> None:
    with pytest.raises(ValueError, match=r"^\[schedule\] backpropagation expected a network whose "
                       r"label channel is fixed, .* got a learned one$"):
        trainer(net_of(), schedule=Backprop())


def test_who_learns_it() -> None:
    for update, embedding, learns in (("layer", "auto", False), ("olu", "auto", True),
                                      ("layer", "learned", True), ("olu", "random", False)):
        net = net_of(update=update, embedding=embedding)
        assert net.encoding.weight.requires_grad == learns
    with pytest.raises(ValueError, match=r"embedding .*one of auto, learned, random, got 'no'"):
        net_of(embedding="no")
