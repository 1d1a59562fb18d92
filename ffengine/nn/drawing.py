"""First weights and labels, drawn from torch's generator.

A network without memory (device meta: to plan for, to check options by) has no values to draw.
Asked for them, torch would import its compile stack, 160 MB and two seconds, to find that out.
"""

from __future__ import annotations

import torch
from torch import nn


def he_normal(weight: torch.Tensor) -> None:
    """He-normal for relu, fan_out (He et al. 2015, eq. 14)."""
    if not weight.is_meta:
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


def normal(weight: torch.Tensor, sd: float) -> None:
    """Mean 0, standard deviation `sd`."""
    if not weight.is_meta:
        nn.init.normal_(weight, 0.0, sd)


def whole(t: torch.Tensor, high: int) -> None:
    """Whole numbers of 0..high - 1, as torch.randint draws them."""
    if not t.is_meta:
        t.random_(0, high)
