"""Growing while training: after an epoch sets grow and degenerate, within a number of parameters.

    evolving = Evolving(trainer, train_loader, valid_loader, parameters=50_000)
    trainer.fit(train_loader, valid_loader)
    evolving.attempts                     # what was tried, and what was kept
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ffengine.adapt.growth import Degeneration, Growth, degenerate, grow, growing
from ffengine.adapt.record import Edit
from ffengine.adapt.responses import sets_of, survey
from ffengine.adapt.training import reshape
from ffengine.engine.evaluation import class_accuracy, samples_of
from ffengine.engine.history import Row
from ffengine.engine.trainer import Trainer
from ffengine.nn.network import LocalNet

CLONE, WEAKEST = Growth(), Degeneration(lowest=1)


@dataclass(frozen=True)
class Attempt:
    """One edit that was tried: accuracies (0-1) on validation data and parameters with it."""

    epoch: int
    kind: str
    layer: int
    before: float
    after: float
    parameters: int
    kept: bool


class Evolving:
    """A trainer's `after_epoch`: tries a growth, then a degeneration, and keeps what does not lower
    the accuracy on validation data (of the layer in training where layers train in turn, else of
    the network).

    Args:
        trainer: not at work; an `after_epoch` that it has is called first.
        train, valid: loaders of (x, y), the same batches whenever iterated.
        parameters: the most that the network may have; a growth past it is not tried.
        growth, degeneration: how; None: not at all.
        every: epochs between attempts.
        layer: default is the last one in training that the scores read.

    Raises:
        ValueError: a network of more parameters already, or a layer without a set for each class.
    """

    def __init__(self, trainer: Trainer, train: Iterable[Any], valid: Iterable[Any], *,
                 parameters: int, growth: Growth | None = CLONE,
                 degeneration: Degeneration | None = WEAKEST, every: int = 1,
                 layer: int | None = None) -> None:
        held = count_of(trainer.net)
        if held > parameters or every < 1:
            raise ValueError(f"[evolving] expected at least the network's {held} parameters and "
                             f"every >= 1, got parameters={parameters} every={every}")
        sets_of(trainer.net, len(trainer.net.layers) - 1 if layer is None else layer)
        self.trainer, self.train, self.valid = trainer, train, valid
        self.parameters, self.growth, self.degeneration = parameters, growth, degeneration
        self.every, self.layer = every, layer
        self.attempts: list[Attempt] = []
        self._first: Callable[[Row], None] | None = trainer.after_epoch
        trainer.after_epoch = self

    def __call__(self, row: Row) -> None:
        if self._first is not None:
            self._first(row)
        layer = self._layer(row.epoch)
        if (row.epoch + 1) % self.every or layer is None:
            return
        kept = [self._try(row.epoch, "grow", layer, self._grown),
                self._try(row.epoch, "degenerate", layer, self._degenerated)]
        if any(kept) and self.trainer.out is not None:
            self.trainer.save()

    def _layer(self, epoch: int) -> int | None:
        if self.layer is not None:
            return self.layer
        trained = self.trainer.schedule.turn(epoch, 0).layers
        read = [i for i in trained if i <= self.trainer.net.layer_range[1]]
        return max(read or trained, default=None)

    def _try(self, epoch: int, kind: str, layer: int,
             make: Callable[[int, list[float | None]], tuple[LocalNet, Edit] | None]) -> bool:
        """Make an edit of a copy, and in the trainer if it is worth it."""
        before, by_class = self._judged(self.trainer.net, layer)
        made = make(layer, by_class)
        if made is None:
            return False
        net, edit = made
        after = self._judged(net, layer)[0]
        self.attempts.append(Attempt(epoch, kind, layer, before, after, count_of(net),
                                     after >= before))
        if after < before:
            return False
        reshape(self.trainer, edit)
        self.trainer.notes["edits"] = [*self.trainer.notes.get("edits", []),
                                       {"kind": kind, "epoch": epoch, **edit.summary()}]
        return True

    def _judged(self, net: LocalNet, layer: int) -> tuple[float, list[float | None]]:
        samples = samples_of(self.trainer, self.valid)
        if not self.trainer.schedule.by_stages:
            return class_accuracy(net, samples, self.trainer.backend)
        seen = survey(net, layer, samples, self.trainer.backend)  # layers above have not trained
        return float(seen.right.double().mean()), seen.accuracy()

    def _grown(self, layer: int, by_class: list[float | None]) -> tuple[LocalNet, Edit] | None:
        weak = [] if self.growth is None else growing(by_class, self.growth)
        if not weak or self.growth is None:
            return None
        made = grow(self.trainer.net, layer, weak[0], samples_of(self.trainer, self.train),
                    self.growth, backend=self.trainer.backend)
        return made if count_of(made[0]) <= self.parameters else None

    def _degenerated(self, layer: int, by_class: list[float | None],
                     ) -> tuple[LocalNet, Edit] | None:
        if self.degeneration is None:
            return None
        net, edit = degenerate(self.trainer.net, layer, samples_of(self.trainer, self.train),
                               self.degeneration, backend=self.trainer.backend)
        return None if edit is None else (net, edit)


def count_of(net: LocalNet) -> int:
    """Parameters of a network."""
    return sum(p.numel() for p in net.parameters())
