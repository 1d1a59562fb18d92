"""A training step recorded once as a CUDA graph and replayed: the host's time leaves the step.

Launches keep the arguments they were recorded with. What changes from step to step lies in memory:
samples and labels in buffers of the captured step's own, rates, step numbers and dropout's step in
the trainer's table (ffengine.engine.clock). Not run on a GPU yet.
"""

from __future__ import annotations

import logging

import torch

from ffengine.engine.batch import Batch, checked, label_count, paired
from ffengine.engine.context import BatchReport
from ffengine.engine.run.state import TrainingRun
from ffengine.engine.schedules.backprop import Backprop
from ffengine.nn.recurrent import RecurrentNet
from ffengine.ops import backends
from ffengine.ops.config import Loss

log = logging.getLogger("ffengine")
#: Ordinary steps before the recording: kernels are compiled and constants lie on the device.
WARM = 2


def why_not(trainer: TrainingRun) -> str | None:
    """None if the trainer's present step can be recorded, else the reason it cannot."""
    net, schedule = trainer.net, trainer.schedule
    turns = [schedule.turn(trainer.epoch, i) for i in (trainer.iteration, trainer.iteration + 1)]
    name = backends.resolve("capture", trainer.backend, trainer.device.type, trainer.dtype)
    if trainer.device.type != "cuda":
        return f"the network is on {trainer.device.type}, not on a GPU"
    if name == "reference" or isinstance(schedule, Backprop):
        return "the reference's steps take their numbers from the host"
    if trainer.micro_batch is not None or turns[0] != turns[1]:
        return "not every batch takes the same step"
    if isinstance(net, RecurrentNet) or (paired(net) and net.negatives != "inverse"):
        return "the host draws a part of every batch"
    if any(not isinstance(net.layer(i).config.loss, Loss) for i in range(len(net.layers))):
        return "a loss written in Python may read numbers on the host"
    return None


class CapturedStep:
    """`replay = trainer.capture(x, y)`; `replay(x, y)` is a step on that batch, `replay()` one more
    on the last.

    What a report holds is overwritten by the next replay.

    Attributes:
        reason: why the step is an ordinary one after all; None where it was captured.
    """

    def __init__(self, trainer: TrainingRun, x: torch.Tensor, y: torch.Tensor) -> None:
        self.trainer, self.reason = trainer, why_not(trainer)
        self.item = checked(Batch(x, y), trainer.net, trainer.device)
        if self.reason is not None:
            log.warning("[capture] every step is an ordinary one: %s", self.reason)
            return
        self.item = Batch(self.item.x.clone(), self.item.y.clone())
        for _ in range(WARM):
            trainer.step(self.item)
        self._turn = trainer.schedule.turn(trainer.epoch, trainer.iteration)
        self._states = list(trainer.optimizer.states.values())
        before = [s.step for s in self._states]
        self._plan = trainer.planning.plans(self.item.y.shape[0]).at(trainer.epoch)
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(trainer.device)
        with torch.cuda.graph(self._graph):
            self._report = trainer.update(self.item, self._plan)
            self._flags = trainer.finite.flags(self.item.x, self.item.y, label_count(trainer.net),
                                              self._report.mean_losses, trainer.dtype)
        self._taken = [s.step - n for s, n in zip(self._states, before, strict=True)]
        for state, n in zip(self._states, before, strict=True):
            state.step = n  # recorded, not taken

    def __call__(self, x: torch.Tensor | None = None,
                 y: torch.Tensor | None = None) -> BatchReport:
        """One step.

        Raises:
            ValueError: another shape than was recorded, or another turn or optimizer by now.
            TrainingStopped: as Trainer.step.
        """
        if x is not None and y is not None:
            self._take(checked(Batch(x, y), self.trainer.net, self.trainer.device))
        if self.reason is not None:
            return self.trainer.step(self.item)
        return self._replay()

    def _take(self, item: Batch) -> None:
        if self.reason is not None:
            self.item = item
            return
        if item.x.shape != self.item.x.shape:
            raise ValueError(f"[capture] expected samples of shape {tuple(self.item.x.shape)}, as "
                             f"recorded, got {tuple(item.x.shape)}")
        self.item.x.copy_(item.x)
        self.item.y.copy_(item.y)

    def _replay(self) -> BatchReport:
        t = self.trainer
        if t.optimizer.changed():
            t.optimizer.activate(t.schedule.active(t.epoch))  # other states: refused below
        same = self._turn == t.schedule.turn(t.epoch, t.iteration)
        mine = t.optimizer.states.values()
        if not same or [id(s) for s in mine] != [id(s) for s in self._states]:
            raise ValueError("[capture] expected the turn and the optimizer states that were "
                             f"recorded, got others at epoch {t.epoch}: capture the step again")
        t.begin_update(self._plan)
        t.optimizer.refresh_halves()  # somebody may have edited a weight
        self._graph.replay()
        for state, taken in zip(self._states, self._taken, strict=True):
            state.step += taken
        t.finite.note(self._flags.clone(), self._report.mean_losses, t.epoch, t.steps, False)
        t.steps += 1
        t.iteration += 1
        return self._report
