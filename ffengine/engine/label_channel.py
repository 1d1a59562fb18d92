"""A learned label channel: the first layer's loss trains the embedding that it was shown.

The gradient of the channel is the first layer's own input gradient, at the weights before the step.
"""

from __future__ import annotations

import torch

from ffengine.engine import affine
from ffengine.engine.context import StepContext
from ffengine.nn.encoding import LabelChannel
from ffengine.nn.network import LocalNet


def learned(net: LocalNet) -> LabelChannel | None:
    """The network's label channel, if it trains."""
    encoding = net.encoding
    if isinstance(encoding, LabelChannel) and encoding.weight.requires_grad:
        return encoding
    return None


def update(ctx: StepContext, dx: torch.Tensor, scale: float) -> None:
    """Step the embedding, from `scale` times the gradient of the first layer's input (2N, ...)."""
    encoding = ctx.net.encoding
    assert isinstance(encoding, LabelChannel) and ctx.labels is not None
    shown = dx.reshape(-1, *encoding.shape)[:, -1].flatten(1).to(encoding.weight.dtype)
    rows = torch.cat([encoding.rows(t, shown) for t in ctx.labels])
    affine.step(ctx, "encoding", "weight", encoding.weight, rows.t() @ shown, scale=scale)
