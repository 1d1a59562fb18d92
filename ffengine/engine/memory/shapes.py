"""What a network holds, layer by layer and around its segments: the planner's only input."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace

import torch

from ffengine.engine import label_channel
from ffengine.engine.batch import paired
from ffengine.engine.compiling import joining
from ffengine.engine.memory.dry_run import DryRun
from ffengine.engine.memory.plan import Arriving, Entrance, TurnBytes, one_tile
from ffengine.engine.program import Mode
from ffengine.engine.schedules.schedule import Schedule, of
from ffengine.nn.chain import halved
from ffengine.nn.layers import LocalLayer
from ffengine.nn.network import LocalNet
from ffengine.nn.recurrent import RecurrentNet
from ffengine.ops.config import Loss
from ffengine.ops.optimizer_step import step_dtype
from ffengine.ops.weight_update import OptimConfig


@dataclass(frozen=True)
class LayerSizes:
    """One layer's maps, in bytes per sample, its weight and its arithmetic."""

    x_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    x_bytes: int  # arriving map
    transform_bytes: int  # what stands before the layer allocates; 0: the map itself
    a_bytes: int  # pre-activation
    out_bytes: int  # after the join
    shortcut_in_shape: tuple[int, ...] | None
    shortcut_in_bytes: int
    shortcut_in_is_x: bool
    shortcut_out_shape: tuple[int, ...] | None
    shortcut_out_bytes: int
    shortcut_out_is_x: bool
    shortcut_live_after: bool
    branch: bool
    goodness_bytes: int  # kept until the step's report, losses too
    weight_bytes: int
    gradient_bytes: int  # of weight and bias
    pixels: int
    flops: int  # forward and weight gradient


class NetSizes:
    """A network in one phase of its schedule, at one batch size and compute dtype.

    Args:
        dry_runs: of the phase's turns.
        held: bytes that lie in memory all the while: a store of features.

    Attributes:
        layers: of the whole network.
        span: the layers that a step runs through.
        batch: rows of a step.
        cuts: a plan may cut between two layers.
        one_step: a step runs dry in one piece: its schedule makes no segments, or takes turns
            within the phase.
    """

    def __init__(self, dry_runs: list[DryRun], held: int = 0) -> None:
        self.dry_runs, self.held = dry_runs, held
        self.main = main = dry_runs[0]
        self.layers = layer_sizes(main.net, main.dtype, joining(main.net, main.turn))
        self.span = range(main.first, main.turn.depth)
        self.batch, self.itemsize = main.rows, main.dtype.itemsize
        #: Of a caller's sample and its label.
        self.input_bytes = math.prod(main.net.in_shape) * 4 + 8
        self.cuts = main.schedule.writer.cuts
        self.one_step = len(dry_runs) > 1 or not main.schedule.tiles or not self.span

    def takes_all(self, i: int) -> bool:
        """The layer's turn needs the whole batch in one tile: pairs, batch statistics, features of
        updated weights, a label channel that it trains."""
        turn, updated = self.main.turn, self.main.net.propagate == "updated"
        shown = i == 0 and label_channel.learned(self.main.net) is not None
        return self.one_step or (i >= turn.start and is_whole(self.main.net.layer(i))) or (
            i in turn.layers and (shown or (updated and i + 1 < turn.depth)))

    @property
    def whole(self) -> bool:
        """Some layer takes the whole batch in one tile."""
        return not self.span or any(self.takes_all(i) for i in self.span)

    @functools.cached_property
    def floor_bytes(self) -> int:
        """Parameters and optimizer states."""
        return self.main.floor_bytes

    @functools.cached_property
    def entrance(self) -> Entrance:
        """What lies outside the segments."""
        made = self.main.entrance()
        return Entrance(made.base + self.held, made.peak + self.held)

    @functools.cached_property
    def step_bytes(self) -> int:
        """Most that a step in one tile holds, in any of the phase's turns, beside the floor."""
        plan = one_tile(self.span, self.batch)
        return max(r.step(plan) for r in self.dry_runs) - self.floor_bytes + self.held

    def turn(self, i: int, tile: int, arriving: Arriving, mode: Mode = "train") -> TurnBytes:
        """Layer i's turn on a tile, in one of its passes."""
        return self.main.layer(i, tile, arriving, self.layers[i].shortcut_in_shape, mode)

    def gradient_bytes(self, i: int) -> int:
        """Where the tiles of a segment add up layer i's gradients."""
        adds = i in self.main.turn.layers and self.main.sums is None
        return self.layers[i].gradient_bytes if adds else 0

    @functools.cached_property
    def kept_bytes(self) -> list[int]:
        """What the layers before each one have left for the step's report and the heads."""
        heads, turn = self.main.read_by_heads, self.main.turn
        return list(itertools.accumulate(
            (self.batch * (i in self.span) * (
                s.goodness_bytes * (i in turn.layers) + s.out_bytes * (i in heads))
             for i, s in enumerate(self.layers)), initial=0))


def measure(net: LocalNet, batch: int, dtype: torch.dtype, *, states: int = 2,
            device: str = "cpu", backend: str = "auto",
            schedule: Schedule | None = None) -> NetSizes:
    """Sizes of a network that trains all its layers, at a batch of so many rows.

    Args:
        states: optimizer state tensors per parameter (Adam 2, SGD with momentum 1, else 0).
        schedule: tied to `net`; default trains every layer on every batch.
    """
    optim = OptimConfig(lr=1e-3) if states == 2 else OptimConfig(
        "sgd", lr=1e-3, momentum=0.9 * states)
    if schedule is None and isinstance(net, RecurrentNet):
        schedule = of(net, None)
    if schedule is None:
        schedule = Schedule()
        schedule.net, schedule.epochs = net, 1
    made = DryRun(net, schedule, optim, dtype, -(-batch // (1 + paired(net))), device=device,
                     backend=backend)
    made.turn = replace(made.turn, layers=tuple(
        i for i in made.turn.layers if net.layer(i).weight.requires_grad))
    return NetSizes([made])


def is_whole(layer: LocalLayer) -> bool:
    """The layer's turn takes the whole batch at once: pairs, batch statistics, affine inputs."""
    loss = layer.config.loss
    return (isinstance(loss, Loss) and loss.paired) or (
        layer.batch_coupling is not None or layer.pre_norm is not None)


def layer_sizes(net: LocalNet, dtype: torch.dtype, depth: int) -> tuple[LayerSizes, ...]:
    """Every layer's, following the live shortcut through the chain; the first `depth` may join it.
    """
    item, out = dtype.itemsize, []
    accumulate = 8 if dtype is torch.float64 else 4
    shape: tuple[int, ...] | None = None
    is_x = False
    for i, wire in enumerate(net.wires):
        layer, x_shape, joined = net.layer(i), net.shapes[i], net.shapes[i + 1]
        seen = net.input_of(i, x_shape)
        a_shape = layer.out_shape(seen)
        before, before_is_x = shape, is_x
        if wire.branch:
            shape, is_x = (halved(joined), False) if wire.branch_pool else (joined, True)
        else:
            is_x = False
        live = net.shortcut_live_after(i, depth)
        if not live:
            shape, is_x = None, False
        weight, pixels = layer.weight, math.prod(a_shape[1:])
        bias = 0 if layer.bias is None else layer.bias.numel()
        out.append(LayerSizes(
            x_shape=x_shape, out_shape=joined, x_bytes=math.prod(x_shape) * item,
            transform_bytes=math.prod(seen) * item if seen != x_shape else 0,
            a_bytes=math.prod(a_shape) * item, out_bytes=math.prod(joined) * item,
            shortcut_in_shape=before, shortcut_in_bytes=math.prod(before) * item if before else 0,
            shortcut_in_is_x=before_is_x, shortcut_out_shape=shape,
            shortcut_out_bytes=math.prod(shape) * item if shape else 0, shortcut_out_is_x=is_x,
            shortcut_live_after=live, branch=wire.branch,
            goodness_bytes=accumulate * len(layer.config.offsets(a_shape[0])),
            weight_bytes=weight.numel() * weight.element_size(),
            gradient_bytes=(weight.numel() + bias) * step_dtype(weight.dtype).itemsize,
            pixels=pixels,
            flops=4 * pixels * weight.numel()))
    return tuple(out)
