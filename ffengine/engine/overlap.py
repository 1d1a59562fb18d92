"""Overlapping local updates (Trifecta, sec. 4): a loss crosses one layer boundary, no more.

The layer that takes the loss updates itself and, through its own input gradient, the layer before
it, which kept its pre-activation for that. Two layers are live at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ffengine.engine import affine, heads
from ffengine.engine.affine import Swept
from ffengine.engine.batch import Batch
from ffengine.engine.inputs import completed, entrance
from ffengine.engine.step import BatchReport, StepContext, sweep
from ffengine.nn.encoding import LabelChannel
from ffengine.nn.layers import LocalLayer
from ffengine.nn.norms import Normalised
from ffengine.ops.config import Tile


class Held(NamedTuple):
    """What a layer keeps while its successor takes the loss."""

    u: torch.Tensor
    made: Normalised | None
    a: torch.Tensor
    #: Gradients of its own loss, not stepped yet: those of the next loss are at the same weights.
    own: affine.Gradients


def train_overlapping(ctx: StepContext, item: Batch, dtype: torch.dtype) -> BatchReport:
    """One step: the layers of the turn take their loss and train the layer before them too."""
    net, turn = ctx.net, ctx.whose()
    with torch.no_grad():
        item = completed(ctx, item, dtype)
        results = heads.train_neutral(ctx, item, dtype)
        rows = (item.y, item.negatives)
        x, shortcut, held = entrance(ctx, item, dtype), None, None
        for i in range(turn.depth):
            z, held = _turn(ctx, i, net.transform(i, x), held, rows)
            if i + 1 < turn.depth or i in ctx.read_by_heads():
                assert z is not None
                x, shortcut = net.join(i, z, shortcut)
                if i in ctx.read_by_heads():
                    ctx.features.setdefault(i, []).append(x)
        results |= heads.train_on_pass(ctx)
    ctx.optimizer.mark_stepped()
    return ctx.report(results)


def _turn(ctx: StepContext, i: int, x: torch.Tensor, held: Held | None,
          labels: tuple[torch.Tensor, torch.Tensor | None]) -> tuple[torch.Tensor | None,
                                                                    Held | None]:
    """(z, what layer i keeps for its successor)."""
    layer, turn = ctx.net.layer(i), ctx.whose()
    u, made = layer.enter(x, training=True)
    a = layer.preactivation(u)
    next_takes = i + 1 in turn.layers
    keep = Held(u, made, a, []) if next_takes else None
    if i not in turn.layers:
        z, _ = layer.sweep(a, want_z=ctx.wants_z(i), backend=ctx.backend)
        return z, keep
    swept = sweep(ctx, i, a, Tile(0, ctx.batch), want_z=ctx.wants_z(i), keep_a=next_takes)
    assert swept.loss is not None and swept.da is not None
    ctx.note(i, x.shape[0], swept.loss, swept.g)
    du = None
    if held is not None or (i == 0 and _learned(ctx)):
        du = affine.input_gradient(layer, u, swept.da)
        dx = through_norm(layer, du, made)
        if held is not None:
            _update_before(ctx, i - 1, held, dx, swept.da_scale)
        else:
            _update_embedding(ctx, dx, labels, swept.da_scale)
    if keep is None or made is None:
        affine.update(ctx, i, u, made, swept, du=du)
    else:
        keep.own.extend(affine.normalised_gradients(ctx, i, u, made, swept.da, swept.da_scale, du))
    return swept.z, keep


def through_norm(layer: LocalLayer, du: torch.Tensor, made: Normalised | None) -> torch.Tensor:
    """dL/dx at the layer's input, from what `affine.input_gradient` gave."""
    norm = layer.pre_norm
    if norm is None or made is None:
        return du
    dx_hat = du if norm.folded else du * norm.weight.detach().to(du.dtype)
    return norm.input_gradient(dx_hat, made, training=True)


def _update_before(ctx: StepContext, i: int, held: Held, dz: torch.Tensor, scale: float) -> None:
    """Layer i by the loss of layer i + 1, with the optimizer states that loss owns."""
    layer = ctx.net.layer(i)
    after = held.a.shape if layer.config.pool == "none" else (
        *held.a.shape[:2], held.a.shape[2] // 2, held.a.shape[3] // 2)
    da = activation_gradient(layer, held.a, dz.reshape(after)).to(held.u.dtype)
    if held.made is not None:
        found = affine.normalised_gradients(ctx, i, held.u, held.made, da, scale, None)
        affine.step_all(ctx, i, held.own, "")
        affine.step_all(ctx, i, found, "next")
        return
    empty = held.a.new_zeros(0)
    affine.update(ctx, i, held.u, held.made, Swept(None, empty, None, da, scale), owner="next")


def activation_gradient(layer: LocalLayer, a: torch.Tensor, dz: torch.Tensor) -> torch.Tensor:
    """dL/da of dL/dz through relu and pool; the arg-max is the first on ties."""
    with torch.enable_grad():
        leaf = F.relu(a.detach()).requires_grad_()
        out = F.max_pool2d(leaf, 2) if layer.config.pool == "max2" else leaf * 1
        (dh,) = torch.autograd.grad(out, leaf, dz.to(a.dtype))
    if layer.config.relu_gradient == "straight_through":
        return dh
    return dh.mul_(a > 0)


def _learned(ctx: StepContext) -> bool:
    encoding = ctx.net.encoding
    return isinstance(encoding, LabelChannel) and encoding.learned


def _update_embedding(ctx: StepContext, dx: torch.Tensor,
                      labels: tuple[torch.Tensor, torch.Tensor | None], scale: float) -> None:
    """The label embedding, from the gradient of the channel that showed it."""
    encoding, (y, negatives) = ctx.net.encoding, labels
    assert isinstance(encoding, LabelChannel) and negatives is not None
    shown = dx.reshape(-1, *encoding.shape)[:, -1].flatten(1).to(encoding.weight.dtype)
    rows = torch.cat([encoding.rows(t, shown) for t in (y, negatives)])
    affine.step(ctx, "encoding", "weight", encoding.weight, rows.t() @ shown, scale=scale)
