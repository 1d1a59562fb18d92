"""What every layer makes of samples: its activations h, and the features z the next layer sees.

h is the layer's output before its feature normalisation (after BatchNorm and pool where a block
has them), z the same after it, both before a shortcut is joined. Inference: no dropout, running
statistics (the batch's, where a network is evaluated by them).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, get_args

import torch

from ffengine.nn.checks import one_of
from ffengine.nn.network import LocalNet
from ffengine.nn.recurrent import RecurrentNet, label_rows, length_normalised
from ffengine.ops.config import Norm
from ffengine.reference.local_pass import normalise

#: What stands where the label goes in networks that are shown one: nothing (FFLib's activation
#: maps), the label that favours no class, or the sample's own.
Label = Literal["zero", "neutral", "true"]
LABELS: tuple[Label, ...] = get_args(Label)
Samples = Iterable[tuple[torch.Tensor, torch.Tensor]]


class Maps(NamedTuple):
    """One layer's (N, C, ...), valid until the next layer is asked for (z may be written over)."""

    h: torch.Tensor
    z: torch.Tensor


def shown(net: LocalNet, x: torch.Tensor, y: torch.Tensor, label: Label) -> torch.Tensor:
    """The first layer's input of samples x (N, *in_shape) with labels y (N,)."""
    if net.encoding is None:
        return net.prepare(x)
    if label == "true":
        return net.prepare(x, y)
    encoded = net.encoding.base(x) if label == "zero" else net.encoding.neutral(x)
    return net.normalise_input(encoded)


def layer_maps(net: LocalNet, x: torch.Tensor, y: torch.Tensor, *, label: Label = "zero",
               backend: str = "auto") -> Iterator[Maps]:
    """h and z of layer after layer, of samples x (N, *in_shape) with labels y (N,) int64.

    Of a network that plays over frames (FFRNN), the states after the last one.

    Raises:
        ValueError: an unknown label, samples of another shape.
    """
    one_of("maps", "label", label, LABELS)
    with torch.no_grad():
        if isinstance(net, RecurrentNet):
            yield from _states(net, x, y, label, backend)
            return
        x, shortcut = shown(net, x, y, label), None
        for i in range(len(net.layers)):
            layer = net.layer(i)
            h, _ = layer.infer(net.transform(i, x), norm=Norm("none"), backend=backend,
                               training=net.batch_statistics)
            assert h is not None
            z = normalise(h, layer.config.offsets(h.shape[1]), layer.config)
            yield Maps(h, z)
            if i + 1 < len(net.layers):
                x, shortcut = net.join(i, z, shortcut)


def _states(net: RecurrentNet, x: torch.Tensor, y: torch.Tensor, label: Label,
            backend: str) -> Iterator[Maps]:
    rows = label_rows(y, net.num_classes, x.dtype)
    if label != "true":
        rows = torch.full_like(rows, 0.0 if label == "zero" else 1.0 / net.num_classes)
    *_, (_, states) = net.play(x, rows, net.initial(), backend)
    for h in states:
        yield Maps(h, length_normalised(h))


def over_pixels(h: torch.Tensor) -> torch.Tensor:
    """(N, C): the mean over a map's pixels; a unit's response as it is."""
    return h if h.dim() == 2 else h.flatten(2).mean(2)


def check_layer(net: LocalNet, layer: int) -> int:
    """The layer's index, from 0; ValueError for one that does not exist."""
    if not 0 <= layer < len(net.layers):
        raise ValueError(f"[analyze] expected a layer from 0 to {len(net.layers) - 1}, got {layer}")
    return layer
