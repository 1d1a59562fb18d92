"""Backpropagation twins, `bp/<model name>`: the same network, trained end to end.

Mean goodness per class (DeeperForward's) is read as logits; the other networks end in a linear
classifier on the last layer, those of positive and negative samples on an image without a label.
Two papers' baselines are no twins: FFLib's BPNN, and the ResNet-18 of DeeperForward's tables.
Adam at 1e-4 and at least as many epochs as the paper's own baselines.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ffengine.engine.schedules.backprop import Backprop
from ffengine.models import deeperforward, fflib
from ffengine.models.registry import Entry, Recipe, enter, entry, names, register
from ffengine.nn import LinearHead, LocalLinear, LocalNet, Readout, RecurrentNet
from ffengine.nn.resnet import ResNet
from ffengine.ops.config import LocalPassConfig, Norm

RECIPE = Recipe(optimizer="adam", lr=1e-4, epochs=60, batch_size=128)
SMALL = replace(RECIPE, lr=1e-3, epochs=8, batch_size=64)
#: Large networks train fewer epochs of the digits (ResNet-17: 14 s each on one core).
FEWER = {"deeperforward/resnet17": 5, "deeperforward/resnet33": 4, "deeperforward/resnet100": 4,
         "sn/cifar100": 5}


def twin(original: Entry, **options: Any) -> LocalNet:
    """The model's network, set to be trained by backpropagation."""
    net = original.build(**options)
    net.requires_grad_(True)
    last = len(net.layers) - 1
    net.heads, net.readout = nn.ModuleList(), Readout()
    if net.layer(last).config.goodness != "mean":  # squares are poor logits: sn/cifar10 40 ± 26 %
        if net.encoding is not None:
            net.encoding.requires_grad_(False)
        recurrent = isinstance(net, RecurrentNet)  # which gives all of its states
        read = range(last + 1) if recurrent else range(last, last + 1)
        width = sum(math.prod(net.shapes[i + 1]) for i in read)
        net.heads.append(LinearHead(read, width, net.num_classes, image="blank"))
        net.readout = Readout("head")
    net.set_range(last, last)
    for i in range(last + 1):
        net.layer(i).label_map = None
    gamma = getattr(net, "gamma", None)
    if isinstance(gamma, torch.Tensor):
        gamma.requires_grad_(False)
    net.schedule, net.selects_range = Backprop(), False
    return net


@register("bp/fflib/bpnn", paper="FFLib", recipe=RECIPE, scale=fflib.SCALE, digits={
    "lr": 1e-3, "epochs": 8})
def bpnn(num_classes: int = 10, in_channels: int = 1, image_size: int = 28,
         layers: tuple[int, ...] = (2000, 2000)) -> LocalNet:
    """FFLib's BPNN: 784-2000-2000-10, relu, no length norms and no place for a label."""
    image = (in_channels, image_size, image_size)
    config = LocalPassConfig(groups=1, goodness="mean_sq", norm=Norm("none"))
    chain = [LocalLinear(i, o, config=config, init="torch")
             for i, o in zip((math.prod(image), *layers[:-1]), layers, strict=True)]
    last = len(layers) - 1
    head = LinearHead((last,), layers[-1], num_classes, image="blank")
    net = LocalNet(chain, num_classes=num_classes, in_shape=image, input_norm="none",
                   layer_range=(last, last), heads=(head,), readout=Readout("head"))
    net.schedule, net.selects_range = Backprop(), False
    return net


@register("bp/deeperforward/resnet18", paper="DeeperForward", scale=deeperforward.SCALE,
          recipe=Recipe(optimizer="adamw", lr=1e-3, lr_min=1e-5, weight_decay=5e-4),
          digits={"lr_min": 1e-5, "epochs": 5})
def resnet18(num_classes: int = 10, in_channels: int = 3, image_size: int = 32,
             widths: tuple[int, ...] = (64, 128, 256, 512),
             counts: tuple[int, ...] = (2, 2, 2, 2)) -> LocalNet:
    """ResNet-18 for 32x32 images: 3x3 stem, no max pool. The rates are ours, the paper has none."""
    net = ResNet(widths, counts, num_classes=num_classes,
                 in_shape=(in_channels, image_size, image_size))
    net.schedule, net.selects_range = Backprop(), False
    return net


def register_twins() -> None:
    """Enter a twin of every model registered so far that is none."""
    for name in (n for n in names() if not n.startswith("bp/")):
        found = entry(name)
        enter(Entry(f"bp/{name}", f"backpropagation twin ({found.paper})",
                    functools.partial(twin, found), RECIPE, {"digits": replace(
                        SMALL, epochs=FEWER.get(name, SMALL.epochs))},
                    shared=(found.build, *found.shared), data_options=found.data_options,
                    scale=found.scale))
