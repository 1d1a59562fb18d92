"""A layer's own part of a step: its pre-activation, and the sweep over it."""

from __future__ import annotations

import torch

from ffengine.engine.affine import SweepResult
from ffengine.engine.context import StepContext
from ffengine.engine.run.stopping import TrainingStopped
from ffengine.nn.layers import LocalLinear
from ffengine.ops.batch_pass import batch_pass
from ffengine.ops.config import Tile
from ffengine.ops.local_pass import local_pass
from ffengine.ops.overflow import Overflowed


def preactivation(ctx: StepContext, i: int, u: torch.Tensor) -> torch.Tensor:
    """a of what the layer's weight sees; what both halves share of it is multiplied once."""
    layer = ctx.net.layer(i)
    if i == 0 and ctx.differ is not None and u.shape[0] == ctx.batch:
        assert isinstance(layer, LocalLinear)
        return layer.of_halves(u, ctx.differ)
    return layer.preactivation(u, layer.operands(u, ctx.half(i, u.dtype)))


def sweep(ctx: StepContext, i: int, a: torch.Tensor, tile: Tile, *, want_z: bool,
          shortcut: torch.Tensor | None = None, g0: torch.Tensor | None = None,
          into: torch.Tensor | None = None, h_prev: torch.Tensor | None = None) -> SweepResult:
    """The layer's goodness, loss and gradients at a; z, or da, over a unless it pools.

    Args:
        shortcut: added to z.
        g0: (rows, K), added to the goodness (collaborative FF).
        into: where z goes instead.
        h_prev: the layer's old state (recurrent networks).

    Raises:
        TrainingStopped: activations are too large to be normalised; names layer and step.
    """
    try:
        return _swept(ctx, i, a, tile, want_z, shortcut, g0, into, h_prev)
    except Overflowed as error:
        raise TrainingStopped(f"[train] the loss of layer {i} is of activations that are too large "
                              f"at step {ctx.step}: {error}; try a lower --lr") from None


def _swept(ctx: StepContext, i: int, a: torch.Tensor, tile: Tile, want_z: bool,
           shortcut: torch.Tensor | None, g0: torch.Tensor | None, into: torch.Tensor | None,
           h_prev: torch.Tensor | None) -> SweepResult:
    layer, n = ctx.net.layer(i), a.shape[0]
    config, clock = ctx.dropout(i)
    y, out = ctx.targets(i, tile, n), a if config.pool == "none" else None
    out = out if into is None else into
    if layer.batch_coupling is None:
        made = local_pass(
            a, y, config=config, out=out if want_z else None, want_z=want_z, want_da=True,
            da_out=None if want_z else out, tile=tile, shortcut=shortcut, clock=clock,
            h_prev=h_prev, g0=g0, backend=ctx.backend)
        if g0 is not None and made.coef is not None:
            ctx.coef.setdefault(i, []).append(made.coef)
        return SweepResult(made.z, made.g, made.loss, made.da, made.da_scale)
    both = batch_pass(
        a, y, config=config, coupling=layer.batch_coupling, gamma=layer.norm_weight,
        beta=layer.norm_bias, running_mean=layer.running_mean, running_var=layer.running_var,
        out=out if want_z else None, want_z=want_z, want_da=True, backend=ctx.backend)
    if both.penalty is not None:
        ctx.penalties[i] = both.penalty
    if both.z is not None and shortcut is not None:
        both.z.add_(shortcut)
    return SweepResult(both.z, both.g, both.loss, both.da, both.da_scale, both.dgamma, both.dbeta)
