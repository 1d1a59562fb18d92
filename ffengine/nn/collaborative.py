"""Collaborative Forward-Forward: layers whose goodness takes the other layers' into account.

Our reconstruction: the paper's equations are lost in every text at hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ffengine.nn.network import LocalNet
from ffengine.typed import typed


class CollaborativeNet(LocalNet):
    """G_l = g_l + gamma_l sum_{m != l} w stopgrad(g_m), in training.

    With sums of squares, w = 1 and gamma = 1 this is Lorberbom et al. (AAAI 2024), eq. 4.

    Args:
        gamma: its value at the start, one per layer.
        learned: gamma is trained (A-CFF); its optimizer settings are `gamma_optim`.
        weight: w; default 1 / (L - 1).
    """

    @typed("collaborative")
    def __init__(self, *args: Any, gamma: float = 0.1, learned: bool = False,
                 weight: float | None = None, gamma_lr: float = 0.01, **options: Any) -> None:
        super().__init__(*args, **options)
        depth = len(self.layers)
        if depth < 2:
            raise ValueError(f"[network] collaboration expected 2 layers or more, got {depth}")
        self.gamma = nn.Parameter(torch.full((depth,), float(gamma)), requires_grad=learned)
        self.pair_weight = 1.0 / (depth - 1) if weight is None else float(weight)
        self.gamma_optim = {"kind": "adam", "lr": gamma_lr, "weight_decay": 0.0}

    def pooled(self, goodness: list[torch.Tensor]) -> torch.Tensor:
        """w sum of the layers' goodness (N, 1)."""
        if not goodness:
            return torch.zeros((), dtype=self.gamma.dtype, device=self.gamma.device)
        return torch.stack(goodness).sum(0) * self.pair_weight

    def group_size(self, i: int) -> int:
        """What dL/dg was divided by to give coef."""
        return 1 if self.layer(i).config.goodness == "sum_sq" else self.shapes[i + 1][0]


def gamma_owner(layer: int) -> str:
    """Whose optimizer state steps a layer's gamma."""
    return f"layer {layer}" if layer else ""
