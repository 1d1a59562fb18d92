"""`ffengine train --baselines`: the same network by backpropagation and by the unfused step.

Same data, epochs, seed, batches and device, in the same command; what each holds is metered on
its second step, when its optimizer states exist. Backpropagation has no local losses, so it trains
with a learning rate of its own (BACKPROP_LR), on the same cosine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from ffengine import data, models
from ffengine.engine.budget import megabytes
from ffengine.engine.meter import MemoryMeter
from ffengine.engine.trainer import Trainer
from ffengine.nn import LocalNet
from ffengine.ops.weight_update import OptimConfig


class Opponent(Protocol):
    """What a baseline has to offer (ffengine.engine.baselines)."""

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor: ...

    def scores(self, x: torch.Tensor) -> torch.Tensor: ...

    def tensors(self) -> dict[str, list[torch.Tensor]]: ...

    def optimizers(self) -> list[torch.optim.Optimizer]: ...


@dataclass
class Outcome:
    """One row of the table; planned is None where nothing plans."""

    name: str
    test_accuracy: float
    seconds_per_epoch: float
    planned_bytes: int | None
    metered_bytes: int


def compare(model: str, options: dict[str, Any], splits: data.Splits, trainer: Trainer,
            ours: dict[str, Any], *, progress: bool) -> tuple[str, list[dict[str, Any]]]:
    """(table, rows): ours, then the two opponents trained here."""
    rows = [Outcome("ffengine", ours["test_accuracy"], ours["seconds_per_epoch"],
                    ours["plan"]["peak_bytes"], ours["peak_bytes"])]
    for name, build, lr_scale in opponents(trainer):
        torch.manual_seed(trainer.settings.seed)
        net = models.create(model, **options).to(trainer.device, trainer.settings.weight_dtype)
        rows.append(train_opponent(name, build(net), net, splits, trainer, lr_scale, progress))
    lines = [f"{'':24s}{'test':>9}{'s/epoch':>10}{'planned':>12}{'metered':>12}"]
    lines += [f"{r.name:24s}{100 * r.test_accuracy:7.2f} %{r.seconds_per_epoch:10.2f}"
              f"{'-' if r.planned_bytes is None else megabytes(r.planned_bytes):>12}"
              f"{megabytes(r.metered_bytes):>12}" for r in rows]
    return "\n".join(lines), [vars(r) for r in rows]


def opponents(trainer: Trainer) -> list[tuple[str, Callable[[LocalNet], Opponent], float]]:
    """(name, builder, its learning rate over ours)."""
    from ffengine.engine.baselines import BACKPROP_LR, BackpropStep, UnfusedStep

    settings, dtype = trainer.settings, trainer.dtype
    backprop = OptimConfig(kind=settings.optim().kind, lr=BACKPROP_LR,
                           weight_decay=settings.weight_decay)
    return [("unfused PyTorch step", lambda net: UnfusedStep(net, settings.optim(), dtype), 1.0),
            ("backpropagation", lambda net: BackpropStep(net, backprop, dtype),
             BACKPROP_LR / settings.lr if settings.lr else 1.0)]


def train_opponent(name: str, opponent: Opponent, net: LocalNet, splits: data.Splits,
                   trainer: Trainer, lr_scale: float, progress: bool) -> Outcome:
    """Train it as ours was trained, and test it."""
    settings, device = trainer.settings, trainer.device
    loader = data.loader(splits.train, batch_size=settings.batch_size, shuffle=True,
                         seed=settings.seed, device=device)
    schedules = [CosineAnnealingLR(o, T_max=settings.lr_epochs, eta_min=settings.lr_min * lr_scale)
                 for o in opponent.optimizers()]
    net.train()
    steps, metered, metering, began = 0, 0, 0.0, time.perf_counter()
    for epoch in range(settings.epochs):
        loader.set_epoch(epoch)
        for x, y in loader:
            x = x.to(settings.weight_dtype)
            start = time.perf_counter()
            if steps == min(1, len(loader) * settings.epochs - 1):
                metered = metered_step(opponent, x, y)
                metering = time.perf_counter() - start
            else:
                opponent.step(x, y)
            steps += 1
        for schedule in schedules:
            schedule.step()
        if progress:
            print(f"{name}: epoch {epoch + 1}/{settings.epochs}", file=sys.stderr)
    seconds = (time.perf_counter() - began - metering) / settings.epochs
    return Outcome(name, test_accuracy(opponent, net, splits, trainer), seconds, None, metered)


def metered_step(opponent: Opponent, x: torch.Tensor, y: torch.Tensor) -> int:
    """Peak bytes of one step."""
    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(x.device)
        opponent.step(x, y)
        return torch.cuda.max_memory_allocated(x.device)
    with MemoryMeter(feature=[x, y], **opponent.tensors()) as meter:
        opponent.step(x, y)
    return meter.report.peak_bytes


def test_accuracy(opponent: Opponent, net: LocalNet, splits: data.Splits,
                  trainer: Trainer) -> float:
    net.eval()
    hits = 0
    for x, y in data.loader(splits.test, batch_size=trainer.settings.batch_size,
                            device=trainer.device):
        scores = opponent.scores(x.to(trainer.settings.weight_dtype))
        hits += int((scores.argmax(1) == y).sum())
    return hits / max(len(splits.test), 1)
