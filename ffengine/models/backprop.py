"""Backpropagation twins, `bp/<model name>`: the same network, trained end to end.

Mean goodness per class (DeeperForward's) is read as logits; the other networks end in a linear
classifier on the last layer, those of positive and negative samples on an image without a label
(BPNN of FFLib's table 2).
Adam at 1e-4 and at least as many epochs as the paper's own baselines.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ffengine.engine.backprop import Backprop
from ffengine.models.registry import Entry, Recipe, enter, entry, names
from ffengine.nn import LinearHead, LocalNet, Readout, RecurrentNet

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


def register_twins() -> None:
    """Enter a twin of every model registered so far."""
    for name in names():
        found = entry(name)
        enter(Entry(f"bp/{name}", f"backpropagation twin ({found.paper})",
                    functools.partial(twin, found), RECIPE, {"digits": replace(
                        SMALL, epochs=FEWER.get(name, SMALL.epochs))},
                    shared=(found.build, *found.shared), data_options=found.data_options))
