"""What the comparators' networks are made of: hidden layers in plain PyTorch under a classifier.

    a = W x + b;   h = relu or tanh(a);   z = pool(BatchNorm(h)), where a layer has them
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ffengine.nn.checks import one_of
from ffengine.nn.differentiable import Call, direct
from ffengine.nn.plain import PlainNet

Activation = Literal["relu", "tanh"]


def he_uniform(*shape: int) -> torch.Tensor:
    """U(-b, b) with b = sqrt(6 / fan_in), fan_in all but the first axis (He et al. 2015)."""
    bound = math.sqrt(6 / max(math.prod(shape[1:]), 1))
    return torch.empty(shape).uniform_(-bound, bound)


class Hidden(nn.Module):
    """One hidden layer, a convolution of stride 1 where it has a kernel.

    Args:
        shape: per sample, (C, H, W) or (features,), of what arrives; maps become rows where there
            is no kernel.
        width: units or channels.
        norm: BatchNorm after the activation. pool: 2x2 max pool after that.
        init: "torch": its layers' own; "he": he_uniform.
    """

    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None

    def __init__(self, shape: tuple[int, ...], width: int, *, kernel: int = 0, padding: int = 0,
                 activation: Activation = "relu", norm: bool = False, pool: bool = False,
                 bias: bool = True, init: Literal["torch", "he"] = "torch") -> None:
        super().__init__()
        one_of("baselines", "activation", activation, ("relu", "tanh"))
        self.kernel, self.padding, self.activation, self.pool = kernel, padding, activation, pool
        side = [s + 2 * padding - kernel + 1 for s in shape[1:]] if kernel else []
        #: Per-sample shapes of h and of z.
        self.h_shape = (width, *side)
        self.z_shape = (width, *(s // 2 for s in side)) if pool else self.h_shape
        if min(self.z_shape) < 1:
            raise ValueError(f"[baselines] an input of {shape} is too small for a layer of shape "
                             f"{self.z_shape}")
        ins = (shape[0], kernel, kernel) if kernel else (math.prod(shape),)
        bound = math.prod(ins)**-0.5
        self.weight = nn.Parameter(he_uniform(width, *ins) if init == "he" else (
            torch.empty(width, *ins).uniform_(-bound, bound)))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound)) if bias else None
        self.norm_weight = nn.Parameter(torch.ones(width)) if norm else None
        self.norm_bias = nn.Parameter(torch.zeros(width)) if norm else None
        self.register_buffer("running_mean", torch.zeros(width) if norm else None)
        self.register_buffer("running_var", torch.ones(width) if norm else None)

    def preactivation(self, x: torch.Tensor) -> torch.Tensor:
        """a of the layer below's z."""
        if self.kernel:
            return F.conv2d(x, self.weight, self.bias, padding=self.padding)
        return F.linear(x.flatten(1), self.weight, self.bias)

    def activate(self, a: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """h of a; times a dropout mask."""
        h = a.tanh() if self.activation == "tanh" else a.relu()
        return h if mask is None else h * mask

    def finish(self, h: torch.Tensor, training: bool) -> torch.Tensor:
        """z of h, by the batch's statistics in training."""
        if self.norm_weight is not None:
            h = F.batch_norm(h, self.running_mean, self.running_var, self.norm_weight,
                             self.norm_bias, training)
        return F.max_pool2d(h, 2) if self.pool else h

    def forward(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        return self.finish(self.activate(self.preactivation(x)), training)

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters that are not frozen."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}


def check_pools(pools: Sequence[int], convolutions: int) -> None:
    """ValueError unless they are numbers, from 1, of convolutions."""
    if not set(pools) <= set(range(1, convolutions + 1)):
        raise ValueError(f"[baselines] pools expected convolutions of 1..{convolutions}, got "
                         f"{tuple(pools)}")


def stack(image: tuple[int, ...], channels: Sequence[int], layers: Sequence[int],
          pools: Sequence[int], *, kernel: int = 3, padding: int = 1, norm: bool = False,
          activation: Activation = "relu", bias: bool = True,
          init: Literal["torch", "he"] = "torch") -> list[Hidden]:
    """Convolutions of these channels, then linear layers; `pools`: those that pool, from 1."""
    check_pools(pools, len(channels))
    shape, made = image, []
    for i, width in enumerate([*channels, *layers]):
        conv = i < len(channels)
        made.append(Hidden(shape, width, kernel=kernel if conv else 0, norm=norm and conv,
                           padding=padding if conv else 0, pool=i + 1 in pools, bias=bias,
                           activation=activation, init=init))
        shape = made[-1].z_shape
    return made


class HiddenNet(PlainNet):
    """Hidden layers under a classifier. How they learn is what `gradients` of a subclass says.

    Args:
        means: the classifier sees a map's mean per channel; else all of it.
    """

    def __init__(self, hidden: Sequence[Hidden], *, num_classes: int, in_shape: tuple[int, ...],
                 bias: bool = True, means: bool = False) -> None:
        if not hidden:
            raise ValueError("[baselines] expected one hidden layer or more, got none")
        top = hidden[-1].z_shape
        super().__init__(top[0] if means else math.prod(top), num_classes=num_classes,
                         in_shape=in_shape, bias=bias)
        self.hidden, self.means = nn.ModuleList(hidden), means

    def chain(self) -> list[Hidden]:
        """The hidden layers, typed."""
        return [layer for layer in self.hidden if isinstance(layer, Hidden)]

    def read(self, z: torch.Tensor) -> torch.Tensor:
        """(N, features) that a classifier sees of z."""
        return z.mean((2, 3)) if self.means and z.dim() == 4 else z.flatten(1)

    def features(self, x: torch.Tensor, training: bool, call: Call = direct) -> torch.Tensor:
        for layer in self.chain():
            x = call(layer, x, training)
        return self.read(x)
