"""CaFo's schedule: fixed random blocks, each with its own linear predictor, one after the other."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import torch

from ffengine.engine import heads
from ffengine.engine.batch import Batch, as_batch, batches_from
from ffengine.engine.context import Turn
from ffengine.engine.memory.plan import Plan
from ffengine.engine.program import Facts, Instruction, Program, finished
from ffengine.engine.schedules.layerwise import Features, Layerwise
from ffengine.engine.schedules.training import Training
from ffengine.nn.network import LocalNet
from ffengine.ops.config import BatchNorm
from ffengine.typed import typed


class Cascade(Layerwise):
    """Predictor i trains on the features of block i for its epochs, then predictor i + 1.

    Before a predictor starts, its block's running statistics are set to those of the training set.

    Args:
        closed_form: predictors are the least-squares solution of one pass, W = (X'X)^-1 X'Y,
            instead of gradient descent.
        features: where a block's features are kept, as in Layerwise.
    """

    @typed("schedule")
    def __init__(self, closed_form: bool = False, features: Features = "auto") -> None:
        super().__init__(features=features)
        self.closed_form = closed_form

    def begin(self, net: LocalNet, epochs: int) -> None:
        if len(net.heads) != len(net.layers):
            raise ValueError("[schedule] a cascade expected one predictor a block "
                             f"({len(net.layers)}), got {len(net.heads)}")
        super().begin(net, 1 if self.closed_form else epochs)

    @property
    def resumes_within(self) -> bool:  # type: ignore[override]
        return not self.closed_form

    @property
    def stages(self) -> int:
        return len(self.net.heads)

    def turn(self, epoch: int, iteration: int) -> Turn:
        return Turn((), 0, heads=(self.stage(epoch),))

    def active(self, epoch: int) -> list[str]:
        prefix = f"heads.{self.stage(epoch)}."
        return [n for n, _ in self.net.named_parameters() if n.startswith(prefix)]

    def compile(self, net: LocalNet, plan: Plan, facts: Facts) -> Program:
        if not self.closed_form:
            return super().compile(net, plan, facts)
        return finished([Instruction("gram", h, (("batch", "batch"),))
                         for h in facts.turn.heads], facts)

    def solve(self, epoch: int) -> None:
        """Set the stage's predictor to the least-squares solution of what it has seen."""
        head = heads.of(self.net, self.stage(epoch))
        if head.gram is None:
            raise ValueError("[schedule] a closed-form predictor expected at least one batch, "
                             "got none")
        (gram, cross), head.gram = head.gram, None
        # features that are constant leave the system singular: the least-norm solution then
        solution = torch.linalg.lstsq(gram.cpu(), cross.cpu(), driver="gelsd").solution
        if head.weight.requires_grad:
            with torch.no_grad():
                head.weight.copy_(solution.t())

    def epoch_done(self, epoch: int, accuracy: float) -> bool:
        if self.closed_form:
            self.solve(epoch)
        return False

    def stage_started(self, run: Training, loader: Any, epoch: int) -> None:
        """The block's running statistics become the cumulative average over the training set."""
        net, index = run.net, self.stage(epoch)
        coupling = net.layer(index).batch_coupling
        if net.batch_statistics or not isinstance(coupling, BatchNorm):
            return
        with torch.no_grad():
            for count, item in enumerate(batches_from(loader, epoch, 0), 1):
                x = net.prepare(as_batch(item, None).x.to(run.device, run.dtype))
                if index:
                    last: deque[torch.Tensor] = deque(maxlen=1)
                    net.run(x, end=index - 1, backend=run.backend, features=last)
                    x = last.pop()
                net.layer(index).batch_coupling = replace(coupling, momentum=1.0 / count)
                net.layer(index).infer(net.transform(index, x), want_z=False, training=True,
                                       backend=run.backend)
        net.layer(index).batch_coupling = coupling

    def keeps_input(self, stage: int, shuffle: bool) -> bool:
        return not self.net.batch_statistics and self.features != "recompute"

    def stored_shape(self, phase: int) -> tuple[int, ...]:
        return (heads.of(self.net, phase).weight.shape[1],)

    def stored_rows(self, run: Training, stage: int, batch: Batch) -> tuple[torch.Tensor,
                                                                             torch.Tensor | None]:
        head = heads.of(self.net, stage)
        return self.net.head_features(head, batch.x.to(run.dtype),
                                      backend=run.backend), None
