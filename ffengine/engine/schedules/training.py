"""What a schedule may ask of the run that it trains in: of the trainer, but for its loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from ffengine.engine.optim import LocalOptimizer
from ffengine.engine.run.settings import Settings
from ffengine.nn.network import LocalNet


class Budgeted(Protocol):
    """The run's memory plans (engine/memory/planning.py)."""

    @property
    def settings(self) -> Settings:
        """The run's, with the precisions that the plans took."""

    def room(self, samples: int, epoch: int) -> int | None:
        """Bytes that the budget leaves beside a step on so many samples; None without one."""

    @property
    def device(self) -> str:
        """Its type."""

    def keeps(self, epoch: int, nbytes: int, seen: int = 0) -> None:
        """The phase of an epoch reads features that were kept; `seen`: bytes of a sample of which a
        batch is no copy."""

    def give_up(self, what: str) -> None:
        """Note, and say once, what the budget costs."""


class Training(Protocol):
    """The run: what it trains, in what, within what; see Trainer for the attributes."""

    net: LocalNet
    optimizer: LocalOptimizer
    settings: Settings
    device: torch.device
    dtype: torch.dtype
    backend: str
    budget: int | None
    out: Path | None
    iteration: int
    #: Features that a layer-wise schedule keeps between its stages.
    stored: Any

    @property
    def planning(self) -> Budgeted:
        """The plans of its steps."""
