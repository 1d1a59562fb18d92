"""The MLP on overlaid labels that several papers share: Hinton's, SymBa's, collaborative FF's."""

from __future__ import annotations

from typing import Any, TypeVar

from ffengine.nn.encoding import Overlay
from ffengine.nn.layers import LocalLinear
from ffengine.nn.network import LocalNet
from ffengine.ops.config import LocalPassConfig, Norm

Net = TypeVar("Net", bound=LocalNet)

#: x / (|x| + 1e-4), as Pezeshki's code has it.
L2 = Norm("length", eps=1e-4, length="l2")


def overlay_mlp(kind: type[Net], num_classes: int, image: tuple[int, int, int],
                layers: tuple[int, ...], config: LocalPassConfig, negatives: str,
                **options: Any) -> Net:
    """Linear layers of one config, the label over the first pixels at the batch's largest value.

    The input is normalised as `config.norm` normalises between layers; the scores sum all layers.
    `kind` is the network's class, which takes `options`.
    """
    encoding = Overlay(num_classes, image, value="max")
    ins = (encoding.shape[0], *layers[:-1])
    net = kind([LocalLinear(i, o, config=config, init="torch")
                for i, o in zip(ins, layers, strict=True)],
               num_classes=num_classes, in_shape=image, input_norm=config.norm,
               layer_range=(0, len(layers) - 1), encoding=encoding, negatives=negatives, **options)
    net.selects_range = False
    return net
