"""Local layers: a linear map or a convolution whose neurons form class groups.

A layer owns weights and the settings of its `local_pass`; how it is trained lives in
`ffengine.engine`, how layers are wired in `ffengine.nn.network`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ffengine.nn.convolution import convolve
from ffengine.ops.config import Dropout, LocalPassConfig
from ffengine.ops.weight_update import ConvGeometry


class LocalLayer(nn.Module):
    """Base of the local layers: weight, optional bias, and the settings of the sweep.

    `weight` is fp32 (fp64 for the reference) and, for convolutions, channels_last in memory.
    `config` holds groups, goodness, loss, norm; `dropout` is the drop probability in training.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    geometry: ConvGeometry | None = None

    def __init__(self, config: LocalPassConfig, dropout: float = 0.0) -> None:
        super().__init__()
        Dropout(dropout)  # validates the probability
        self.config = config
        self.dropout = dropout

    def preactivation(self, x: torch.Tensor) -> torch.Tensor:
        """a of the layer's input x, in x's dtype."""
        raise TypeError(f"[{type(self).__name__}] expected a layer with a preactivation")

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Per-sample shape of a, from the per-sample shape of x."""
        raise TypeError(f"[{type(self).__name__}] expected a layer with an out_shape")

    def settings(self, seed: int = 0, index: int = 0, step: int = 0) -> LocalPassConfig:
        """The sweep's settings in one training step; without dropout they never change."""
        if self.dropout == 0.0:
            return self.config
        drop = Dropout(self.dropout, seed, index, step)
        return replace(self.config, dropout=drop)

    def cast(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias in the compute dtype (no copy when it is the weights' own)."""
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return self.weight.detach().to(dtype), bias


class LocalConv2d(LocalLayer):
    """conv -> sweep (CW-Conv of DeeperForward, sec. 3.2). He-normal init, fan_out."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1,
                 padding: int | None = None, bias: bool = False, dropout: float = 0.0,
                 config: LocalPassConfig | None = None) -> None:
        super().__init__(config or LocalPassConfig(), dropout)
        self.config.offsets(out_channels)
        padding = kernel_size // 2 if padding is None else padding
        self.in_channels, self.out_channels = in_channels, out_channels
        self.geometry = ConvGeometry((kernel_size, kernel_size), stride, padding)
        weight = torch.empty(out_channels, in_channels, kernel_size, kernel_size)
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def preactivation(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.cast(x.dtype)
        geometry = self.geometry
        assert geometry is not None
        return convolve(x, weight, bias, geometry)

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        geometry = self.geometry
        assert geometry is not None
        size = [(s + 2 * geometry.padding - k) // geometry.stride + 1
                for s, k in zip(shape[1:], geometry.kernel, strict=True)]
        return (self.out_channels, *size)

    def extra_repr(self) -> str:
        g = self.geometry
        assert g is not None
        return f"{self.in_channels}, {self.out_channels}, {g.kernel[0]}, stride={g.stride}"


class LocalLinear(LocalLayer):
    """linear -> sweep; input (N, in_features), maps are flattened."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True,
                 dropout: float = 0.0, config: LocalPassConfig | None = None) -> None:
        super().__init__(config or LocalPassConfig(), dropout)
        self.config.offsets(out_features)
        self.in_features, self.out_features = in_features, out_features
        weight = torch.empty(out_features, in_features)
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def preactivation(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.cast(x.dtype)
        return F.linear(x, weight, bias)

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.out_features,)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


def as_channels_last(x: torch.Tensor) -> torch.Tensor:
    """A map (N, C, H, W) in channels_last, its strides unmistakable.

    With one channel both layouts are the same memory; torch then sees a contiguous map and the
    library would answer in that layout, through reordered copies of the whole batch.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    _, channels, h, w = x.shape
    return x.as_strided(x.shape, (h * w, 1, w, 1)) if channels == 1 else x


def keep_weights_channels_last(module: nn.Module, *_: Any) -> None:
    """Restore the weights' memory layout after loading or moving (values are untouched)."""
    for layer in module.modules():
        if isinstance(layer, LocalConv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
