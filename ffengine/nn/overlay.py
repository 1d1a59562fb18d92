"""The MLP on overlaid labels that several papers share: Hinton's, SymBa's, collaborative FF's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, TypeVar

from ffengine.nn.checks import one_of
from ffengine.nn.encoding import Overlay
from ffengine.nn.layers import LocalLinear
from ffengine.nn.network import LocalNet
from ffengine.ops.config import LocalPassConfig, Norm

Net = TypeVar("Net", bound=LocalNet)

#: x / (|x| + 1e-4), as Pezeshki's code has it.
L2 = Norm("length", eps=1e-4, length="l2")
#: Between layers, and of the first one's input: lengths divided out before every layer; or a layer
#: norm after every activation, the image as it is (the text of network FF).
NORMS: dict[str, tuple[Norm, Norm | Literal["none"]]] = {
    "length": (L2, L2), "layer": (Norm("layer"), "none")}
LabelPixel = float | Literal["max"]


def overlay_mlp(kind: type[Net], num_classes: int, image: tuple[int, int, int],
                layers: tuple[int, ...], config: LocalPassConfig, negatives: str, *,
                norm: str = "length", label_pixel: LabelPixel = "max", **options: Any) -> Net:
    """Linear layers of one config, the label over the first pixels; the scores sum all layers.

    Args:
        kind: the network's class, which takes `options`.
        norm: one of NORMS.
        label_pixel: what the label's pixel holds; "max": the batch's largest.
    """
    one_of("overlay", "norm", norm, tuple(NORMS))
    between, before = NORMS[norm]
    config = replace(config, norm=between)
    encoding = Overlay(num_classes, image, value=label_pixel)
    ins = (encoding.shape[0], *layers[:-1])
    net = kind([LocalLinear(i, o, config=config, init="torch")
                for i, o in zip(ins, layers, strict=True)],
               num_classes=num_classes, in_shape=image, input_norm=before,
               layer_range=(0, len(layers) - 1), encoding=encoding, negatives=negatives, **options)
    net.selects_range = False
    return net
