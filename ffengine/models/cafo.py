"""CaFo (Zhao et al. 2023): fixed random conv blocks, a linear predictor on each, summed.

conv3x3 -> relu -> pool -> BatchNorm (eps 1e-4), 32 * 4^i channels. Deviations from the code unless
asked for: BatchNorm evaluates with the training set's statistics, so that a prediction does not
depend on its batch (`batch_statistics=True`: as published, every set by its own); "mse" is the
least-squares solution (the code's reported "MSE" is an L1 distance); its sparsemax loss, off by
(C - 1) / 2, is the paper's here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from ffengine.engine.schedules.cascade import Cascade
from ffengine.models.registry import Recipe, register
from ffengine.nn import LinearHead, LocalConv2d, LocalNet, Readout
from ffengine.nn.layers import LocalLayer
from ffengine.ops.config import BatchNorm, LocalPassConfig, Norm

HEADS: dict[str, dict[str, Any]] = {
    "mse": {"init": "zeros"}, "ce": {"init": "ones"}, "sl": {"init": "ones", "loss": "sparsemax"},
    "bp": {"init": "uniform", "optim": {"kind": "adam", "eps": 1e-4}}}


@register("cafo/cnn", paper="CaFo", recipe=Recipe(optimizer="sgd", lr=0.01, epochs=5000,
                                                  batch_size=50_000),
          digits={"epochs": 30, "batch_size": 64},
          scale=dict.fromkeys(("cifar10", "cifar100"), (0.5, 0.5)))
def cnn(num_classes: int = 10, in_channels: int = 3, image_size: int = 32, num_blocks: int = 3,
        width: int = 32, predictor: Literal["mse", "ce", "sl", "bp"] = "ce",
        batch_statistics: bool = False) -> LocalNet:
    """Blocks of 32, 128, 512 channels; predictors: closed form, cross-entropy, sparsemax, Adam."""
    image = (in_channels, image_size, image_size)
    shape: tuple[int, ...] = image
    layers: list[LocalLayer] = []
    for i in range(num_blocks):
        config = LocalPassConfig(groups=1, goodness="mean_sq", norm=Norm("none"), pool="max2")
        layers.append(LocalConv2d(shape[0], width * 4**i, 3, bias=True, config=config, init="torch",
                                  batch_coupling=BatchNorm(eps=1e-4, order="pool_norm",
                                                   momentum=0.0 if batch_statistics else 0.1)))
        shape = layers[-1].z_shape(shape)
    net = cascade(layers, num_classes, image, predictor)
    net.batch_statistics = batch_statistics
    return net


def cascade(layers: Sequence[LocalLayer], num_classes: int, image: tuple[int, int, int],
            predictor: str) -> LocalNet:
    """These layers as they are, a predictor on each, probabilities summed."""
    if predictor not in HEADS:
        raise ValueError(f"[cafo] predictor must be one of {', '.join(HEADS)}, got {predictor!r}")
    shape, heads = image, []
    for i, layer in enumerate(layers):
        shape = layer.z_shape(shape)  # type: ignore[assignment]
        layer.requires_grad_(False)
        heads.append(LinearHead((i,), math.prod(shape), num_classes, bias=False,
                                **HEADS[predictor]))
    squash: Any = "sparsemax" if predictor == "sl" else "softmax"
    net = LocalNet(layers, num_classes=num_classes, in_shape=image, input_norm="none",
                   heads=heads, readout=Readout("predictors", squash=squash))
    net.schedule, net.selects_range = Cascade(closed_form=predictor == "mse"), False
    return net
