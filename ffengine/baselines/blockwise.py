"""Block-wise backpropagation: every block has a classifier of its own, and its gradient ends there.

    L_b = CE(W_b mean(z_b), y)   of block b;   dL_b reaches the parameters of block b and W_b

Cheng et al. 2024 ("Unlocking deep learning: a BP-free approach for parallel block-wise training",
the BWBPF of tables): a classifier on each block's pooled map. Their text ends gradients at a block;
their code lets them run through all blocks below (`isolated=False`). Enan 2025 (FFconv, a
repository): a 1x1 convolution to the classes averaged over pixels, which is the same classifier;
the loss is the mean over blocks, whose gradients run through, and the blocks' scores are added up
(`vote`). That code also draws a pattern of the true label on training and on test images; no scores
here see a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ffengine.baselines.hidden import Hidden, HiddenNet
from ffengine.nn.credit import Credit, cast
from ffengine.nn.differentiable import Call, direct


class BlockwiseNet(HiddenNet):
    """Hidden layers with a classifier on every block; the network's own is the last block's.

    Args:
        block: layers in a block.
        isolated: no gradient crosses into the block below.
        vote: the blocks' scores are added up, and their losses averaged instead of summed.
    """

    def __init__(self, hidden: Sequence[Hidden], *, num_classes: int, block: int = 1,
                 isolated: bool = True, vote: bool = False, **rest: Any) -> None:
        if block < 1:
            raise ValueError(f"[baselines] block expected a layer or more, got {block}")
        super().__init__(hidden, num_classes=num_classes, means=True, **rest)
        self.isolated, self.vote = isolated, vote
        #: Layers that end a block, the last one left out.
        self.ends = tuple(range(block - 1, len(hidden) - 1, block))
        self.predictors = nn.ModuleList(nn.Linear(hidden[i].z_shape[0], num_classes)
                                        for i in self.ends)

    def blocks(self, x: torch.Tensor, training: bool, call: Call = direct) -> list[torch.Tensor]:
        """What each block's classifier sees, the last being the network's own."""
        seen = []
        for i, layer in enumerate(self.chain()):
            x = call(layer, x, training)
            if i in self.ends:
                seen.append(self.read(x))
                x = x.detach() if self.isolated else x
        return [*seen, self.read(x)]

    def votes(self, seen: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Logits (N, classes) of every block."""
        return [*(predict(s) for predict, s in zip(self.predictors, seen[:-1], strict=True)),
                self.classify(seen[-1])]

    def scores(self, x: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
        with torch.no_grad():
            if not self.vote:
                return super().scores(x)
            return torch.stack(self.votes(self.blocks(self.entering(x), False))).sum(0)

    def gradients(self, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> Credit:
        with cast(x, dtype):
            votes = self.votes(self.blocks(x, True))
            losses = torch.stack([F.cross_entropy(v.to(x.dtype), y) for v in votes])
        loss = losses.mean() if self.vote else losses.sum()
        named = dict(self.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()))
        scores = torch.stack(votes).sum(0) if self.vote else votes[-1]
        told = loss if self.vote else losses[-1]
        return told, scores, dict(zip(named, found, strict=True))
