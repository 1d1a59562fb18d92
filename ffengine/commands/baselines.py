"""`ffengine train --baselines`: the same network by backpropagation and by the unfused step.

Same data, epochs, seed, batches and device, in the same command; what each holds is metered on
its second step, when its optimizer states exist. Backpropagation trains the network's twin; it has
no local losses, so its learning rate is its own (BACKPROP_LR), on the same schedule. Where a step
is more than layers in turn, our rule on the plain PyTorch back-end stands for the unfused step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ffengine import data, models
from ffengine.baselines.steps import BACKPROP_LR, BackpropStep, UnfusedStep
from ffengine.engine.memory.budget import megabytes
from ffengine.engine.memory.meter import MemoryMeter
from ffengine.engine.run.recipe import Recipe
from ffengine.engine.trainer import Trainer
from ffengine.nn import LocalNet
from ffengine.ops.weight_update import OptimConfig

#: Trains on (x, y) the layers whose turn it is at (epoch, iteration).
Step = Callable[[torch.Tensor, torch.Tensor, int, int], Any]


@dataclass
class Outcome:
    """One row of the table; planned is None where nothing plans."""

    name: str
    test_accuracy: float
    seconds_per_epoch: float
    planned_bytes: int | None
    metered_bytes: int


@dataclass
class Opponent:
    """A baseline, its step, the epochs it trains, and the epoch whose learning rate holds."""

    name: str
    side: UnfusedStep | BackpropStep
    step: Step
    epochs: int
    rate_epoch: Callable[[int], int]


def compare(model: str, options: dict[str, Any], splits: data.Splits, trainer: Trainer,
            ours: dict[str, Any], *, progress: bool) -> tuple[str, list[dict[str, Any]]]:
    """(table, rows): ours, then the two opponents trained here."""
    rows = [Outcome("ffengine", ours["test_accuracy"], ours["seconds_per_epoch"],
                    ours["plan"]["peak_bytes"], ours["peak_bytes"]),
            layer_by_layer(model, options, splits, trainer, progress),
            train_opponent(backprop(model, options, trainer), splits, trainer, progress)]
    lines = [f"{'':24s}{'test':>9}{'s/epoch':>10}{'planned':>12}{'metered':>12}"]
    lines += [f"{r.name:24s}{100 * r.test_accuracy:7.2f} %{r.seconds_per_epoch:10.2f}"
              f"{'-' if r.planned_bytes is None else megabytes(r.planned_bytes):>12}"
              f"{megabytes(r.metered_bytes):>12}" for r in rows]
    return "\n".join(lines), [vars(r) for r in rows]


def network(model: str, options: dict[str, Any], trainer: Trainer) -> LocalNet:
    """A new network at the trainer's seed, where its own is."""
    torch.manual_seed(trainer.settings.seed)
    return models.create(model, **options).to(trainer.device, trainer.settings.weight_dtype)


def layer_by_layer(model: str, options: dict[str, Any], splits: data.Splits, trainer: Trainer,
                   progress: bool) -> Outcome:
    """The unfused step, or what stands for it."""
    settings = trainer.settings
    try:
        side = UnfusedStep(network(model, options, trainer), settings.optim(), trainer.dtype,
                           epochs=settings.epochs, seed=settings.seed)
    except ValueError:
        return on_reference(network(model, options, trainer), splits, trainer, progress)

    def step(x: torch.Tensor, y: torch.Tensor, epoch: int, iteration: int) -> None:
        side.step(x, y, epoch=epoch, iteration=iteration)

    return train_opponent(
        Opponent("unfused PyTorch step", side, step, trainer.epochs, side.schedule.rate_epoch),
        splits, trainer, progress)


def backprop(model: str, options: dict[str, Any], trainer: Trainer) -> Opponent:
    """The twin by plain backpropagation; it trains the recipe's epochs, not those of every layer.

    Raises:
        ValueError: the model is a twin itself.
    """
    settings = trainer.settings
    optim = OptimConfig(kind=settings.optim().kind, lr=BACKPROP_LR,
                        weight_decay=settings.weight_decay)
    side = BackpropStep(network(f"bp/{model}", options, trainer), optim, trainer.dtype)
    return Opponent("backpropagation", side, lambda x, y, epoch, iteration: side.step(x, y),
                    settings.epochs, lambda epoch: epoch)


def train_opponent(opponent: Opponent, splits: data.Splits, trainer: Trainer,
                   progress: bool) -> Outcome:
    """Train it as ours was trained, and test it."""
    settings, side = trainer.settings, opponent.side
    loader = loader_of(splits, trainer)
    groups = [(group, group["lr"]) for o in side.optimizers() for group in o.param_groups]
    side.net.train()
    steps, metered, metering, began = 0, 0, 0.0, time.perf_counter()
    for epoch in range(opponent.epochs):
        loader.set_epoch(epoch)
        factor = settings.rate_factor(opponent.rate_epoch(epoch))
        for group, rate in groups:
            group["lr"] = rate * factor
        for iteration, (x, y) in enumerate(loader):
            x = x.to(settings.weight_dtype)
            start = time.perf_counter()
            if steps == min(1, len(loader) * opponent.epochs - 1):
                metered = metered_step(opponent, x, y, epoch, iteration)
                metering = time.perf_counter() - start
            else:
                opponent.step(x, y, epoch, iteration)
            steps += 1
        if progress:
            print(f"{opponent.name}: epoch {epoch + 1}/{opponent.epochs}", file=sys.stderr)
    seconds = (time.perf_counter() - began - metering) / opponent.epochs
    return Outcome(opponent.name, test_accuracy(side, splits, trainer), seconds, None, metered)


def on_reference(net: LocalNet, splits: data.Splits, trainer: Trainer, progress: bool) -> Outcome:
    """Our own rule on the reference back-end."""
    s = trainer.settings
    recipe = replace(net.recipe or Recipe(), optimizer=s.optimizer, lr=s.lr, lr_min=s.lr_min,
                     weight_decay=s.weight_decay, epochs=s.epochs, batch_size=s.batch_size,
                     lr_epochs=s.lr_epochs, lr_drops=s.lr_drops, lr_half_linear=s.lr_half_linear)
    plain = Trainer(net, recipe=recipe, backend="reference", precision=s.precision, seed=s.seed,
                    device=trainer.device, batch_size=s.batch_size, progress=progress)
    began = time.perf_counter()
    plain.fit(loader_of(splits, trainer))
    seconds = (time.perf_counter() - began) / plain.epochs
    tested = plain.evaluate(data.loader(splits.test, batch_size=s.batch_size,
                                        device=trainer.device))
    return Outcome("reference back-end", tested, seconds, None, plain.peak_bytes)


def loader_of(splits: data.Splits, trainer: Trainer) -> data.Loader:
    """The training set as ours was shown it."""
    s = trainer.settings
    return data.loader(splits.train, batch_size=s.batch_size,
                       shuffle=s.batch_size < len(splits.train), seed=s.seed,
                       device=trainer.device)


def metered_step(opponent: Opponent, x: torch.Tensor, y: torch.Tensor, epoch: int,
                 iteration: int) -> int:
    """Peak bytes of one step."""
    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(x.device)
        opponent.step(x, y, epoch, iteration)
        return torch.cuda.max_memory_allocated(x.device)
    with MemoryMeter(feature=[x, y], **opponent.side.tensors()) as meter:
        opponent.step(x, y, epoch, iteration)
    return meter.report.peak_bytes


def test_accuracy(side: UnfusedStep | BackpropStep, splits: data.Splits,
                  trainer: Trainer) -> float:
    side.net.eval()
    hits = 0
    for x, y in data.loader(splits.test, batch_size=trainer.settings.batch_size,
                            device=trainer.device):
        scores = side.scores(x.to(trainer.settings.weight_dtype))
        hits += int((scores.argmax(1) == y).sum())
    return hits / max(len(splits.test), 1)
