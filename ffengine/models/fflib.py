"""FFLib (Forward-Forward prunability): FFNN, FFNN+C and FFRNN, tables 2 and 3.

Deviations kept from the published code: 1e-4 is added to the length; FFNN+C shows the head the zero
label and clips its logits at zero before the arg-max; FFRNN's score is the mean of
softplus(g - theta) over the frames strictly between K_low and K_high. Ours: negatives are random
wrong labels, as in the code's own examples (its default, `negatives="inverse"`: rows of 1 - one-hot
that counting their ones tells apart, so that the image is never needed; on the digits it stays at
chance); FFRNN predicts from one fixed draw of hidden states (the code draws anew for every label
tried), softplus is exact (the code's overflows), and validation data are the split's own.
"""

from __future__ import annotations

from typing import Any, Literal

from ffengine.engine.schedules.recurrent import Recurrent
from ffengine.engine.schedules.schedule import Together
from ffengine.models.registry import Recipe, register
from ffengine.nn import Concat, LinearHead, LocalLinear, LocalNet, Readout, RecurrentNet
from ffengine.ops.config import LocalPassConfig, Norm, threshold

LENGTH = Norm("length", eps=1e-4, length="l2")
#: Pixels stay in [0, 1]; the digits' recipes are of scaled ones.
SCALE = {"*": "off", "digits": "set"}
PAPER = Recipe(optimizer="adam", lr=0.02, epochs=60, batch_size=128)
#: One layer after 800 steps: 74 % with theta = 20 and 93 % with 2 at a rate of 0.03, 96 % with 2
#: at 0.1 (seed 0).
#: L- reaches 93 % there.
DIGITS: dict[str, Any] = {"theta": 2.0, "maximize": True}


def _config(theta: float, maximize: bool) -> LocalPassConfig:
    return LocalPassConfig(groups=1, goodness="mean_sq", loss=threshold(theta, maximize),
                           norm=LENGTH)


def network(num_classes: int, in_channels: int, image_size: int, layers: tuple[int, ...],
            theta: float, maximize: bool, negatives: str, propagate: Literal["stale", "updated"],
            heads: tuple[LinearHead, ...], readout: Readout) -> LocalNet:
    """image | one-hot label, then length-normalised linear layers."""
    encoding = Concat(num_classes, (in_channels, image_size, image_size))
    ins = (encoding.shape[0], *layers[:-1])
    chain = [LocalLinear(i, o, config=_config(theta, maximize), init="torch")
             for i, o in zip(ins, layers, strict=True)]
    net = LocalNet(chain, num_classes=num_classes, in_shape=encoding.in_shape, input_norm=LENGTH,
                   layer_range=(0, len(layers) - 1), encoding=encoding, negatives=negatives,
                   propagate=propagate, heads=heads, readout=readout)
    net.schedule, net.selects_range = Together(), False
    return net


@register("fflib/ffnn", paper="FFLib", recipe=PAPER, digits_options=DIGITS,
          digits={"lr": 0.1, "epochs": 30}, scale=SCALE)
def ffnn(num_classes: int = 10, in_channels: int = 1, image_size: int = 28,
         layers: tuple[int, ...] = (2000, 2000), theta: float = 20.0, maximize: bool = False,
         negatives: str = "random",
         propagate: Literal["stale", "updated"] = "updated") -> LocalNet:
    """Softplus on mean squares - theta; L- lowers positive goodness, L+ (maximize) raises it."""
    return network(num_classes, in_channels, image_size, layers, theta, maximize, negatives,
                   propagate, (), Readout(theta=theta, maximize=maximize))


@register("fflib/ffnn-c", paper="FFLib", recipe=PAPER, digits={"lr": 0.1, "epochs": 40},
          digits_options={**DIGITS, "classifier_lr": 1e-3}, scale=SCALE)
def ffnn_c(num_classes: int = 10, in_channels: int = 1, image_size: int = 28,
           layers: tuple[int, ...] = (2000, 2000), theta: float = 20.0, maximize: bool = False,
           negatives: str = "random", propagate: Literal["stale", "updated"] = "updated",
           classifier_lr: float = 1e-4) -> LocalNet:
    """FFNN with a linear classifier on all layers' activations, in the second half of training."""
    head = LinearHead(range(len(layers)), sum(layers), num_classes, image="neutral", features="h",
                      optim={"kind": "adam", "lr": classifier_lr})
    net = network(num_classes, in_channels, image_size, layers, theta, maximize, negatives,
                  propagate, (head,), Readout("head", relu=True))
    net.schedule = Together(heads_from=0.5, heads_alone=True)
    return net


# 2000 units take 9 s an epoch on one core with 5 frames, and 30 epochs of 10 frames are needed
@register("fflib/ffrnn", paper="FFLib", recipe=PAPER,
          digits_options={**DIGITS, "layers": (400, 400)},
          digits={"lr": 0.03, "lr_min": 0.006, "epochs": 30}, scale=SCALE)
def ffrnn(num_classes: int = 10, in_channels: int = 1, image_size: int = 28,
          layers: tuple[int, ...] = (2000, 2000), theta: float = 20.0, maximize: bool = False,
          negatives: str = "random", beta: float = 0.7, frames: int = 10,
          test_frames: tuple[int, int] = (3, 8)) -> RecurrentNet:
    """Forward and backward weights; `frames` is K_train, `test_frames` are K_low and K_high."""
    in_shape = (in_channels, image_size, image_size)
    net = RecurrentNet(layers, config=_config(theta, maximize), num_classes=num_classes,
                       in_shape=in_shape, beta=beta, frames=test_frames, negatives=negatives,
                       theta=theta, readout=Readout(maximize=maximize))
    net.schedule, net.selects_range = Recurrent(frames), False
    return net
