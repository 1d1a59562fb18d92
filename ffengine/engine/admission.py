"""What a step is given, checked before anything moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ffengine.engine.ambient import ordinary
from ffengine.engine.batch import Batch, as_batch, check_range, checked, label_count
from ffengine.engine.run.state import TrainingRun
from ffengine.nn.network import LocalNet


def admitted(run: TrainingRun, batch: Any, y: torch.Tensor | None, epoch: int | None,
             iteration: int | None) -> Batch:
    """The batch that a step takes; run.epoch and run.iteration become the step's.

    Raises:
        TypeError, ValueError: a batch that the network cannot take, a number that is no count, a
            network that is not what the trainer was built on; nothing has changed.
        TrainingStopped: samples that are not finite, or whose squares are not.
    """
    item = ordinary(checked(as_batch(batch, y), run.net, run.device))
    stand = run.epoch if epoch is None else count("epoch", epoch)
    at = (run.iteration if stand == run.epoch else 0) if iteration is None else count(
        "iteration", iteration)
    if at == 0 and run.device.type != "cpu":
        check_range(item.y, label_count(run.net))
    changed = run.optimizer.changed()
    run.finite.before(numbers(item), run.dtype, stand, run.steps)
    if changed or stand != run.epoch:
        run.optimizer.activate(run.schedule.active(stand))
    run.epoch, run.iteration = stand, at
    return item


def numbers(item: Batch) -> list[torch.Tensor]:
    """Every floating-point tensor that a batch brings, once: kept features are its samples too."""
    given = [item.x, item.features, item.negatives, item.below]
    hidden = [t for half in item.hidden or () for t in half]
    brought = {id(t): t for t in (*given, *hidden) if isinstance(t, torch.Tensor)}
    return [t for t in brought.values() if t.is_floating_point() and t.numel()]


def count(name: str, value: Any) -> int:
    """A whole number from 0 on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"[train] {name} expected a whole number of 0 or more, got {value!r}")
    return value


def check_losses(net: LocalNet) -> None:
    """ValueError for a loss with parameters of its own, which nobody would train."""
    for i in range(len(net.layers)):
        loss = net.layer(i).config.loss
        learned = [n for n, p in loss.named_parameters() if p.requires_grad] if isinstance(
            loss, nn.Module) else []
        if learned:
            raise ValueError(f"[trainer] loss of layer {i} expected no parameters to train, got "
                             f"{', '.join(learned)}: the engine trains the network's alone")
