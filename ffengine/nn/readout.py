"""Class scores from what the layers say: goodness over a range of layers, a head, or predictors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from ffengine.nn.checks import one_of
from ffengine.reference.local_pass import sparsemax
from ffengine.typed import check_fields


@dataclass(frozen=True)
class Readout:
    """How class scores are read; shared by all models.

    source: "goodness": per class, summed over the network's layer range (last layer, all layers,
    the last n, or the range SIP chose are ranges); "head": logits of head `head`; "predictors":
    probabilities summed over all heads (CaFo).
    theta: goodness enters the sum as softplus(g - theta) (FFLib), None: as it is.
    maximize: the class of the highest sum wins; else of the lowest (FFLib's L-).
    relu: negative logits count as zero, the published FFNN+C's way.
    """

    source: Literal["goodness", "head", "predictors"] = "goodness"
    theta: float | None = None
    maximize: bool = True
    head: int = 0
    relu: bool = False
    squash: Literal["softmax", "sparsemax"] = "softmax"

    def __post_init__(self) -> None:
        check_fields("readout", self)
        one_of("readout", "source", self.source, ("goodness", "head", "predictors"))
        one_of("readout", "squash", self.squash, ("softmax", "sparsemax"))

    def of_goodness(self, goodness: Sequence[torch.Tensor]) -> torch.Tensor:
        """Scores (N, K) of goodness (N, K) per layer."""
        total = torch.stack(list(goodness))
        if self.theta is not None:
            total = above(total, self.theta)
        return total.sum(0) if self.maximize else -total.sum(0)

    def of_logits(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Scores (N, K) of the heads' logits (N, K)."""
        if self.source == "head":
            return logits[self.head].relu() if self.relu else logits[self.head]
        squash = sparsemax if self.squash == "sparsemax" else _softmax
        return torch.stack([squash(row) for row in logits]).sum(0)


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(1)


def above(goodness: torch.Tensor, theta: float) -> torch.Tensor:
    """softplus(g - theta), exact at both ends."""
    excess = goodness - theta
    return F.relu(excess) + torch.log1p(torch.exp(-excess.abs()))
