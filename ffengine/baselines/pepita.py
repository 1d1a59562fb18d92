"""PEPITA (Dellaferrera & Kreiman 2022, algorithm 1): a second forward pass in place of a backward.

    h_0 = x;          h_l = f(W_l h_{l-1});            e = softmax(h_L) - y*
    h'_0 = x + F e;   h'_l = f(W_l h'_{l-1})           F (inputs, classes) fixed and random
    dW_l = (h_l - h'_l) h'_{l-1}'   (hidden);          dW_L = e h'_{L-1}'

as means over the batch, and over positions in a convolution. No layer has a bias. F ~ U(+-s
sqrt(6 / inputs)) with s = 0.05. Both passes drop the same units, and h holds the mask. The authors'
code divides a convolution's update by the batch a second time; ours does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ffengine.baselines.hidden import Hidden, HiddenNet
from ffengine.nn.credit import Credit, cast
from ffengine.ops.config import Dropout


class PepitaNet(HiddenNet):
    """Hidden layers, without norms, that learn from how a modulated input changes them.

    Args:
        dropout: drop probability of hidden units in training.
        projection: s above.

    Attributes:
        projection: F, (inputs, classes), fixed.
    """

    projection: torch.Tensor

    def __init__(self, hidden: Sequence[Hidden], *, dropout: float = 0.0,
                 projection: float = 0.05, **rest: Any) -> None:
        Dropout(dropout)  # validates the probability
        super().__init__(hidden, bias=False, **rest)
        self.dropout = dropout
        inputs = math.prod(self.in_shape)
        bound = projection * math.sqrt(6 / inputs)
        self.register_buffer("projection", torch.empty(inputs, self.num_classes).uniform_(
            -bound, bound))
        bound = math.sqrt(6 / self.layer(0).in_size)
        torch.nn.init.uniform_(self.layer(0).weight, -bound, bound)

    def gradients(self, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> Credit:
        masks = [self._mask(x, layer.h_shape) for layer in self.chain()]
        with cast(x, dtype):
            with torch.no_grad():
                first, z = self._run(x, masks)
                logits = self.classify(self.read(z)).to(x.dtype)
                error = logits.softmax(1) - F.one_hot(y, self.num_classes)
                modulated = x + (error @ self.projection.t()).view_as(x)
            second, z = self._run(modulated, masks)
        found = {"layers.0.weight": error.t() @ self.read(z).detach().to(x.dtype) / len(y)}
        for i, ((_, h), (a, changed)) in enumerate(zip(first, second, strict=True)):
            positions = math.prod(h.shape[2:])
            moved = (h - changed).detach() / (len(y) * positions)
            found[f"hidden.{i}.weight"], = torch.autograd.grad(
                a, self.chain()[i].weight, moved.to(a.dtype))
        return F.cross_entropy(logits, y), logits, found

    def _mask(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
        if not self.dropout:
            return None
        kept = torch.rand(x.shape[0], *shape, device=x.device) >= self.dropout
        return kept.to(x.dtype) / (1 - self.dropout)

    def _run(self, x: torch.Tensor, masks: list[torch.Tensor | None],
             ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """((a, h) of every hidden layer, the last one's z); no graph crosses a layer."""
        states, z = [], x
        for layer, mask in zip(self.chain(), masks, strict=True):
            a = layer.preactivation(z.detach())
            h = layer.activate(a, mask)
            z = layer.finish(h, True)
            states.append((a, h))
        return states, z
