"""Micro-batches: the sum of their gradients is one update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine.training import grouped

import ffengine as ff

#: Batch-free networks: pieces add up to the whole batch's own gradient.
FREE: dict[str, dict[str, Any]] = {
    "deeperforward/tinycnn": {"widths": (20, 20, 20, 20), "dropout": 0.0},
    "sn/mlp": {}, "fflib/ffnn-c": {"layers": (12, 12), "propagate": "stale"}, "symba/mlp": {},
}
#: Layers with batch statistics, before the weight or after the goodness, overlapping or not.
COUPLED: dict[str, dict[str, Any]] = {
    "cwcomp/cfse": {}, "cwcomp/ffcnn": {}, "trifecta/shallow": {}, "sn/cifar10": {},
}


def trainer(model: str, options: dict[str, Any], micro_batch: int | None) -> ff.Trainer:
    torch.manual_seed(0)
    net = ff.models.create(model, **options, num_classes=10, in_channels=1, image_size=8)
    return grouped(net, precision="fp64", backend="reference", optimizer="sgd", lr=0.05, epochs=2,
              progress=False, micro_batch=micro_batch)


def batch(n: int, model: str) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(3)
    made = {"x": torch.rand(n, 1, 8, 8, generator=source, dtype=torch.float64),
            "y": torch.arange(n) % 10}
    made["x"][:, :, -1, -1] = 1.0  # an overlay's label is as bright as the batch's brightest pixel
    if "fflib" in model or "symba" in model or "trifecta" in model:
        made["negatives"] = (made["y"] + 1) % 10
    return made


def compare(first: ff.Trainer, second: ff.Trainer) -> None:
    for (name, a), b in zip(first.net.named_parameters(), second.net.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize("model", FREE)
def test_pieces_add_up_to_the_batch(model: str) -> None:
    whole, parts = (trainer(model, FREE[model], m) for m in (None, 5))
    item = batch(12, model)
    for epoch in range(whole.epochs):
        for _ in range(2):
            one, two = (t.step(item, epoch=epoch) for t in (whole, parts))
            for a, b in zip([*one.losses, *one.goodness, *one.row_losses],
                            [*two.losses, *two.goodness, *two.row_losses], strict=True):
                assert (a is None) == (b is None)
                if a is not None and b is not None:
                    assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    compare(whole, parts)


@pytest.mark.parametrize("model", COUPLED)
def test_equal_pieces_have_the_batchs_statistics(model: str) -> None:
    whole, parts = (trainer(model, COUPLED[model], m) for m in (None, 6))
    item = {k: torch.cat([v, v]) for k, v in batch(6, model).items()}
    for iteration in range(2):  # of one stage: running statistics count rows, and so differ
        for t in (whole, parts):
            t.step(item, epoch=0, iteration=iteration)
    compare(whole, parts)


def test_other_pieces_have_statistics_of_their_own() -> None:
    whole, parts = (trainer("cwcomp/cfse", {}, m) for m in (None, 6))
    for t in (whole, parts):
        t.step(batch(12, ""), epoch=0)
    assert any(not torch.allclose(a, b) for a, b in zip(
        whole.net.parameters(), parts.net.parameters(), strict=True))


@pytest.mark.parametrize(("model", "size", "expected"), [
    ("fflib/ffnn", 4, "features of the weights before the step"),
    ("fflib/ffrnn", 4, "one update a batch"), ("bp/sn/mlp", 4, "one update a batch"),
    ("cwcomp/cfse", 0, "1 sample or more")])
def test_refusals(model: str, size: int, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        trainer(model, {}, size)


@pytest.mark.parametrize(("model", "options"), [
    ("cwcomp/cfse", {}), ("trifecta/shallow", {}), ("deeperforward/tinycnn", FREE[
        "deeperforward/tinycnn"])])
def test_the_plan_counts_the_sums(model: str, options: dict[str, Any]) -> None:
    made = trainer(model, options, 4)
    item = batch(12, model)
    made.step(item, epoch=0, iteration=0)
    for iteration in range(2):  # losses may take turns
        made.meter_next()
        made.step(item, epoch=0, iteration=iteration)
    planned = made.plan_for(12).peak_bytes
    assert abs(planned / made.peak_bytes - 1) <= 0.02


def test_tiles_of_the_last_piece_step_once() -> None:
    options = FREE["deeperforward/tinycnn"]
    whole = trainer("deeperforward/tinycnn", options, None)
    plan = whole.planning.planner(6).fixed([1], [2, 3])
    torch.manual_seed(0)
    parts = grouped(trainer("deeperforward/tinycnn", options, None).net, precision="fp64",
               backend="reference", optimizer="sgd", lr=0.05, epochs=2, progress=False,
               micro_batch=6, plan=plan)
    for t in (whole, parts):
        t.step(batch(12, ""))
    compare(whole, parts)
