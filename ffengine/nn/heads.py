"""Linear heads: classifiers on the layers' features, trained by cross-entropy beside the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ffengine.nn.checks import one_of
from ffengine.typed import at_least, typed

#: double-softmax: cross-entropy of softmax(logits), CwComp's published bug.
HeadLoss = Literal["ce", "double-softmax", "sparsemax"]


class Receiver(Protocol):
    """Takes the features of one layer after the other."""

    def append(self, z: torch.Tensor, /) -> None: ...


class Columns:
    """Features of some layers side by side, (N, sum of widths); what nobody reads is not kept.

    Args:
        widths: layer -> elements of its features, in the order of the columns.
    """

    rows: torch.Tensor

    def __init__(self, widths: dict[int, int]) -> None:
        self.widths, self._next = widths, 0

    def append(self, z: torch.Tensor, /) -> None:
        """The next layer's features, from layer 0 on."""
        i, self._next = self._next, self._next + 1
        if i not in self.widths:
            return
        if len(self.widths) == 1:
            self.rows = z.flatten(1)
            return
        if not hasattr(self, "rows"):
            self.rows = z.new_empty(z.shape[0], sum(self.widths.values()))
        start = sum(w for at, w in list(self.widths.items())[:list(self.widths).index(i)])
        self.rows[:, start:start + self.widths[i]].copy_(z.flatten(1))


class LinearHead(nn.Module):
    """logits = features Wᵀ + b of the concatenated features of some layers.

    Args:
        layers: indices of the layers whose features it reads, in order.
        in_features, num_classes: size of the weight (num_classes, in_features).
        image: "pass": features of the samples as trained on; "neutral": of the image with the
            neutral label, by a pass of its own; "blank": the same without any label.
        features: "z": as the next layer sees them; "h": before their normalisation.
        loss: ce | double-softmax | sparsemax.
        optim: hyper-parameters that differ from the run's, as keywords of OptimConfig.
    """

    @typed("head")
    def __init__(self, layers: Sequence[int], in_features: int, num_classes: int, *,
                 bias: bool = True, image: Literal["pass", "neutral", "blank"] = "pass",
                 features: Literal["z", "h"] = "z", loss: HeadLoss = "ce",
                 init: Literal["uniform", "zeros", "ones"] = "uniform",
                 optim: dict[str, Any] | None = None) -> None:
        super().__init__()
        if not layers or num_classes < 2:
            raise ValueError("[head] expected one layer or more and 2 classes or more, got layers "
                             f"{tuple(layers)} and {num_classes} classes")
        for name, value, known in (
                ("image", image, ("pass", "neutral", "blank")), ("features", features, ("z", "h")),
                ("loss", loss, ("ce", "double-softmax", "sparsemax")),
                ("init", init, ("uniform", "zeros", "ones"))):
            one_of("head", name, value, known)
        at_least("head", "in_features", in_features, 0)
        self.layers, self.image, self.features, self.loss = tuple(layers), image, features, loss
        self.num_classes, self.optim = num_classes, optim or {}
        weight = torch.empty(num_classes, in_features)
        if init == "uniform":
            bound = max(in_features, 1)**-0.5
            nn.init.uniform_(weight, -bound, bound)
        else:
            nn.init.constant_(weight, float(init == "ones"))
        self.weight = nn.Parameter(weight)
        #: X'X and X'Y of the batches so far, where least squares will set the weight.
        self.gram: tuple[torch.Tensor, torch.Tensor] | None = None
        self.bias = nn.Parameter(torch.zeros(num_classes)) if bias else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes), in the weight's dtype."""
        return F.linear(features.to(self.weight.dtype), self.weight, self.bias)
