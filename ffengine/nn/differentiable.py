"""The networks as plain differentiable PyTorch: what backpropagation trains, and baselines time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ffengine.nn.chain import Chain
from ffengine.nn.heads import LinearHead
from ffengine.nn.layers import LocalLayer
from ffengine.ops.config import BatchNorm
from ffengine.reference import local_pass as reference
from ffengine.reference.norms import batch_normed

#: How the inside of a layer is called: as it is, or under torch.utils.checkpoint.
Call = Callable[..., Any]


def direct(inside: Call, *inputs: torch.Tensor) -> Any:
    """Call it, keeping what autograd keeps."""
    return inside(*inputs)


class StraightThrough(torch.autograd.Function):
    """relu whose gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
        return a.relu()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def activation(layer: LocalLayer, x: torch.Tensor, training: bool, *,
               straight_through: bool = False) -> torch.Tensor:
    """h of the layer's input x: input norm, weight, relu, dropout, pool, BatchNorm.

    straight_through: relu passes gradients as they are (a local step that asks for it;
    backpropagation never does).
    """
    if layer.pre_norm is not None:
        x = layer.pre_norm(x)
    geometry = layer.geometry
    if geometry is None:
        a = F.linear(x, layer.weight, layer.bias)
    else:
        a = F.conv2d(x, layer.weight, layer.bias, geometry.stride, geometry.padding,
                     groups=geometry.groups)
    if straight_through:
        h: torch.Tensor = StraightThrough.apply(a)  # type: ignore[no-untyped-call]
    else:
        h = F.relu(a, inplace=True)
    h = F.dropout(h, layer.dropout, training) if layer.dropout else h
    coupling = layer.batch_coupling
    if not isinstance(coupling, BatchNorm):
        return F.max_pool2d(h, 2) if layer.config.pool == "max2" else h
    return batch_normed(h, layer.config, coupling, (layer.running_mean, layer.running_var),
                        (layer.norm_weight, layer.norm_bias),
                        training and not coupling.use_running)


def goodness(layer: LocalLayer, h: torch.Tensor) -> torch.Tensor:
    """g (N, K) of h."""
    config = layer.config
    if isinstance(config.groups, int) and config.goodness == "mean":
        return h.reshape(h.shape[0], config.groups, -1).mean(2)
    return reference.goodness(h, config.offsets(h.shape[1]), config.goodness)


def normalise(layer: LocalLayer, h: torch.Tensor) -> torch.Tensor:
    """z of h."""
    config = layer.config
    if isinstance(config.groups, int) and config.norm.kind == "group":
        return F.group_norm(h, config.groups, eps=config.norm.eps)
    return reference.normalise(h, config.offsets(h.shape[1]), config)


def features(net: Chain, i: int, x: torch.Tensor) -> torch.Tensor:
    """z of layer i, before the join, from the map that arrives."""
    layer = net.layer(i)
    return normalise(layer, activation(layer, net.transform(i, x), net.training))


def logits(net: Chain, head: LinearHead | None, x: torch.Tensor, call: Call = direct,
           layout: torch.memory_format = torch.preserve_format) -> torch.Tensor:
    """Logits (N, classes) of samples x.

    Args:
        head: whose logits; None: the last layer's goodness.
        call: of every layer's inside but the last one's, whose backward pass comes first.
        layout: memory format of the first layer's input, if it is a map.
    """
    end = len(net.layers) - 1 if head is None else max(head.layers)
    read = set() if head is None else set(head.layers)
    x = net.blank(x)
    if x.dim() == 4 and layout is not torch.preserve_format:
        x = x.contiguous(memory_format=layout)
    shortcut, zs = None, {}
    for i in range(end + (head is not None)):
        inside = functools.partial(features, net, i)
        x, shortcut = net.join(i, inside(x) if i == end else call(inside, x), shortcut)
        if i in read:
            zs[i] = x.flatten(1)
    if head is None:
        layer = net.layer(end)
        return goodness(layer, activation(layer, net.transform(end, x), net.training))
    seen = [zs[i] for i in head.layers]
    scores: torch.Tensor = head(seen[0] if len(seen) == 1 else torch.cat(seen, 1))
    return scores


def batch_statistics(net: Chain) -> bool:
    """Backpropagation of the network depends on what else is in the batch."""
    layers = [net.layer(i) for i in range(len(net.layers))]
    norms = [layer.batch_coupling for layer in layers]
    return any(isinstance(norm, BatchNorm) and not norm.use_running for norm in norms) or any(
        layer.pre_norm is not None and layer.pre_norm.uses_batch_statistics for layer in layers)
