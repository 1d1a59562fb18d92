"""The weights of a network's layers: sparsity, statistics, and a picture of a clamped matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ffengine.analysis.sparsity import KINDS, sparsity, statistics
from ffengine.nn.heads import LinearHead
from ffengine.nn.network import LocalNet


@dataclass(frozen=True)
class WeightStatistics:
    """Of one weight tensor: the four sparsity measures by kind, extremes, mean, unbiased
    deviation (FFLib, tables 3 and 4)."""

    name: str
    sparsity: dict[str, float]
    least: float
    most: float
    mean: float
    deviation: float

    @property
    def largest(self) -> float:
        """The largest |w| (Trifecta, figs. 6 and 9)."""
        return max(-self.least, self.most)


def weight_statistics(net: LocalNet) -> list[WeightStatistics]:
    """Of the weight of every layer, then of every head."""
    found = [(f"layer {i}", net.layer(i).weight) for i in range(len(net.layers))]
    found += [(f"head {i}", h.weight) for i, h in enumerate(net.heads)
              if isinstance(h, LinearHead)]
    return [WeightStatistics(name, {kind: sparsity(w, kind) for kind in KINDS}, *statistics(w))
            for name, w in found]


def clamped(weight: torch.Tensor, limit: float) -> torch.Tensor:
    """The weight as (outputs, inputs) within [-limit, limit] (Trifecta, fig. 10).

    Raises:
        ValueError: a limit that is no positive number.
    """
    if not limit > 0 or limit == float("inf"):
        raise ValueError(f"[analyze] a clamp expected a number above 0, got {limit}")
    return weight.detach().flatten(1).clamp(-limit, limit)
