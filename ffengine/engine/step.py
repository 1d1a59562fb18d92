"""How a batch becomes an update: runs of layers, sample tiles inside a run, one layer's step.

    for run in plan:                       # between runs, whole-batch maps
        for tile of samples:               # inside a run, depth-first
            for layer in run:
                x -> transform -> a -> local_pass -> z, da
                weight_update(x, da)       # into the run's buffer; the last tile steps
                drop x, da; join the shortcut

Every plan gives the same gradients: losses scale by the whole batch, z comes from the weights
before the step, and the optimizer steps when the last tile has been added.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ffengine.engine.optim import LocalOptimizer
from ffengine.engine.plan import Plan, Run
from ffengine.nn.layers import LocalLayer, as_channels_last
from ffengine.nn.network import LocalNet
from ffengine.ops import scratch
from ffengine.ops.config import Tile
from ffengine.ops.local_pass import local_pass
from ffengine.ops.weight_update import weight_update


@dataclass
class Maps:
    """What travels between layers: the feature map and the live shortcut, (N, C, H, W)."""

    x: torch.Tensor | None
    shortcut: torch.Tensor | None = None

    def rows(self, start: int, stop: int) -> Maps:
        assert self.x is not None
        cut = None if self.shortcut is None else self.shortcut[start:stop]
        return Maps(self.x[start:stop], cut)


@dataclass
class BatchReport:
    """What one step leaves, still on the device: see Trainer.step."""

    #: Mean local loss per layer, None where the layer was idle.
    losses: list[torch.Tensor | None]
    #: Goodness (N, K) per layer, None where idle.
    goodness: list[torch.Tensor | None]


@dataclass
class StepContext:
    """One step's fixed facts."""

    net: LocalNet
    optimizer: LocalOptimizer
    y: torch.Tensor
    batch: int
    seed: int = 0
    step: int = 0
    backend: str = "auto"
    #: Handed gradients by layer index and "weight" | "bias", when a test asks for them.
    grads: dict[tuple[int, str], torch.Tensor] | None = None
    loss_sum: dict[int, torch.Tensor] = field(default_factory=dict)
    goodness: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def grad_of(self, i: int, name: str) -> torch.Tensor | None:
        return None if self.grads is None else self.grads.get((i, name))


def train_batch(ctx: StepContext, x: torch.Tensor, plan: Plan, dtype: torch.dtype) -> BatchReport:
    """One step of the schedule in which every layer trains on the batch ("together")."""
    with torch.no_grad():
        x = ctx.net.prepare(x.to(dtype))
        maps = Maps(as_channels_last(x) if x.dim() == 4 else x.contiguous())
        del x
        for run in plan.runs:
            train_run(ctx, run, maps)
    ctx.optimizer.mark_stepped()
    layers = range(len(ctx.net.layers))
    return BatchReport(
        losses=[ctx.loss_sum.get(i) for i in layers],
        goodness=[whole(ctx.goodness.pop(i)) if i in ctx.goodness else None for i in layers])


def whole(pieces: list[torch.Tensor]) -> torch.Tensor:
    """The tiles' rows as one tensor; an only tile's as they are."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def train_run(ctx: StepContext, run: Run, maps: Maps) -> None:
    """A run of layers over the whole batch; leaves its last maps in `maps`."""
    if run.tile >= ctx.batch:
        for i in run.layers:
            layer_step(ctx, i, maps, Tile(0, ctx.batch), (None, None), finish=True)
        return
    with scratch.allocating("gradient"):
        buffers = {i: zeros_like_parameters(ctx.net.layer(i)) for i in run.layers}
    out = Maps(None) if run.last else destination(maps, run, ctx.batch)
    for start in range(0, ctx.batch, run.tile):
        stop = min(start + run.tile, ctx.batch)
        piece = maps.rows(start, stop)
        for i in run.layers:
            layer_step(ctx, i, piece, Tile(start, ctx.batch), buffers[i], finish=stop == ctx.batch)
        store(piece, out, start, stop)
        del piece  # or its maps would live through the next tile
    maps.x, maps.shortcut = out.x, out.shortcut


def store(piece: Maps, out: Maps, start: int, stop: int) -> None:
    """A tile's last maps into their rows of the whole batch's."""
    for kept, part in ((out.x, piece.x), (out.shortcut, piece.shortcut)):
        if kept is not None and part is not None:
            kept[start:stop].copy_(part)


def destination(maps: Maps, run: Run, batch: int) -> Maps:
    """Whole-batch maps a run writes: over its own input where the shapes agree, else new."""
    assert maps.x is not None
    like = maps.x

    def place(shape: tuple[int, ...], over: torch.Tensor | None) -> torch.Tensor:
        if over is not None and tuple(over.shape[1:]) == shape:
            return over
        layout = torch.channels_last if len(shape) == 3 else torch.contiguous_format
        return torch.empty((batch, *shape), dtype=like.dtype, device=like.device,
                           memory_format=layout)

    x = place(run.out_shape, maps.x if run.overwrite_x else None)
    if run.shortcut_shape is None:
        return Maps(x)
    if run.shortcut_is_x:
        return Maps(x, x)
    return Maps(x, place(run.shortcut_shape, maps.shortcut if run.overwrite_shortcut else None))


Buffers = tuple[torch.Tensor | None, torch.Tensor | None]


def zeros_like_parameters(layer: LocalLayer) -> Buffers:
    """Where the tiles of a run add up the gradients of (weight, bias)."""
    bias = None if layer.bias is None else torch.zeros_like(layer.bias)
    return torch.zeros_like(layer.weight), bias


def layer_step(ctx: StepContext, i: int, maps: Maps, tile: Tile, buffers: Buffers,
               finish: bool) -> None:
    """One layer's whole turn on a tile; `maps` goes in as its input and comes out as the next's."""
    net, layer, opt = ctx.net, ctx.net.layer(i), ctx.optimizer
    assert maps.x is not None
    x = net.transform(i, maps.x)
    maps.x = None
    n = x.shape[0]
    a = layer.preactivation(x)
    config = layer.settings(ctx.seed, i, ctx.step)
    z, g, loss, _, da, da_scale = local_pass(
        a, ctx.y[tile.start:tile.start + n], config=config,
        out=a if config.pool == "none" else None, want_z=i + 1 < len(net.layers),
        want_da=True, tile=tile, backend=ctx.backend)
    del a
    assert da is not None and loss is not None
    weight_update(layer.weight.detach(), x, da, optim=opt.config(),
                  state=opt.state_of(layer.weight), geometry=layer.geometry,
                  accumulate=buffers[0], finish=finish, da_scale=da_scale,
                  grad_out=ctx.grad_of(i, "weight"), backend=ctx.backend,
                  bias=None if layer.bias is None else layer.bias.detach(),
                  bias_state=opt.state_of(layer.bias), bias_accumulate=buffers[1],
                  bias_grad_out=ctx.grad_of(i, "bias"))
    del x, da
    total = loss.sum() / loss.shape[0] * (n / ctx.batch)
    ctx.loss_sum[i] = ctx.loss_sum[i] + total if i in ctx.loss_sum else total
    ctx.goodness.setdefault(i, []).append(g)
    if z is not None:
        joined = [z]
        del z
        maps.x, maps.shortcut = net.join(i, joined.pop(), maps.shortcut)
