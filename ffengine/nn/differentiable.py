"""The networks as plain differentiable PyTorch: what backpropagation trains, and baselines time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ffengine.nn.heads import LinearHead
from ffengine.nn.layers import LocalLayer
from ffengine.ops.config import BatchNorm
from ffengine.reference import local_pass as reference

if TYPE_CHECKING:
    from ffengine.nn.network import LocalNet


def activation(layer: LocalLayer, x: torch.Tensor, training: bool) -> torch.Tensor:
    """h of the layer's input x: input norm, weight, relu, dropout, pool, BatchNorm."""
    if layer.pre_norm is not None:
        x = layer.pre_norm(x)
    geometry = layer.geometry
    if geometry is None:
        a = F.linear(x, layer.weight, layer.bias)
    else:
        a = F.conv2d(x, layer.weight, layer.bias, geometry.stride, geometry.padding,
                     groups=geometry.groups)
    h = F.relu(a, inplace=True)
    h = F.dropout(h, layer.dropout, training) if layer.dropout else h
    pools, couple = layer.config.pool == "max2", layer.couple
    if not isinstance(couple, BatchNorm):
        return F.max_pool2d(h, 2) if pools else h
    if pools and couple.order == "pool_norm":
        h = F.max_pool2d(h, 2)
    h = F.batch_norm(h, layer.running_mean, layer.running_var, layer.norm_weight, layer.norm_bias,
                     training and not couple.use_running, couple.momentum, couple.eps)
    return F.max_pool2d(h, 2) if pools and couple.order == "norm_pool" else h


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


def logits(net: LocalNet, x: torch.Tensor) -> torch.Tensor:
    """Logits (N, classes) of samples x: of the first head, else the last layer's goodness."""
    head = net.heads[0] if len(net.heads) else None
    end = len(net.layers) - 1
    if isinstance(head, LinearHead):
        end = max(head.layers)
    x = net.blank(x)
    shortcut, zs, h = None, [], x
    for i in range(end + 1):
        layer = net.layer(i)
        h = activation(layer, net.transform(i, x), net.training)
        if head is None and i == end:
            return goodness(layer, h)
        x, shortcut = net.join(i, normalise(layer, h), shortcut)
        zs.append(x)
    assert isinstance(head, LinearHead)
    scores: torch.Tensor = head(torch.cat([zs[i].flatten(1) for i in head.layers], 1))
    return scores
