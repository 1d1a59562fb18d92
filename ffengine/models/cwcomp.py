"""CwComp (Papachristodoulou et al., AAAI 2024): channel-wise competitive CNNs, table 2.

conv -> relu -> pool -> BatchNorm (eps 1e-4), mean of squares per class. Deviations from the code
unless asked for: `double_softmax=True` gives the head the published bug (cross-entropy of the
softmax); `class_groups` are blocks of labels, label // size, which are not CIFAR-100's real
super-classes.
"""

from __future__ import annotations

import math
from typing import Literal

from ffengine.data.superclasses import blocks
from ffengine.engine.schedules.schedule import Interleaved, Together
from ffengine.models.registry import Recipe, register
from ffengine.nn import LinearHead, LocalConv2d, LocalNet, Readout
from ffengine.nn.checks import one_of
from ffengine.ops.config import BatchNorm, LocalPassConfig, Loss, Norm, ce, cwc, cwg, pvn

LOSSES: dict[str, Loss] = {"cwc": cwc(), "ce": ce(), "pvn": pvn(2.0), "cwg": cwg()}
CHANNELS = (20, 80, 240, 480)
#: Interleaved training, (start, end) epochs of the layers and of the head, by data set.
ILT = {
    ("mnist", "fast"): ((0, 3), (1, 4), (2, 5), (3, 6), (5, 20)),
    ("mnist", "acc"): ((0, 2), (0, 3), (0, 4), (0, 5), (0, 20)),
    ("fashion_mnist", "fast"): ((0, 7), (1, 10), (2, 13), (3, 16), (5, 40)),
    ("fashion_mnist", "acc"): ((0, 10), (0, 15), (0, 19), (0, 23), (0, 50)),
    ("cifar10", "fast"): ((0, 11), (2, 18), (4, 26), (6, 32), (10, 50)),
    ("cifar10", "acc"): ((0, 11), (0, 16), (0, 21), (0, 25), (0, 50)),
}
Net = Literal["goodness", "softmax"]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SCALE = {"fashion_mnist": (0.5, 0.5), "cifar10": IMAGENET, "cifar100": IMAGENET}


def network(grouped: bool, num_classes: int, image: tuple[int, int, int],
            channels: tuple[int, ...], loss: str, ilt: str, dataset: str, predictor: Net,
            class_groups: int | None, double_softmax: bool,
            pools: tuple[int, ...] | None) -> LocalNet:
    """Layers 2, 4, ... pool, and are grouped by class where `grouped` (CFSE).

    pools: the layers that pool instead, counted from 1.
    """
    pooling = set(range(2, len(channels) + 1, 2) if pools is None else pools)
    if not pooling <= set(range(1, len(channels) + 1)):
        raise ValueError(f"[cwcomp] pools expected layers of 1..{len(channels)}, got {pools}")
    if class_groups is not None and predictor == "goodness":
        raise ValueError("[cwcomp] class_groups expected predictor=softmax: goodness tells groups, "
                         "not classes; got predictor=goodness")
    if loss not in LOSSES:
        raise ValueError(f"[cwcomp] loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    one_of("cwcomp", "predictor", predictor, ("goodness", "softmax"))
    supers = None if class_groups is None else blocks(num_classes, class_groups)
    k = num_classes if supers is None else supers.num_super
    shape, layers = image, []
    for i, width in enumerate(channels):
        config = LocalPassConfig(groups=k, goodness="mean_sq", loss=LOSSES[loss],
                                 norm=Norm("none"), pool="max2" if i + 1 in pooling else "none")
        layers.append(LocalConv2d(
            shape[0], width, 3, bias=True, groups=k if grouped and i % 2 else 1, config=config,
            batch_coupling=BatchNorm(eps=1e-4, order="pool_norm"), init="torch"))
        if supers is not None:
            layers[-1].relabel(supers.map)
        shape = layers[-1].z_shape(shape)  # type: ignore[assignment]
    last = len(layers) - 1
    head = LinearHead((last,), math.prod(shape), num_classes,
                      loss="double-softmax" if double_softmax else "ce",
                      optim={"kind": "sgd", "lr": 0.01})
    net = LocalNet(layers, num_classes=num_classes, in_shape=image, input_norm="none",
                   layer_range=(last, last), heads=(head,),
                   readout=Readout("head") if predictor == "softmax" else Readout())
    net.schedule, net.selects_range = _schedule(ilt, dataset, len(layers)), False
    return net


def _schedule(ilt: str, dataset: str, depth: int) -> Together:
    if ilt == "none":
        return Together()
    if (dataset, ilt) not in ILT:
        raise ValueError(f"[cwcomp] ilt must be none, or fast or acc of "
                         f"{', '.join(sorted({d for d, _ in ILT}))}, got {ilt!r} of {dataset!r}")
    spans = ILT[dataset, ilt]
    # deeper networks of the code's other sizes give the last layer's span to what follows
    return Interleaved((*spans[:-1], *[spans[-2]] * (depth - len(spans) + 1), spans[-1]))  # type: ignore[return-value]


PAPER = Recipe(optimizer="adam", lr=0.01, epochs=50, batch_size=128)
SMALL = {"epochs": 20}


@register("cwcomp/cfse", paper="CwComp", recipe=PAPER, digits=SMALL, scale=SCALE,
          digits_options={"dataset": "mnist"})
def cfse(num_classes: int = 10, in_channels: int = 3, image_size: int = 32,
         channels: tuple[int, ...] = CHANNELS, loss: str = "cwc",
         ilt: Literal["fast", "acc", "none"] = "fast", dataset: str = "cifar10",
         predictor: Net = "goodness", class_groups: int | None = None,
         double_softmax: bool = False, pools: tuple[int, ...] | None = None) -> LocalNet:
    """Alternating full and class-grouped convolutions (channel-wise feature separator)."""
    return network(True, num_classes, (in_channels, image_size, image_size), channels, loss, ilt,
                   dataset, predictor, class_groups, double_softmax, pools)


# MNIST's spans are 60 steps a layer here: 93 %. While layers train their running statistics
# lag behind (15 % at the last such epoch, 98 % two later), so all must rest before the end.
@register("cwcomp/ffcnn", paper="CwComp", recipe=PAPER, digits={**SMALL, "lr": 3e-3},
          digits_options={"dataset": "fashion_mnist"}, scale=SCALE)
def ffcnn(num_classes: int = 10, in_channels: int = 3, image_size: int = 32,
          channels: tuple[int, ...] = CHANNELS, loss: str = "cwc",
          ilt: Literal["fast", "acc", "none"] = "fast", dataset: str = "cifar10",
          predictor: Net = "goodness", class_groups: int | None = None,
          double_softmax: bool = False, pools: tuple[int, ...] | None = None) -> LocalNet:
    """The same without groups."""
    return network(False, num_classes, (in_channels, image_size, image_size), channels, loss, ilt,
                   dataset, predictor, class_groups, double_softmax, pools)
