"""Hinton's Forward-Forward MLPs in two published forms (Hinton 2022, sec. 3.3).

`hinton/threshold`: Pezeshki's code, full batch, layer after layer, mean squares against 2.
`hinton/peer-norm`: Löwe's code, mini-batches, sum of squares against the width, peer
normalisation, a linear classifier on layers 2 and 3 from the neutral label.

Deviations kept from the code: negatives of the first form are the batch's labels permuted once (a
negative may be a positive); the label's pixel holds the largest value of the batch; relu passes
every gradient in the second. Ours: `negatives="masked"` trains without labels (Hinton's hybrid
images) and then needs the classifier.
"""

from __future__ import annotations

from typing import Literal

from ffengine.engine.schedules.layerwise import Layerwise
from ffengine.engine.schedules.schedule import Together
from ffengine.models.registry import Recipe, register
from ffengine.nn import LinearHead, LocalLinear, LocalNet, Overlay, Readout
from ffengine.nn.drawing import normal
from ffengine.nn.overlay import LabelPixel, overlay_mlp
from ffengine.ops.config import LocalPassConfig, Norm, Peer, bce, threshold

RMS = Norm("length", eps=1e-8, length="rms")


@register("hinton/threshold", paper="Hinton 2022 (Pezeshki)",
          recipe=Recipe(optimizer="adam", lr=0.03, epochs=1000, batch_size=50_000),
          # mini-batches and a rate that falls: 95 % in 6 s, where 1000 full batches a layer took a
          # minute for 93 %; random negatives are wrong labels, a permuted one may be the true label
          digits={"epochs": 80, "batch_size": 128, "lr": 0.1, "lr_min": 0.01},
          digits_options={"negatives": "random"})
def threshold_net(num_classes: int = 10, in_channels: int = 1, image_size: int = 28,
                  layers: tuple[int, ...] = (500, 500), theta: float = 2.0,
                  negatives: str = "permuted", norm: Literal["length", "layer"] = "length",
                  label_pixel: LabelPixel = "max") -> LocalNet:
    """784-500-500, softplus of mean squares against theta, every layer for its own epochs."""
    config = LocalPassConfig(groups=1, goodness="mean_sq", loss=threshold(theta))
    net = overlay_mlp(LocalNet, num_classes, (in_channels, image_size, image_size), layers, config,
                      negatives, norm=norm, label_pixel=label_pixel)
    net.schedule = Layerwise()
    return net


@register("hinton/peer-norm", paper="Hinton 2022 (Löwe)",
          recipe=Recipe(optimizer="sgd", momentum=0.9, lr=1e-3, weight_decay=3e-4, epochs=100,
                        batch_size=100, lr_half_linear=True),
          digits={"epochs": 40, "batch_size": 50}, scale={"*": "off", "digits": "set"})
def peer_norm(num_classes: int = 10, in_channels: int = 1, image_size: int = 28,
              layers: tuple[int, ...] = (1000, 1000, 1000), negatives: str = "random",
              peer: float = 0.03, peer_momentum: float = 0.9, head_lr: float = 1e-2,
              head_weight_decay: float = 3e-3) -> LocalNet:
    """3 x 1000, sum of squares against the width, peer normalisation, classifier on layers 2, 3."""
    image = (in_channels, image_size, image_size)
    supervised = negatives != "masked"
    encoding = Overlay(num_classes, image, value=1.0, neutral_value=0.1) if supervised else None
    ins = (in_channels * image_size**2, *layers[:-1])
    chain = [LocalLinear(i, o, init="torch", batch_coupling=Peer(peer, peer_momentum),
                         config=LocalPassConfig(groups=1, goodness="sum_sq", loss=bce(o), norm=RMS,
                                                relu_gradient="straight_through"))
             for i, o in zip(ins, layers, strict=True)]
    read = range(min(1, len(layers) - 1), len(layers))
    head = LinearHead(read, sum(layers[read.start:]), num_classes, bias=False, init="zeros",
                      image="neutral", optim={"lr": head_lr, "weight_decay": head_weight_decay})
    net = LocalNet(chain, num_classes=num_classes, in_shape=image, input_norm=RMS,
                   layer_range=(0, len(layers) - 1), encoding=encoding, negatives=negatives,
                   heads=(head,), readout=Readout("head"))
    net.schedule, net.selects_range = Together(), False
    net.makes_pairs = True
    for layer, width in zip(chain, ins, strict=True):
        normal(layer.weight, width**-0.5)
        layer.bias.data.zero_()  # type: ignore[union-attr]
    return net
