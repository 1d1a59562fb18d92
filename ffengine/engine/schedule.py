"""Schedules: which layers' turn it is, and how a batch becomes their update.

A schedule is one small class with two methods; the trainer asks it for every batch.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ffengine.engine.plan import Plan
from ffengine.engine.step import BatchReport, StepContext, train_batch


class Schedule(Protocol):
    """What the trainer needs to know of a schedule."""

    def layers(self, depth: int, epoch: int, iteration: int) -> range:
        """Layers of `depth` that train on this batch; the others are idle."""
        ...

    def train(self, ctx: StepContext, x: torch.Tensor, plan: Plan,
              dtype: torch.dtype) -> BatchReport:
        """Train them on the batch."""
        ...


class Together:
    """Every batch goes through all layers, and each of them trains on it."""

    def layers(self, depth: int, epoch: int, iteration: int) -> range:
        return range(depth)

    def train(self, ctx: StepContext, x: torch.Tensor, plan: Plan,
              dtype: torch.dtype) -> BatchReport:
        return train_batch(ctx, x, plan, dtype)
