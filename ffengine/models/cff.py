"""Collaborative FF (network FF): F-CFF and A-CFF. **Our reconstruction.**

The paper's equations are lost in every text at hand and its authors published no code. Built here:
G_l = g_l + gamma_l sum_{m != l} w stopgrad(g_m), g the mean of squares, w = 1 / (L - 1), theta 2,
softplus loss, gamma 0.1 (fixed), or 0.1 at the start and learned by Adam 0.01 through dL/dG
(adaptive). What the text names and Pezeshki's code, whose set-up this is, has otherwise: negatives
permuted and never drawn anew (`negatives="random"`: wrong labels), the batch's largest pixel for
the label (`label_pixel=1.0`), lengths divided out before every layer (`norm="layer"`: a layer norm
after every activation, the image as it is). With
goodness="sum_sq", w = 1 and gamma = 1 it is Lorberbom et al., AAAI 2024 (a test).
"""

from __future__ import annotations

from typing import Literal

from ffengine.engine.schedules.collaborative import Collaborative
from ffengine.models.registry import Recipe, register
from ffengine.nn import CollaborativeNet
from ffengine.nn.overlay import LabelPixel, overlay_mlp
from ffengine.ops.config import LocalPassConfig, threshold

PAPER = Recipe(optimizer="adam", lr=0.03, epochs=1000, batch_size=50_000)
#: As hinton/threshold's: mini-batches, a rate that falls, wrong labels only.
DIGITS = {"epochs": 80, "batch_size": 128, "lr": 0.1, "lr_min": 0.01}
OPTIONS = {"negatives": "random"}


def collaborative(num_classes: int = 10, in_channels: int = 1, image_size: int = 28,
                  layers: tuple[int, ...] = (500, 500), theta: float = 2.0, gamma: float = 0.1,
                  weight: float | None = None, goodness: Literal["mean_sq", "sum_sq"] = "mean_sq",
                  norm: Literal["length", "layer"] = "length", negatives: str = "permuted",
                  label_pixel: LabelPixel = "max", *, learned: bool = False,
                  gamma_lr: float = 0.01) -> CollaborativeNet:
    """784-500-500, full batch, layer after layer."""
    config = LocalPassConfig(groups=1, goodness=goodness, loss=threshold(theta))
    net = overlay_mlp(CollaborativeNet, num_classes, (in_channels, image_size, image_size), layers,
                      config, negatives, norm=norm, label_pixel=label_pixel, gamma=gamma,
                      weight=weight, learned=learned, gamma_lr=gamma_lr)
    net.schedule = Collaborative()
    return net


@register("cff/fixed", paper="Collaborative FF (our reconstruction)", recipe=PAPER, digits=DIGITS,
          digits_options=OPTIONS)
def fixed(num_classes: int = 10, in_channels: int = 1, image_size: int = 28,
          layers: tuple[int, ...] = (500, 500), theta: float = 2.0, gamma: float = 0.1,
          weight: float | None = None, goodness: Literal["mean_sq", "sum_sq"] = "mean_sq",
          norm: Literal["length", "layer"] = "length", negatives: str = "permuted",
          label_pixel: LabelPixel = "max") -> CollaborativeNet:
    """F-CFF: gamma stays as it is."""
    return collaborative(num_classes, in_channels, image_size, layers, theta, gamma, weight,
                         goodness, norm, negatives, label_pixel)


@register("cff/adaptive", paper="Collaborative FF (our reconstruction)", recipe=PAPER,
          digits=DIGITS, digits_options=OPTIONS)
def adaptive(num_classes: int = 10, in_channels: int = 1, image_size: int = 28,
             layers: tuple[int, ...] = (500, 500), theta: float = 2.0, gamma: float = 0.1,
             weight: float | None = None, goodness: Literal["mean_sq", "sum_sq"] = "mean_sq",
             norm: Literal["length", "layer"] = "length", negatives: str = "permuted",
             label_pixel: LabelPixel = "max", gamma_lr: float = 0.01) -> CollaborativeNet:
    """A-CFF: gamma is learned, one per layer."""
    return collaborative(num_classes, in_channels, image_size, layers, theta, gamma, weight,
                         goodness, norm, negatives, label_pixel, learned=True, gamma_lr=gamma_lr)
