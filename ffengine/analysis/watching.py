"""Watching training: callbacks that put numbers of every layer beside the loss.

    trainer.fit(train, valid, callbacks=[Separation(), DeadUnits(test)])

Each is a column a layer, NAME_LAYER, empty where there is nothing to say (a layer that is idle, or
trained end to end). `every=N` gives the numbers of every N-th step too, into steps.csv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch

from ffengine.analysis.responses import gather
from ffengine.analysis.sparsity import KINDS, sparsity, statistics
from ffengine.engine.batch import Batch
from ffengine.engine.context import BatchReport
from ffengine.engine.instructions import Place
from ffengine.engine.program import Instruction
from ffengine.engine.run.callbacks import Callback, Numbers
from ffengine.engine.run.evaluation import layer_accuracy, samples_of
from ffengine.engine.run.history import Row
from ffengine.engine.trainer import Trainer
from ffengine.nn.collaborative import CollaborativeNet
from ffengine.nn.network import LocalNet

#: "epoch": once an epoch; "step", or N: also at every step, or every N-th.
Every = Literal["epoch", "step"] | int
Columns = dict[str, "float | torch.Tensor | None"]
#: Instructions that are no layer's: of the batch, of heads, of the whole network.
NOT_OF_A_LAYER = {"encode", "states", "mean_of_frames", "head", "head_alone", "gram",
                  "update_labels", "backpropagate", "update_all"}


class Watcher(Callback):
    """Base of the watchers: an epoch's row has their numbers, steps.csv those of the steps due."""

    def __init__(self, every: Every = "epoch") -> None:
        self.every = steps_of(every)

    def due(self, trainer: Trainer) -> bool:
        """The step that has just been taken is one of those asked for."""
        return bool(self.every) and trainer.steps % self.every == 0


def steps_of(every: Every | str) -> int:
    """Steps from one row of steps.csv to the next; 0: none.

    Raises:
        ValueError: neither epoch, step nor a number of steps.
    """
    if every in ("epoch", "step"):
        return int(every == "step")
    if isinstance(every, bool) or not str(every).isdecimal() or int(every) < 1:
        raise ValueError(f"[watch] every expected epoch, step or a number of steps, got {every!r}")
    return int(every)


class StepMeans(Watcher):
    """Numbers that every step leaves: an epoch's row has their means over its steps.

    Of an epoch that was interrupted, the row has the means of the steps after it went on.
    """

    def __init__(self, every: Every = "epoch") -> None:
        super().__init__(every)
        self._sums: dict[str, tuple[float | torch.Tensor, int]] = {}

    def measure(self, trainer: Trainer, batch: Batch, report: BatchReport) -> Columns:
        """The step's numbers."""
        raise TypeError(f"[{type(self).__name__}] expected a watcher with a measure of its own")

    def on_step(self, trainer: Trainer, batch: Batch, report: BatchReport) -> Numbers | None:
        found = self.measure(trainer, batch, report)
        for name, value in found.items():
            total, count = self._sums.get(name, (0.0, 0))
            if value is not None:
                wide = value.double() if isinstance(value, torch.Tensor) else value
                total, count = total + wide, count + 1
            self._sums[name] = total, count
        return found if self.due(trainer) else None

    def on_epoch(self, trainer: Trainer, row: Row) -> Numbers:
        sums, self._sums = self._sums, {}
        return {name: total / count if count else None for name, (total, count) in sums.items()}


class Separation(StepMeans):
    """g_pos, g_neg: mean goodness of positive and negative rows, of the true class and of the
    others where layers have class groups; separation: their difference (Trifecta, app. A).

    As the samples passed in training. Losses that lower positive goodness (FFLib's L-) make it
    negative.
    """

    def measure(self, trainer: Trainer, batch: Batch, report: BatchReport) -> Columns:
        found: Columns = {}
        for i, g in enumerate(report.goodness):
            pos, neg = (None, None) if g is None else sides(trainer.net, i, g, batch.y)
            gap = None if pos is None or neg is None else pos - neg
            found |= {f"g_pos_{i}": pos, f"g_neg_{i}": neg, f"separation_{i}": gap}
        return found


def sides(net: LocalNet, i: int, g: torch.Tensor,
          y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean goodness of layer i's positive and negative sides, of g (N, K) or (2N, 1)."""
    if g.shape[1] > 1:
        own = g.gather(1, net.layer(i).labels(y)[:, None])[:, 0]
        return own.mean(), ((g.sum(1) - own) / (g.shape[1] - 1)).mean()
    if g.shape[0] == 2 * y.shape[0]:
        positive, negative = g.chunk(2)
        return positive.mean(), negative.mean()
    return g[y == 1].mean(), g[y == 0].mean()


class GradientNorm(StepMeans):
    """grad_norm: length of the gradient of all parameters of a layer, before weight decay and
    clipping; of a step that updates a layer several times, the root mean square."""

    def __init__(self, every: Every = "epoch") -> None:
        super().__init__(every)
        self._squares: dict[str, torch.Tensor] = {}
        self._updates: dict[str, int] = {}

    def on_gradient(self, name: str, gradient: torch.Tensor) -> None:
        length = gradient.double().square().sum()
        self._squares[name] = self._squares[name] + length if name in self._squares else length
        self._updates[name] = self._updates.get(name, 0) + 1

    def measure(self, trainer: Trainer, batch: Batch, report: BatchReport) -> Columns:
        squares, self._squares = self._squares, {}
        updates, self._updates = self._updates, {}
        found: Columns = {}
        for i in range(len(trainer.net.layers)):
            mine = [n for n in squares if n.startswith(f"layers.{i}.")]
            found[f"grad_norm_{i}"] = None if not mine else (
                torch.stack([squares[n] for n in mine]).sum() / max(updates[n] for n in mine)
            ).sqrt()
        return found


class LayerSeconds(StepMeans):
    """seconds: of a step's instructions that are a layer's, what profiles call its turn.

    Collaborative layers' passes below and above are the training layer's. None of layers trained
    end to end.
    """

    def __init__(self, every: Every = "epoch") -> None:
        super().__init__(every)
        self._spent: dict[int, float] = {}

    def on_instruction(self, at: Place, line: Instruction, seconds: float) -> None:
        if line.op not in NOT_OF_A_LAYER:
            self._spent[line.index] = self._spent.get(line.index, 0.0) + seconds

    def measure(self, trainer: Trainer, batch: Batch, report: BatchReport) -> Columns:
        spent, self._spent = self._spent, {}
        return {f"seconds_{i}": spent.get(i) for i in range(len(trainer.net.layers))}


class Standing(Watcher):
    """Numbers of the network as it stands after an epoch, or after a step that is due."""

    def measure(self, trainer: Trainer) -> Columns:
        """The network's numbers."""
        raise TypeError(f"[{type(self).__name__}] expected a watcher with a measure of its own")

    def on_step(self, trainer: Trainer, batch: Batch, report: BatchReport) -> Numbers | None:
        return self.measure(trainer) if self.due(trainer) else None

    def on_epoch(self, trainer: Trainer, row: Row) -> Numbers:
        return self.measure(trainer)


class LargestWeight(Standing):
    """max_weight: largest |w| of a layer's weight (Trifecta, fig. 6)."""

    def measure(self, trainer: Trainer) -> Columns:
        return {f"max_weight_{i}": w.abs().max() for i, w in weights(trainer.net)}


class WeightSparsity(Standing):
    """hoyer, l1, l2, gini of a layer's weight (FFLib, sec. 2.5, figs. 9 to 18)."""

    def measure(self, trainer: Trainer) -> Columns:
        return {f"{kind}_{i}": sparsity(w, kind) for i, w in weights(trainer.net)
                for kind in KINDS}


class WeightStatistics(Standing):
    """weight_min, weight_max, weight_mean, weight_sd (unbiased) of a layer (FFLib, table 4)."""

    def measure(self, trainer: Trainer) -> Columns:
        return {f"weight_{name}_{i}": value for i, w in weights(trainer.net)
                for name, value in zip(("min", "max", "mean", "sd"), statistics(w), strict=True)}


class Gamma(Standing):
    """gamma: what the other layers' goodness counts for a layer (collaborative FF)."""

    def on_fit(self, trainer: Trainer) -> None:
        if not isinstance(trainer.net, CollaborativeNet):
            raise ValueError("[watch] gamma expected a collaborative network (cff/adaptive, "
                             f"cff/fixed), got {type(trainer.net).__name__}")

    def measure(self, trainer: Trainer) -> Columns:
        assert isinstance(trainer.net, CollaborativeNet)
        return {f"gamma_{i}": g for i, g in enumerate(trainer.net.gamma.detach().clone().unbind())}


def weights(net: LocalNet) -> list[tuple[int, torch.Tensor]]:
    """(layer, weight) of all layers."""
    return [(i, net.layer(i).weight.detach()) for i in range(len(net.layers))]


class OnData(Standing):
    """Numbers of the network on data of its own.

    Args:
        loader: batches (x, y), gone through once a measurement.
    """

    def __init__(self, loader: Iterable[Any], every: Every = "epoch") -> None:
        super().__init__(every)
        self.loader = loader


class LayerAccuracy(OnData):
    """accuracy: of each layer's goodness alone, 0 to 1; every label is tried where the network is
    shown one. None of a layer trained on super-classes."""

    def measure(self, trainer: Trainer) -> Columns:
        found = layer_accuracy(trainer.net, samples_of(trainer, self.loader), trainer.backend)
        return {f"accuracy_{i}": a for i, a in enumerate(found)}


class LargestGoodness(OnData):
    """max_goodness: the largest of any sample and label (Trifecta, fig. 9)."""

    def measure(self, trainer: Trainer) -> Columns:
        best: list[torch.Tensor] = []
        for x, _ in samples_of(trainer, self.loader):
            with torch.no_grad():
                now = [g.max() for g in trainer.net.goodness(x, backend=trainer.backend)]
            best = [torch.maximum(a, b) for a, b in zip(best, now, strict=True)] if best else now
        return {f"max_goodness_{i}": g for i, g in enumerate(best)}


class DeadUnits(OnData):
    """inactive: mean share of a layer's activations that are 0 (DeeperForward, app. I, which
    compares networks of mean and of squared goodness by it); dead: units, or channels, that no
    sample activates. With the true label where the network is shown one. (A recurrent network's
    states decay and never reach 0.)"""

    def measure(self, trainer: Trainer) -> Columns:
        training = trainer.net.training
        sums = gather(trainer.net, samples_of(trainer, self.loader), label="true",
                      backend=trainer.backend)
        trainer.net.train(training)
        return {**{f"inactive_{i}": s.inactive() for i, s in enumerate(sums)},
                **{f"dead_{i}": s.dead() for i, s in enumerate(sums)}}


#: By the words of `ffengine train --watch`: of training itself, and on test data.
OF_TRAINING: dict[str, Callable[[Every], Callback]] = {
    "separation": Separation, "gradient": GradientNorm, "seconds": LayerSeconds,
    "weight": LargestWeight, "sparsity": WeightSparsity, "statistics": WeightStatistics,
    "gamma": Gamma}
ON_DATA: dict[str, Callable[[Iterable[Any], Every], Callback]] = {
    "accuracy": LayerAccuracy, "goodness": LargestGoodness, "dead": DeadUnits}


def watchers(words: Sequence[str], loader: Iterable[Any], every: Every = "epoch") -> list[Callback]:
    """The callbacks of these words.

    Raises:
        ValueError: an unknown word, or an `every` that is none.
    """
    check(words, every)
    return [OF_TRAINING[word](every) if word in OF_TRAINING else ON_DATA[word](loader, every)
            for word in dict.fromkeys(words)]


def check(words: Sequence[str], every: Every) -> None:
    """ValueError for a word that names no watcher, or an `every` that is none."""
    known = (*OF_TRAINING, *ON_DATA)
    steps_of(every)
    for word in words:
        if word not in known:
            raise ValueError(f"[watch] expected some of {', '.join(known)}, got {word!r}")
