"""Colour changes of a batch, each with one factor per sample.

x is float (B, C, H, W) in [0, 1]; factors are (B,). The result is new and in [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def _blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    """factor * x + (1 - factor) * other, clamped to [0, 1]."""
    f = factor.view(-1, 1, 1, 1)
    return (f * x + (1 - f) * other).clamp_(0, 1)


def _grey(x: Tensor) -> Tensor:
    """(B, 1, H, W) luma of RGB; any other number of channels is averaged."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """0 is black, 1 changes nothing."""
    return _blend(x, 0.0, factor)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """0 is the image's mean grey, 1 changes nothing."""
    return _blend(x, _grey(x).mean(dim=(1, 2, 3), keepdim=True), factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """0 is grey, 1 changes nothing; C must be 3."""
    return _blend(x, _grey(x), factor)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turns the hue by `turn` of a full circle at unchanged HSV saturation and value; C = 3."""
    red, green, blue = x.unbind(1)
    value, lowest = x.amax(1), x.amin(1)
    chroma = value - lowest
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))  # grey has no hue: any will do
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sixth = sixth + 6 * turn.view(-1, 1, 1)
    # Channel n of RGB from HSV: value - chroma * clamp(min(k, 4 - k), 0, 1), k = (n + sixth) mod 6.
    k = (x.new_tensor((5.0, 3.0, 1.0)).view(1, 3, 1, 1) + sixth.unsqueeze(1)) % 6
    fall = torch.minimum(k, 4 - k).clamp_(0, 1)
    return (value.unsqueeze(1) - chroma.unsqueeze(1) * fall).clamp_(0, 1)
