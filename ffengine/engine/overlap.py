"""Overlapping local updates (Trifecta, sec. 4): a loss crosses one layer boundary, no more.

The layer that takes the loss updates itself and, through its own input gradient, the layer before
it. Of that layer only what its update needs is held: the input its weight saw, and a byte an
element that says where a gradient goes through relu and pool. Pre-activations live a tile of rows
at a time; batch statistics are taken before the tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ffengine.engine import affine, heads, label_channel
from ffengine.engine.batch import Batch, joined, paired
from ffengine.engine.context import BatchReport, StepContext
from ffengine.engine.inputs import completed, entrance
from ffengine.engine.step import sweep
from ffengine.nn.layers import LocalLayer, as_laid_out
from ffengine.nn.norms import Normalised
from ffengine.ops import routes as op
from ffengine.ops.config import Tile

#: Pre-activations that live at once. A step of trifecta/shallow at batch 32 in fp32 holds 120, 99,
#: 89 and 86 MB with 16, 4, 2 and 1 MB of them, and takes 0.45, 0.46, 0.48 and 0.53 s. A GPU pays
#: fifteen launches a tile: 32 MB of them (predicted to be enough to fill it, not measured).
TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 23}


class Held(NamedTuple):
    """What a layer keeps while its successor takes the loss."""

    u: torch.Tensor
    made: Normalised | None
    routes: torch.Tensor
    #: Gradients of its own loss, not stepped yet: those of the next loss are at the same weights.
    own: affine.Gradients


class Rows(NamedTuple):
    """A tile: rows start..stop; of paired halves those of both, positives first."""

    start: int
    stop: int
    half: int  # rows of a half; 0: no halves

    def of(self, t: torch.Tensor) -> torch.Tensor:
        """The tile's rows of a map."""
        if not self.half or self.stop - self.start == self.half:
            return t[self.start:self.stop + self.half]
        return torch.cat([t[self.start:self.stop], t[self.half + self.start:self.half + self.stop]])

    def places(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """Where the tile's rows lie in a map: of both halves where there are two."""
        return [whole[at + self.start:at + self.stop] for at in ((0, self.half) if self.half
                                                                 else (0,))]

    def put(self, whole: torch.Tensor | None, part: torch.Tensor | None) -> None:
        """Write the tile's rows into those of a map."""
        if whole is not None and part is not None:
            for place, rows in zip(self.places(whole), self.parts(part), strict=True):
                place.copy_(rows)

    def parts(self, part: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tile's rows, a half each."""
        return torch.split(part, self.stop - self.start)


def tiles(layer: LocalLayer, u: torch.Tensor, halves: bool) -> Iterator[Rows]:
    """Tiles of TILE_ELEMENTS pre-activations, a pair at least."""
    count = u.shape[0] // 2 if halves else u.shape[0]
    row = (1 + halves) * math.prod(layer.out_shape(tuple(u.shape[1:])))
    step = max(1, TILE_ELEMENTS["cpu" if u.device.type == "cpu" else "cuda"] // row)
    for start in range(0, count, step):
        yield Rows(start, min(start + step, count), count if halves else 0)


def train_overlapping(ctx: StepContext, item: Batch, dtype: torch.dtype) -> BatchReport:
    """One step: the layers of the turn take their loss and train the layer before them too."""
    net, turn = ctx.net, ctx.whose()
    with torch.no_grad():
        item = completed(ctx, item, dtype)
        results = heads.train_neutral(ctx, item, dtype)
        maps, shortcut, held = [entrance(ctx, item, dtype)], None, None
        for i in range(turn.depth):
            z, held = _turn(ctx, i, maps, held)
            if z is not None:
                maps = [z]
                del z
                x, shortcut = net.join(i, maps.pop(), shortcut)
                maps = [x]
                if i in ctx.read_by_heads():
                    ctx.features.setdefault(i, []).append(x)
                del x
        results |= heads.train_on_pass(ctx)
    ctx.optimizer.mark_stepped()
    return ctx.report(results)


def _turn(ctx: StepContext, i: int, maps: list[torch.Tensor],
          held: Held | None) -> tuple[torch.Tensor | None, Held | None]:
    """(z, what layer i keeps for its successor) of the map in `maps`, which is taken out."""
    layer, turn = ctx.net.layer(i), ctx.whose()
    u, made = layer.enter(ctx.net.transform(i, maps.pop()), training=True)
    takes, keeps = i in turn.layers, i + 1 in turn.layers
    crosses = takes and (held is not None or (i == 0 and ctx.labels is not None))
    z = _empty(layer, u) if ctx.wants_z(i) else None
    routes = _empty(layer, u, torch.uint8) if keeps else None
    du = torch.empty_like(u) if crosses else None
    sums = affine.GradientSums(ctx, i) if takes else None
    goodness, losses, scale, halves = [], [], 1.0, paired(ctx.net)
    operands = layer.operands(u)
    for rows in tiles(layer, u, halves):
        seen = rows.of(u)
        a = layer.preactivation(seen, operands)
        if routes is not None:
            routes_of(ctx, layer, a, routes, rows)
        if sums is None:
            rows.put(z, layer.sweep(a, want_z=z is not None, backend=ctx.backend)[0])
            continue
        swept = sweep(ctx, i, a, Tile(rows.start, ctx.batch, bool(rows.half)),
                      want_z=z is not None)
        del a
        assert swept.da is not None and swept.loss is not None
        rows.put(z, swept.z)
        goodness.append(swept.g)
        losses.append(swept.loss)
        scale = swept.da_scale
        part = affine.input_gradient(layer, seen, swept.da) if crosses else None
        rows.put(du, part)
        sums.add(seen, None if made is None else rows.of(made.x_hat), swept.da, scale, part)
        del swept, part
    own: affine.Gradients = []
    if sums is not None:
        ctx.note(i, joined(losses, halves and losses[0].shape == goodness[0].shape[:1]),
                 joined(goodness, halves))
        if du is not None:
            dx = affine.through_norm(layer, du, made)
            del du
            if held is not None:
                _update_before(ctx, i - 1, held, dx, scale)
            else:
                label_channel.update(ctx, dx, scale)
        own = sums.done()
    if routes is None or made is None:
        affine.step_all(ctx, i, own, "")
        own = []
    return z, None if routes is None else Held(u, made, routes, own)


def _update_before(ctx: StepContext, i: int, held: Held, dz: torch.Tensor, scale: float) -> None:
    """Layer i by the loss of layer i + 1, with the optimizer states that loss owns."""
    layer, u, sums = ctx.net.layer(i), held.u, affine.GradientSums(ctx, i)
    dz = dz.reshape(held.routes.shape)  # flattened between a convolution and a linear layer
    for rows in tiles(layer, u, False):
        seen = rows.of(u)
        da = activation_gradient(ctx, layer, rows.of(held.routes), rows.of(dz),
                                 layer.out_shape(tuple(u.shape[1:]))).to(u.dtype)
        sums.add(seen, None if held.made is None else rows.of(held.made.x_hat), da, scale)
    found = sums.done()  # at the weights that its own loss saw
    affine.step_all(ctx, i, held.own, "")
    affine.step_all(ctx, i, found, "next")


def routes_of(ctx: StepContext, layer: LocalLayer, a: torch.Tensor, routes: torch.Tensor,
              rows: Rows) -> None:
    """Write into `routes` where a gradient goes through relu and pool in a tile's rows."""
    for part, place in zip(rows.parts(a), rows.places(routes), strict=True):
        op.routes(part, place, pool=layer.config.pool == "max2",
                  straight=layer.config.relu_gradient == "straight_through", backend=ctx.backend)


def activation_gradient(ctx: StepContext, layer: LocalLayer, routes: torch.Tensor,
                        dz: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """dL/da (N, *shape) of dL/dz through relu and pool, along `routes_of`."""
    return op.along_routes(routes, as_laid_out(dz), shape, pool=layer.config.pool == "max2",
                           backend=ctx.backend)


def _empty(layer: LocalLayer, u: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Room for the layer's z of all rows."""
    shape = layer.z_shape(tuple(u.shape[1:]))
    layout = torch.channels_last if len(shape) == 3 else torch.contiguous_format
    return torch.empty((u.shape[0], *shape), dtype=dtype or u.dtype, device=u.device,
                       memory_format=layout)
