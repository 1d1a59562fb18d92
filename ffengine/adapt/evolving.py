"""Growing while training: after an epoch sets grow and degenerate, within a number of parameters.

    evolving = Evolving(train_loader, valid_loader, parameters=50_000)
    trainer.fit(train_loader, valid_loader, callbacks=[evolving])
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
from ffengine.engine.run.callbacks import Callback, Numbers
from ffengine.engine.run.evaluation import class_accuracy, samples_of
from ffengine.engine.run.history import Row
from ffengine.engine.trainer import Trainer
from ffengine.nn.network import LocalNet

#: A network, and how it was made.
Made = tuple[LocalNet, Edit] | None
#: From the trainer, a layer, and the accuracy of every class.
Make = Callable[[Trainer, int, list[float | None]], Made]
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


class Evolving(Callback):
    """A callback that tries a growth, then a degeneration, and keeps what does not lower the
    accuracy on validation data (of the layer in training where layers train in turn, else of the
    network). The history has the network's parameters after each epoch.

    Args:
        train, valid: loaders of (x, y), the same batches whenever iterated.
        parameters: the most that the network may have; a growth past it is not tried.
        growth, degeneration: how; None: not at all.
        every: epochs between attempts.
        layer: default is the last one in training that the scores read.

    Raises:
        ValueError: when training begins: a network of more parameters already, or a layer without a
            set for each class.
    """

    def __init__(self, train: Iterable[Any], valid: Iterable[Any], *, parameters: int,
                 growth: Growth | None = CLONE, degeneration: Degeneration | None = WEAKEST,
                 every: int = 1, layer: int | None = None) -> None:
        if every < 1:
            raise ValueError(f"[evolving] every expected 1 epoch or more, got {every}")
        self.train, self.valid = train, valid
        self.parameters, self.growth, self.degeneration = parameters, growth, degeneration
        self.every, self.layer = every, layer
        self.attempts: list[Attempt] = []

    def on_fit(self, trainer: Trainer) -> None:
        held = count_of(trainer.net)
        if held > self.parameters:
            raise ValueError(f"[evolving] parameters expected at least the network's {held}, got "
                             f"{self.parameters}")
        sets_of(trainer.net, len(trainer.net.layers) - 1 if self.layer is None else self.layer)

    def on_epoch(self, trainer: Trainer, row: Row) -> Numbers:
        layer = self._layer(trainer, row.epoch)
        if (row.epoch + 1) % self.every == 0 and layer is not None:
            self._try(trainer, row.epoch, "grow", layer, self._grown)
            self._try(trainer, row.epoch, "degenerate", layer, self._degenerated)
        return {"parameters": count_of(trainer.net)}

    def _layer(self, trainer: Trainer, epoch: int) -> int | None:
        if self.layer is not None:
            return self.layer
        trained = trainer.schedule.turn(epoch, 0).layers
        read = [i for i in trained if i <= trainer.net.layer_range[1]]
        return max(read or trained, default=None)

    def _try(self, trainer: Trainer, epoch: int, kind: str, layer: int, make: Make) -> None:
        """Make an edit of a copy, and in the trainer if it is worth it."""
        before, by_class = self._judged(trainer, trainer.net, layer)
        made = make(trainer, layer, by_class)
        if made is None:
            return
        net, edit = made
        after = self._judged(trainer, net, layer)[0]
        self.attempts.append(Attempt(epoch, kind, layer, before, after, count_of(net),
                                     after >= before))
        if after < before:
            return
        reshape(trainer, edit)
        trainer.notes["edits"] = [*trainer.notes.get("edits", []),
                                  {"kind": kind, "epoch": epoch, **edit.summary()}]

    def _judged(self, trainer: Trainer, net: LocalNet,
                layer: int) -> tuple[float, list[float | None]]:
        samples = samples_of(trainer, self.valid)
        if not trainer.schedule.by_stages:
            return class_accuracy(net, samples, trainer.backend)
        seen = survey(net, layer, samples, trainer.backend)  # layers above have not trained
        return float(seen.right.double().mean()), seen.accuracy()

    def _grown(self, trainer: Trainer, layer: int, by_class: list[float | None]) -> Made:
        weak = [] if self.growth is None else growing(by_class, self.growth)
        if not weak or self.growth is None:
            return None
        made = grow(trainer.net, layer, weak[0], samples_of(trainer, self.train),
                    self.growth, backend=trainer.backend)
        return made if count_of(made[0]) <= self.parameters else None

    def _degenerated(self, trainer: Trainer, layer: int, by_class: list[float | None]) -> Made:
        if self.degeneration is None:
            return None
        net, edit = degenerate(trainer.net, layer, samples_of(trainer, self.train),
                               self.degeneration, backend=trainer.backend)
        return None if edit is None else (net, edit)


def count_of(net: LocalNet) -> int:
    """Parameters of a network."""
    return sum(p.numel() for p in net.parameters())
