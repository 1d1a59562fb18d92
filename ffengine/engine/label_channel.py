"""A learned label channel: the first layer's loss trains the embedding that it was shown.

The gradient of the channel is the first layer's own input gradient, at the weights before the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ffengine.engine import affine
from ffengine.nn.encoding import LabelChannel

if TYPE_CHECKING:
    from ffengine.engine.context import StepContext
    from ffengine.nn.network import LocalNet
    from ffengine.nn.norms import Normalised


def learned(net: LocalNet) -> LabelChannel | None:
    """The network's label channel, if it trains."""
    encoding = net.encoding
    if isinstance(encoding, LabelChannel) and encoding.weight.requires_grad:
        return encoding
    return None


def train(ctx: StepContext, u: torch.Tensor, made: Normalised | None,
          swept: affine.Swept) -> torch.Tensor:
    """Step the embedding by the loss of the first layer, whose own step comes after.

    Args:
        u, made: what LocalLayer.enter gave, of all rows.

    Returns:
        dL/du times da's scale, as `affine.update` takes it.
    """
    layer = ctx.net.layer(0)
    assert swept.da is not None
    du = affine.input_gradient(layer, u, swept.da)
    folded = layer.pre_norm is None or layer.pre_norm.folded  # then nobody wants du again
    update(ctx, affine.through_norm(layer, du if folded else du.clone(), made), swept.da_scale)
    return du


def update(ctx: StepContext, dx: torch.Tensor, scale: float) -> None:
    """Step the embedding, from `scale` times the gradient of the first layer's input (2N, ...)."""
    encoding = ctx.net.encoding
    assert isinstance(encoding, LabelChannel) and ctx.labels is not None
    shown = dx.reshape(-1, *encoding.shape)[:, -1].flatten(1).to(encoding.weight.dtype)
    rows = torch.cat([encoding.rows(t, shown) for t in ctx.labels])
    affine.step(ctx, "encoding", "weight", encoding.weight, rows.t() @ shown, scale=scale)
