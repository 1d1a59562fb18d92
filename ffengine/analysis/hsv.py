"""Functional sparsity as colour: which class a neuron prefers, how much, and how strongly.

FFLib sec. 3.2, figs. 13-14, by its published code: with A[k, j] the sum of |h_j| over the samples
of class k, shown without a label,

    hue         the class k* = argmax_k A[k, j]
    saturation  A[k*, j] / (sum_k A[k, j] + 1e-5)
    value       (A[k*, j] - min A) / (max A - min A), over classes and neurons of the layer

The published hues are linspace(0, 1, K), which gives the first and the last class the same red;
here class k of K has hue k / K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Colours:
    """One layer's neurons: the class each prefers (int64; -1: it responds to none), and hue,
    saturation and value in [0, 1], all (neurons,)."""

    preferred: torch.Tensor
    hue: torch.Tensor
    saturation: torch.Tensor
    value: torch.Tensor

    def sorted(self) -> torch.Tensor:
        """(neurons,) indices by preferred class, the strongest of a class first, silent ones last.
        """
        strongest = torch.argsort(self.value, descending=True, stable=True)
        silent_last = torch.where(self.preferred < 0, torch.iinfo(torch.int64).max, self.preferred)
        return strongest[torch.argsort(silent_last[strongest], stable=True)]


def colours(sums: torch.Tensor) -> Colours:
    """Of class sums of |h|, (classes, neurons) fp64."""
    if sums.dim() != 2 or not sums.numel():
        raise ValueError(f"[hsv] expected sums (classes, neurons), got {tuple(sums.shape)}")
    top, preferred = sums.max(0)
    low, high = sums.min(), sums.max()
    span = high - low if high > low else torch.ones_like(high)
    return Colours(torch.where(top > 0, preferred, -1), preferred.double() / sums.shape[0],
                   top / (sums.sum(0) + 1e-5), (top - low) / span)


def grey(h: torch.Tensor) -> torch.Tensor:
    """One sample's activations (neurons,) as brightness: the layer's lowest 0, its highest 1."""
    low, high = h.min(), h.max()
    return torch.zeros_like(h) if high == low else (h - low) / (high - low)


#: Neurons of a picture's row at most, as in FFLib's pictures of 2000.
ROW = 40


def columns_of(count: int) -> int:
    """Neurons in a row of the picture: about as many as there are rows, at most ROW."""
    return min(ROW, max(1, round(math.sqrt(count))))


def shaped(values: torch.Tensor) -> torch.Tensor:
    """(neurons, ...) as the picture's rows, the last filled up with NaN."""
    columns = columns_of(len(values))
    rows = -(-len(values) // columns)
    out = values.new_full((rows * columns, *values.shape[1:]), torch.nan)
    out[:len(values)] = values
    return out.view(rows, columns, *values.shape[1:])
