"""What a step carries from layer to layer, whose turn it is, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ffengine.engine.accumulator import Accumulation, GradientAccumulator
from ffengine.engine.batch import joined
from ffengine.engine.optim import LocalOptimizer
from ffengine.nn.network import LocalNet
from ffengine.ops.config import LocalPassConfig, Tile
from ffengine.ops.optim import Parameter


@dataclass(frozen=True)
class Turn:
    """Whose turn it is on a batch.

    layers: take their loss and train. depth: layers the batch passes. start: the first layer that
    is not frozen; those below it pass the batch on as in evaluation. heads: that train.
    """

    layers: tuple[int, ...]
    depth: int
    start: int = 0
    heads: tuple[int, ...] = ()


@dataclass
class BatchReport:
    """What one step leaves, still on the device: see Trainer.step."""

    #: Mean local loss per layer, None where the layer was idle.
    losses: list[torch.Tensor | None]
    #: Goodness (N, K) per layer, None where idle; (2N, 1), positives first, for pos/neg networks.
    goodness: list[torch.Tensor | None]
    #: Per head (mean loss, logits (N, K)), None where idle.
    heads: list[tuple[torch.Tensor, torch.Tensor] | None] = field(default_factory=list)
    #: Loss per row, or per pair, of each layer.
    row_losses: list[torch.Tensor | None] = field(default_factory=list)
    #: What a layer adds to its loss beside the rows' (peer normalisation).
    penalties: dict[int, torch.Tensor] = field(default_factory=dict)
    #: Class scores (N, classes) of the samples, where the step made them itself.
    scores: torch.Tensor | None = None

    @property
    def mean_losses(self) -> list[torch.Tensor | None]:
        """Of the layers, then of the heads."""
        return [*self.losses, *(made and made[0] for made in self.heads)]


class GradientRoom(Protocol):
    """Tensors that updates write their gradients into."""

    def get(self, key: tuple[int | str, str], /) -> torch.Tensor | None:
        """Of (layer index or owner, parameter); None: nobody wants it."""


@dataclass
class StepContext:
    """One step's fixed facts, and what it has gathered so far."""

    net: LocalNet
    optimizer: LocalOptimizer
    #: Labels; `entrance` makes them the layers' targets, 1 and 0 for positive and negative rows.
    y: torch.Tensor
    #: Rows in all.
    batch: int
    seed: int = 0
    step: int = 0
    backend: str = "auto"
    turn: Turn | None = None
    #: Columns in which the negative half of the entering rows differs from the positive one.
    differ: slice | None = None
    #: Labels of the positive and of the negative half, where they train a label channel.
    labels: tuple[torch.Tensor, torch.Tensor] | None = None
    #: Where the gradients of a batch's micro-batches add up.
    sums: GradientAccumulator | None = None
    #: int32 (1,) on the device, the step of dropout's masks, where kernels read it from memory.
    clock: torch.Tensor | None = None
    #: Told of every instruction that has run: where, and which.
    hook: Callable[[Any, Any], None] | None = None
    #: Takes what a stage of a pipeline hands on: maps by their names, goodness by layer.
    send: Callable[[dict[str, torch.Tensor], dict[int, torch.Tensor]], None] | None = None
    #: Handed gradients by layer index and parameter, when somebody asks for them.
    grads: GradientRoom | None = None
    loss_rows: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    #: Of layers whose mean loss is not that of `loss_rows`.
    loss_sum: dict[int, torch.Tensor] = field(default_factory=dict)
    goodness: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    #: A tile's rows are of both halves.
    halves: bool = False
    coef: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    penalties: dict[int, torch.Tensor] = field(default_factory=dict)
    #: Class scores of the samples, where the step makes them itself.
    scores: torch.Tensor | None = None
    #: Of the heads that have trained, (mean loss, logits).
    head_results: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def whose(self) -> Turn:
        """The turn; by default everybody's."""
        if self.turn is None:
            depth = len(self.net.layers)
            self.turn = Turn(tuple(range(depth)), depth)
        return self.turn

    def grad_of(self, i: int | str, name: str) -> torch.Tensor | None:
        return None if self.grads is None else self.grads.get((i, name))

    def parameter(self, i: int | str, name: str, value: nn.Parameter | None, owner: str = "",
                  accumulate: torch.Tensor | None = None) -> Parameter | None:
        """A parameter of layer i, or of what i names, as the ops take it; None of one that is not
        there, or frozen."""
        if value is None or not value.requires_grad:
            return None
        return Parameter(value.detach(), self.optimizer.state_of(value, owner), accumulate,
                         self.grad_of(i, name))

    def adding(self, parameter: torch.Tensor | None, owner: str = "") -> Accumulation:
        """Where a parameter's gradient goes: by default it is all there is of it."""
        if self.sums is None or parameter is None:
            return Accumulation()
        total = self.sums.of(parameter, owner) if parameter.requires_grad else None
        return Accumulation(total, self.sums.last, self.sums.share)

    def half(self, i: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Layer i's weight in 16 bits, where a copy is kept."""
        return self.optimizer.half_of(self.net.layer(i).weight, dtype)

    def dropout(self, i: int) -> tuple[LocalPassConfig, torch.Tensor | None]:
        """(settings of layer i's sweep in this step, where its kernels read dropout's step)."""
        layer, clock = self.net.layer(i), self.clock
        if layer.dropout == 0.0 or clock is None:
            return layer.settings(self.seed, i, self.step), None
        return layer.settings(self.seed, i, 0), clock

    def targets(self, i: int, tile: Tile, n: int) -> torch.Tensor:
        """What layer i is trained towards, of the tile's n rows."""
        start, half, other = tile.layout(n)
        y = self.y[start:start + n]
        if half < n and other != start + half:  # rows of both halves, apart in the batch
            y = torch.cat([self.y[start:start + half], self.y[other:other + half]])
        return self.net.layer(i).labels(y)

    def note(self, i: int, loss: torch.Tensor, g: torch.Tensor, halves: bool = False) -> None:
        """Keep a tile's losses and goodness; `halves`: of rows of both halves, positives first."""
        self.goodness.setdefault(i, []).append(g)
        self.loss_rows.setdefault(i, []).append(loss)
        self.halves = halves

    def report(self) -> BatchReport:
        """What the step leaves."""
        layers, results = range(len(self.net.layers)), self.head_results
        # a pair's loss is one value for both halves
        rows = {i: joined(tiles, self.halves and tiles[0].shape == self.goodness[i][0].shape[:1])
                for i, tiles in self.loss_rows.items()}
        losses = {**means(rows), **self.loss_sum}
        return BatchReport(
            losses=[losses.get(i) for i in layers],
            goodness=[joined(self.goodness.pop(i), self.halves) if i in self.goodness else None
                      for i in layers],
            heads=[results.get(h) for h in range(len(self.net.heads))],
            row_losses=[rows.get(i) for i in layers], penalties=self.penalties, scores=self.scores)


def means(rows: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The mean of every layer's row losses; layers of one length in one reduction."""
    found: dict[int, torch.Tensor] = {}
    for size in {len(r) for r in rows.values()}:
        alike = [i for i, r in rows.items() if len(r) == size]
        found |= zip(alike, torch.stack([rows[i] for i in alike]).mean(1).unbind(), strict=True)
    return found
