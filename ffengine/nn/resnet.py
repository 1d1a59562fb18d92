"""ResNet for small images (He et al. 2016): an opponent, trained by backpropagation alone.

    stem 3x3; stages of blocks  x -> relu(bn(conv(relu(bn(conv x)))) + shortcut(x)); mean; linear

A stage after the first halves the map; where a block changes the shape its shortcut is a 1x1
convolution with BatchNorm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ffengine.nn.differentiable import Call, direct
from ffengine.nn.drawing import he_normal
from ffengine.nn.plain import PlainNet


class NormedConv(nn.Conv2d):
    """Convolution without bias, then BatchNorm; He-normal (fan_out) weights."""

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, ins: int, outs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(ins, outs, kernel, stride, kernel // 2, bias=False)
        he_normal(self.weight)
        self.norm_weight, self.norm_bias = (
            nn.Parameter(torch.full((outs,), value)) for value in (1.0, 0.0))
        self.register_buffer("running_mean", torch.zeros(outs))
        self.register_buffer("running_var", torch.ones(outs))

    def normed(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        """bn(conv x), of the batch's statistics in training, which then move the running ones."""
        return F.batch_norm(self(x), self.running_mean, self.running_var, self.norm_weight,
                            self.norm_bias, training)


class Block(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = NormedConv(ins, outs, 3, stride), NormedConv(outs, outs, 3)
        same = ins == outs and stride == 1
        self.shortcut = None if same else NormedConv(ins, outs, 1, stride)

    def forward(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        past = x if self.shortcut is None else self.shortcut.normed(x, training)
        inner = F.relu(self.first.normed(x, training))
        return F.relu(self.second.normed(inner, training) + past)


class ResNet(PlainNet):
    """The network; scores are the classifier's logits.

    Args:
        widths: channels per stage, the first also of the stem.
        counts: blocks per stage.
    """

    def __init__(self, widths: Sequence[int], counts: Sequence[int], *, num_classes: int,
                 in_shape: tuple[int, int, int]) -> None:
        if len(widths) != len(counts) or not widths or min(*widths, *counts) < 1:
            raise ValueError("[resnet] expected as many widths as counts, all 1 or more, got "
                             f"{tuple(widths)} and {tuple(counts)}")
        super().__init__(widths[-1], num_classes=num_classes, in_shape=in_shape)
        self.stem = NormedConv(in_shape[0], widths[0], 3)
        self.blocks, last = nn.ModuleList(), widths[0]
        for stage, (width, count) in enumerate(zip(widths, counts, strict=True)):
            for block in range(count):
                self.blocks.append(Block(last, width, 2 if stage and not block else 1))
                last = width

    def features(self, x: torch.Tensor, training: bool, call: Call = direct) -> torch.Tensor:
        """(N, channels) of samples (N, C, H, W): the last map's means."""
        x = F.relu(self.stem.normed(x, training))
        for block in self.blocks:
            x = call(block, x, training)
        return x.mean((2, 3))
