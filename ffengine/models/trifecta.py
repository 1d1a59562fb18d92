"""The Trifecta (Dooms et al. 2023): SymBa, normalisation, overlapping local updates.

Tables 1 and 2; 6 and 12 convolutions, FCN 6 x 2048. Deviations kept from the published code:
softplus(-alpha (pos - neg)) (the paper prints the opposite sign), means of squares and batch means
instead of sums, LayerNorm with mean and affine map, alternation per batch (the paper: per epoch,
`update="olu-epoch"`), two Adam states a parameter, an idle last block in odd steps, torch's
initial weights (the paper: Kaiming). Probes are single linear heads (the paper's have layers).
"""

from __future__ import annotations

import math
from typing import Any, Literal

from ffengine.engine.schedules.schedule import Overlapping, Schedule, Together
from ffengine.models.registry import Recipe, register
from ffengine.nn import (
    LabelChannel,
    LinearHead,
    LocalConv2d,
    LocalLinear,
    LocalNet,
    PreNorm,
    Readout,
    Wire,
)
from ffengine.nn.checks import as_many, one_of
from ffengine.nn.layers import LocalLayer
from ffengine.nn.norms import KINDS
from ffengine.ops.config import LocalPassConfig, Norm, symba, threshold

#: (channels, pool after) per layer
SHALLOW = ((128, True), (128, False), (256, True), (256, False), (256, False), (512, True))
DEEP = ((64, False), (128, True), (128, False), (128, False), (128, False), (256, True),
        (256, False), (256, False), (256, False), (512, True), (512, False), (512, False))
UPDATES: dict[str, Any] = {"olu": "batch", "olu-epoch": "epoch", "olu-both": "both"}


def network(rows: tuple[tuple[int, bool], ...], num_classes: int, image: tuple[int, int, int],
            dense: bool, *,
            loss: Literal["symba", "threshold"] = "symba", alpha: float = 4.0, theta: float = 2.0,
            norm: str = "batch", update: str = "olu", residual: bool = False,
            readout: Literal["last", "last3", "head"] = "last", negatives: str = "random",
            neutral: Literal["mean", "random"] = "mean", probes: bool = False,
            embedding: Literal["auto", "learned", "random"] = "auto") -> LocalNet:
    """Norm of the input -> conv3x3 (or linear) -> relu -> pool; the label as one more channel.

    probes: a linear classifier per layer beside the training (fig. 8). embedding: "auto" is learned
    with overlapping updates, random without (the paper's way; the code has a flag).
    """
    one_of("trifecta", "loss", loss, ("symba", "threshold"))
    one_of("trifecta", "readout", readout, ("last", "last3", "head"))
    one_of("trifecta", "norm", norm, ("none", *KINDS))
    one_of("trifecta", "update", update, ("layer", *UPDATES))
    one_of("trifecta", "embedding", embedding, ("auto", "learned", "random"))
    schedule: Schedule = Together() if update == "layer" else Overlapping(UPDATES[update])
    learned = isinstance(schedule, Overlapping) if embedding == "auto" else embedding == "learned"
    encoding = LabelChannel(num_classes, image, learned=learned, neutral=neutral)
    objective = symba(alpha) if loss == "symba" else threshold(theta)
    layers: list[LocalLayer] = []
    wires: list[Wire] = []
    shape, widths = encoding.shape, []
    for width, pool in rows:
        shape = (math.prod(shape),) if dense else shape
        config = LocalPassConfig(groups=1, goodness="mean_sq", loss=objective, norm=Norm("none"),
                                 pool="max2" if pool else "none")
        parts: dict[str, Any] = {"config": config, "bias": False, "init": "torch", "pre_norm": (
            None if norm == "none" else PreNorm(norm, shape))}  # type: ignore[arg-type]
        layers.append(LocalLinear(shape[0], width, **parts) if dense
                      else LocalConv2d(shape[0], width, 3, **parts))
        same = residual and layers[-1].z_shape(shape) == shape
        wires.append(Wire(join="add" if same and wires else "none", branch=residual))
        shape = layers[-1].z_shape(shape)
        widths.append(math.prod(shape))
    last = len(layers) - 1
    read = range(last + 1) if probes else range(last, last + 1)
    heads = [LinearHead((i,), widths[i], num_classes, image="neutral",
                        optim={"kind": "adam", "lr": 1e-3}) for i in read]
    by_head = readout == "head"
    net = LocalNet(layers, wires, num_classes=num_classes, in_shape=image, input_norm="none",
                   layer_range=(max(0, last - 2) if readout == "last3" else last, last),
                   encoding=encoding, negatives=negatives, heads=heads if by_head or probes else (),
                   readout=Readout("head", head=len(read) - 1) if by_head else Readout())
    net.schedule, net.selects_range = schedule, False
    return net


def _recipe(epochs: int, drops: tuple[tuple[int, float], ...]) -> Recipe:
    return Recipe(optimizer="adam", lr=1e-3, epochs=epochs, batch_size=512, lr_drops=drops)


#: Short: small batches at a high rate that falls learn most in a given time.
SMALL = {"epochs": 10, "batch_size": 32, "lr": 3e-3, "lr_min": 1e-4, "lr_drops": ()}


@register("trifecta/shallow", paper="Trifecta", recipe=_recipe(200, ((150, 0.1),)), digits=SMALL,
          shared=network)
def shallow(num_classes: int = 10, in_channels: int = 3, image_size: int = 32,
            widths: tuple[int, ...] = tuple(w for w, _ in SHALLOW), **options: Any) -> LocalNet:
    """6 convolutions: 128p, 128, 256p, 256, 256, 512p."""
    as_many("trifecta", "widths", widths, len(SHALLOW))
    rows = tuple((w, pool) for w, (_, pool) in zip(widths, SHALLOW, strict=True))
    return network(rows, num_classes, (in_channels, image_size, image_size), False, **options)


@register("trifecta/deep", paper="Trifecta", recipe=_recipe(500, ((200, 0.5), (400, 0.2))),
          digits=SMALL, shared=network)
def deep(num_classes: int = 10, in_channels: int = 3, image_size: int = 32,
         widths: tuple[int, ...] = tuple(w for w, _ in DEEP), **options: Any) -> LocalNet:
    """12 convolutions: 64, 128p, 128 x 3, 256p, 256 x 3, 512p, 512, 512."""
    as_many("trifecta", "widths", widths, len(DEEP))
    rows = tuple((w, pool) for w, (_, pool) in zip(widths, DEEP, strict=True))
    return network(rows, num_classes, (in_channels, image_size, image_size), False, **options)


# 2048 inputs a unit want a lower rate: 66 to 80 % in the first 6 epochs at 2e-3
@register("trifecta/fcn", paper="Trifecta", recipe=_recipe(200, ((150, 0.1),)), shared=network,
          digits={**SMALL, "epochs": 8, "batch_size": 64, "lr": 2e-4, "lr_min": 4e-5})
def fcn(num_classes: int = 10, in_channels: int = 1, image_size: int = 28, width: int = 2048,
        depth: int = 6, **options: Any) -> LocalNet:
    """6 x 2048 linear layers."""
    return network(((width, False),) * depth, num_classes, (in_channels, image_size, image_size),
                   True, **options)
