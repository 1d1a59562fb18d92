"""Schedules: which layers' turn it is, and how a batch becomes their update.

A schedule is one small class; a network's builder names its own, and the trainer asks it for every
batch. `begin` ties it to a network and refuses one it cannot train.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ffengine.engine import label_channel
from ffengine.engine.batch import Batch
from ffengine.engine.compiling import Layers, compile_step
from ffengine.engine.context import BatchReport, StepContext, Turn
from ffengine.engine.execute import train_batch
from ffengine.engine.memory.plan import Plan
from ffengine.engine.parallel.cutting import Piece, staged
from ffengine.engine.program import Facts, Program
from ffengine.engine.schedules.overlap import compile_overlapping
from ffengine.engine.schedules.training import Budgeted, Training
from ffengine.nn.network import LocalNet
from ffengine.nn.recurrent import RecurrentNet
from ffengine.typed import typed

#: Programs that a schedule keeps: a phase has few, a run few batch sizes.
MOST_PROGRAMS = 64


class Schedule:
    """Every batch through all layers, each of which trains on it ("together")."""

    net: LocalNet
    epochs: int
    #: A loss trains the layer before its own too.
    crosses = False
    #: Epochs number the layers, so a run goes on with as many as it had.
    by_stages = False
    #: A checkpoint inside an epoch holds all that the epoch has gathered.
    resumes_within = True
    #: It trains networks whose layers see the layers above.
    recurrent = False

    #: The memory plan describes its steps.
    planned = True
    #: Its steps make a plan's segments and tiles; else whole batches go through all layers.
    tiles = True
    #: Updates of a parameter in a step.
    updates = 1
    #: The part of the network that this process trains, if others train the rest.
    piece: Piece | None = None
    #: One update a batch, whose gradient is a sum over samples: micro-batches may add it up.
    adds_up = True

    def begin(self, net: LocalNet, epochs: int) -> None:
        """Tie the schedule to a network and to the recipe's epochs; ValueError if it cannot."""
        if label_channel.learned(net) is not None and (
                net.input_norm != "none" or net.wires[0].pool_before):
            before = "a pool" if net.input_norm == "none" else f"input_norm={net.input_norm}"
            raise ValueError("[schedule] a learned label channel expected input_norm=none and no "
                             f"pool before the first layer, got {before}")
        if isinstance(net, RecurrentNet) and not self.recurrent:
            raise ValueError("[schedule] a RecurrentNet expected recurrent training, got "
                             f"{type(self).__name__}")
        self.net, self.epochs = net, epochs
        self.__dict__.pop("_programs", None)
        turn = self.turn(0, 0).layers
        if turn and not any(p.requires_grad for i in turn for p in net.layer(i).parameters()):
            raise ValueError(f"[schedule] {type(self).__name__} expected layers that train, got "
                             f"layer {turn[0]} frozen (requires_grad=False)")

    def of(self, piece: Piece | None) -> Schedule:
        """The same schedule of a piece of the network, or of all of it."""
        made = copy.copy(self)
        made.piece = piece
        made.__dict__.pop("_programs", None)
        return made

    @property
    def total(self) -> int:
        """Epochs of the whole run; the recipe's count per layer in layer-wise schedules."""
        return self.epochs

    def turn(self, epoch: int, iteration: int) -> Turn:
        """Whose turn it is on this batch."""
        depth = len(self.net.layers)
        return Turn(tuple(range(depth)), depth, heads=tuple(range(len(self.net.heads))))

    def phase(self, epoch: int) -> int:
        """What an epoch holds in memory changes with this number."""
        return 0

    def stored_shape(self, phase: int) -> tuple[int, ...]:
        """Per-sample shape of the features that a phase may read in place of samples."""
        return self.net.shapes[phase]

    def rate_epoch(self, epoch: int) -> int:
        """The epoch whose learning rate holds."""
        return epoch

    def active(self, epoch: int) -> list[str]:
        """Names of the parameters that train in this epoch: who has optimizer states."""
        return [n for n, p in self.net.named_parameters()
                if p.requires_grad and (self.piece is None or self.piece.holds(n))]

    def phases(self) -> list[list[str]]:
        """Names of the parameters that have optimizer states, phase by phase."""
        return [self.active(0)]

    def owners(self) -> dict[str, tuple[str, ...]]:
        """Further owners of a parameter, each with an optimizer state of its own."""
        return {}

    def train(self, ctx: StepContext, item: Batch, plan: Plan, dtype: torch.dtype) -> BatchReport:
        """Train on the batch the layers of `ctx.turn`."""
        return train_batch(ctx, item, plan, dtype, self.program)

    @property
    def writer(self) -> type[Layers]:
        """Writes the instructions of its layers."""
        return Layers

    def program(self, net: LocalNet, plan: Plan, facts: Facts) -> Program:
        """A step as instructions; the same ones as long as `begin` is not called again."""
        made: dict[tuple[Plan, Facts], Program] = self.__dict__.setdefault("_programs", {})
        if (plan, facts) not in made:
            if len(made) >= MOST_PROGRAMS:
                made.clear()
            program = self.compile(net, plan, facts)
            made[plan, facts] = program if self.piece is None else staged(
                program, net, facts, self.piece)
        return made[plan, facts]

    def compile(self, net: LocalNet, plan: Plan, facts: Facts) -> Program:
        """Write the instructions of a step."""
        return compile_step(net, plan, facts, self.writer)

    def expect(self, planning: Budgeted, samples: int, batch_size: int, shuffle: bool,
               folder: Path | None = None) -> None:
        """Tell the plans which features of a set of so many samples the phases will keep.

        Args:
            batch_size: of training.
            shuffle: the loader draws another order each epoch.
            folder: where features that RAM has no room for would lie.
        """

    def loader(self, run: Training, loader: Any, epoch: int) -> Any:
        """What an epoch reads: the caller's loader, or features of it."""
        return loader

    def epoch_done(self, epoch: int, accuracy: float) -> bool:
        """Told each epoch's training accuracy; True ends training here."""
        return False


class Together(Schedule):
    """Every batch goes through all layers, and each of them trains on it.

    Args:
        heads_from: share of the epochs after which the heads train too; with `heads_alone` the
            layers then rest (FFNN+C: the second half, layers frozen).
    """

    @typed("schedule")
    def __init__(self, heads_from: float = 0.0, heads_alone: bool = False) -> None:
        if not 0 <= heads_from <= 1:
            raise ValueError(f"[schedule] heads_from expected a share in [0, 1], got {heads_from}")
        self.heads_from, self.heads_alone = heads_from, heads_alone

    def phase(self, epoch: int) -> int:
        return int(epoch >= self.heads_from * self.epochs)

    def turn(self, epoch: int, iteration: int) -> Turn:
        whole = super().turn(epoch, iteration)
        if epoch < self.heads_from * self.epochs:
            return Turn(whole.layers, whole.depth)
        if self.heads_alone and whole.heads:
            return Turn((), 0, heads=whole.heads)
        return whole


class Interleaved(Schedule):
    """Layer i trains in epochs [start, end) of its span, the heads in the last span (CwComp's ILT).

    Layers that rest still pass the batch on, with its batch statistics.

    Args:
        spans: (start, end) per layer, then one for the heads; `end` of the heads is not used.
    """

    @typed("schedule")
    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        self.spans = tuple((int(a), int(b)) for a, b in spans)
        bad = [s for s in self.spans if not 0 <= s[0] <= s[1]]
        if bad:
            raise ValueError(f"[schedule] a span expected 0 <= start <= end, got {bad[0]}")

    def begin(self, net: LocalNet, epochs: int) -> None:
        expected = len(net.layers) + bool(len(net.heads))
        if len(self.spans) != expected:
            raise ValueError(f"[schedule] interleaved training expected {expected} spans (one a "
                             f"layer, then the heads'), got {len(self.spans)}")
        super().begin(net, epochs)

    def phase(self, epoch: int) -> int:
        return sum(epoch >= bound for span in self.spans for bound in span)

    def turn(self, epoch: int, iteration: int) -> Turn:
        depth = len(self.net.layers)
        layers = tuple(i for i in range(depth) if self.spans[i][0] <= epoch < self.spans[i][1])
        heads = tuple(range(len(self.net.heads))) if (
            len(self.spans) > depth and epoch >= self.spans[-1][0]) else ()
        return Turn(layers, depth, heads=heads)


class Overlapping(Schedule):
    """Overlapping local updates (Trifecta): a loss crosses one boundary and trains two layers.

    Args:
        alternate: "batch": even batches take the loss at layers 1, 3, 5, ..., odd ones at 0, 2, 4
            (the published code); "epoch": the same by epochs (the paper's approach 1); "both":
            every layer takes its loss at every step (approach 2).
    """

    @typed("schedule")
    def __init__(self, alternate: Literal["batch", "epoch", "both"] = "batch") -> None:
        if alternate not in ("batch", "epoch", "both"):
            raise ValueError("[schedule] overlapping updates expected alternate=batch, epoch or "
                             f"both, got {alternate!r}")
        self.alternate = alternate

    crosses = True
    tiles = False

    def begin(self, net: LocalNet, epochs: int) -> None:
        if len(net.layers) < 2:
            raise ValueError("[schedule] overlapping updates expected 2 layers or more, got "
                             f"{len(net.layers)}")
        for i in range(len(net.layers)):
            layer, wire = net.layer(i), net.wires[i]
            if (layer.batch_coupling is not None or layer.config.norm.kind != "none"
                    or layer.dropout or wire.pool_before or wire.join == "concat"):
                raise ValueError(
                    "[schedule] overlapping updates expected layers normalised at their input "
                    f"only, without dropout, pools before or concatenation; layer {i} is not")
        if net.propagate != "stale":
            raise ValueError("[schedule] overlapping updates expected propagate=stale, got "
                             f"{net.propagate}")
        super().begin(net, epochs)

    def turn(self, epoch: int, iteration: int) -> Turn:
        depth = len(self.net.layers)
        odd = (epoch if self.alternate == "epoch" else iteration) % 2
        layers = range(depth) if self.alternate == "both" else range(1 - odd, depth, 2)
        return Turn(tuple(layers), depth, heads=tuple(range(len(self.net.heads))))

    def owners(self) -> dict[str, tuple[str, ...]]:
        last = f"layers.{len(self.net.layers) - 1}."
        return {n: ("next",) for n, _ in self.net.layers.named_parameters(prefix="layers")
                if not n.startswith(last)}

    def compile(self, net: LocalNet, plan: Plan, facts: Facts) -> Program:
        return compile_overlapping(net, facts)


def of(net: LocalNet, given: Schedule | None) -> Schedule:
    """The schedule a run uses: the caller's, else the network's own, else together."""
    schedule: Any = given or net.schedule or Together()
    return schedule  # type: ignore[no-any-return]
