"""A run in progress, as checkpoints, captured steps and evaluation see the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from ffengine.engine.batch import Batch
from ffengine.engine.context import BatchReport
from ffengine.engine.memory.plan import Plan
from ffengine.engine.memory.planning import Planning
from ffengine.engine.run.history import EpochSums, History
from ffengine.engine.run.settings import LearningRate
from ffengine.engine.run.stopping import FiniteCheck
from ffengine.engine.schedules.schedule import Schedule
from ffengine.engine.schedules.training import Training


class TrainingRun(Training, Protocol):
    """A run in progress; see Trainer for the attributes, and for the methods."""

    schedule: Schedule
    micro_batch: int | None
    notes: dict[str, Any]
    #: The run folder, once it is this run's to write into.
    claimed: Path | None
    rate: LearningRate
    finite: FiniteCheck
    history: History
    #: Batches of the epoch in training, their losses and hits.
    sums: EpochSums
    epoch: int
    steps: int
    best_accuracy: float | None
    ended: bool
    #: The layer range is selected on validation data.
    sip: bool

    @property
    def planning(self) -> Planning: ...

    @property
    def plan(self) -> Plan | None: ...

    def plan_for(self, batch: int) -> Plan: ...

    def shuffle_state(self) -> torch.Tensor: ...

    def save(self) -> Path: ...

    def step(self, batch: Any) -> BatchReport: ...

    def begin_update(self, plan: Plan) -> None: ...

    def update(self, item: Batch, plan: Plan) -> BatchReport: ...
