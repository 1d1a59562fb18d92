"""Layers one after the other, with parameter-free shortcuts: how samples go through them.

One layer's turn is transform -> layer -> join -> branch; `Wire` says which of these it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ffengine.nn.encoding import LabelEncoding
from ffengine.nn.heads import Receiver
from ffengine.nn.layers import LocalLayer, LocalLinear, as_laid_out
from ffengine.nn.norms import normalise_input
from ffengine.ops.config import Norm
from ffengine.ops.tracing import traced
from ffengine.typed import check_fields


@dataclass(frozen=True)
class Wire:
    """What stands around a layer (DeeperForward fig. 3).

    pool_before: 2x2 average pool of the input. join: how the live shortcut meets z.
    branch: the joined map becomes the live shortcut, average-pooled if branch_pool.
    """

    pool_before: bool = False
    join: Literal["none", "add", "concat"] = "none"
    branch: bool = False
    branch_pool: bool = False

    def __post_init__(self) -> None:
        check_fields("wire", self)


class Chain(nn.Module):
    """Local layers, their wires, and how a label enters their input; arguments as of LocalNet."""

    def __init__(self, layers: Sequence[LocalLayer], wires: Sequence[Wire] | None,
                 num_classes: int, in_shape: tuple[int, ...],
                 input_norm: Literal["layer", "none"] | Norm,
                 encoding: LabelEncoding | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.wires = tuple(wires) if wires is not None else (Wire(),) * len(layers)
        if len(self.wires) != len(layers):
            raise ValueError(
                f"[network] expected one wire a layer ({len(layers)}), got {len(self.wires)}")
        self.num_classes, self.in_shape = num_classes, tuple(in_shape)
        self.input_norm = input_norm
        self.encoding = encoding
        self.shapes = self.infer_shapes()
    def layer(self, i: int) -> LocalLayer:
        """Layer i, typed; without a ModuleList's own look-up, which takes seven times as long."""
        held: Any = self._modules["layers"]
        layer = held._modules[str(i if i >= 0 else len(held) + i)]
        assert isinstance(layer, LocalLayer)
        return layer

    def infer_shapes(self) -> list[tuple[int, ...]]:
        """Per-sample shape of the map after each layer's join; entry 0 is the input's."""
        shapes = [self.in_shape if self.encoding is None else self.encoding.shape]
        shortcut: tuple[int, ...] | None = None
        for i, wire in enumerate(self.wires):
            seen, taken = self.input_of(i, shapes[-1]), self.layer(i).in_size
            if seen[0] != taken:
                raise ValueError(f"[network] layer {i} expected an input of {taken} channels or "
                                 f"features, got {seen}")
            a = self.layer(i).z_shape(seen)
            if wire.join != "none" and shortcut is None:
                raise ValueError(f"[network] layer {i} joins a shortcut, but none is live")
            if wire.join == "add" and shortcut != a:
                raise ValueError(f"[network] layer {i} adds a shortcut of {shortcut} to {a}")
            if wire.join == "concat":
                assert shortcut is not None
                if shortcut[1:] != a[1:]:
                    raise ValueError(f"[network] layer {i} joins a shortcut of {shortcut} to {a}")
                a = (a[0] + shortcut[0], *a[1:])
            if wire.branch:
                shortcut = halved(a) if wire.branch_pool else a
            if min(a) < 1:
                raise ValueError(f"[network] input {self.in_shape} is too small: layer {i} "
                                 f"would have shape {a}")
            shapes.append(a)
        return shapes

    def input_of(self, i: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Per-sample shape layer i sees, from the arriving map's."""
        if self.wires[i].pool_before:
            shape = halved(shape)
        linear = isinstance(self.layer(i), LocalLinear) and len(shape) > 1
        return (math.prod(shape),) if linear else shape

    def prepare(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The first layer's input: x (N, *in_shape), with labels encoded where given; normed.

        An input that holds its label already (N, *encoding.shape) passes without labels.
        """
        shape = self.in_shape if self.encoding is None or labels is not None else (
            self.encoding.shape)
        if tuple(x.shape[1:]) != shape:
            raise ValueError(f"[network] expected input (N, {', '.join(map(str, shape))}), "
                             f"got {tuple(x.shape)}")
        if labels is not None:
            assert self.encoding is not None
            x = self.encoding(x, labels)
        return self.normalise_input(x)

    def normalise_input(self, x: torch.Tensor, ours: bool = False) -> torch.Tensor:
        """`input_norm` of every sample; written over x if that is `ours` to overwrite."""
        return normalise_input(x, self.input_norm, ours)

    def blank(self, x: torch.Tensor) -> torch.Tensor:
        """The first layer's input without any label (backpropagation twins)."""
        return self.prepare(x) if self.encoding is None else (
            self.normalise_input(self.encoding.blank(x)))

    def transform(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """What stands before layer i."""
        if self.wires[i].pool_before:
            x = F.avg_pool2d(x, 2)
        if isinstance(self.layer(i), LocalLinear) and x.dim() > 2:
            x = x.contiguous().flatten(1)
        return x

    def addend(self, i: int, shortcut: torch.Tensor | None,
               ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(what the sweep of layer i adds to its z, the shortcut that is left for `join`)."""
        wire = self.wires[i]
        if wire.join != "add":
            return None, shortcut
        return shortcut, shortcut if not wire.branch and self.shortcut_live_after(i) else None

    def join(self, i: int, z: torch.Tensor, shortcut: torch.Tensor | None,
             met: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(x, shortcut) after layer i; may write into z.

        Args:
            met: the shortcut that this layer joins is in z already.
        """
        wire = self.wires[i]
        if met:
            pass
        elif wire.join == "add":
            assert shortcut is not None
            z = z.add_(shortcut) if not torch.is_grad_enabled() else z + shortcut
        elif wire.join == "concat":
            assert shortcut is not None
            z = torch.cat([z, shortcut], 1)
        if wire.branch:
            shortcut = F.avg_pool2d(z, 2) if wire.branch_pool else z
        elif not self.shortcut_live_after(i):
            shortcut = None
        return z, shortcut

    def shortcut_live_after(self, i: int, depth: int | None = None) -> bool:
        """A later layer, of the first `depth` if not of all, still joins the shortcut that is live
        after layer i."""
        for wire in self.wires[i + 1:depth]:
            if wire.join != "none":
                return True
            if wire.branch:
                return False
        return False

    def run(self, x: torch.Tensor | None = None, *, a: torch.Tensor | None = None,
            start: int = 0, end: int | None = None, backend: str = "auto", training: bool = False,
            features: Receiver | None = None) -> list[torch.Tensor]:
        """Goodness per layer of a prepared input x, or of the first layer's pre-activation a.

        Args:
            start, end: first and last layer, x being the input of `start`.
            features: is given z of every layer, as the next one sees it.
        """
        end = len(self.layers) - 1 if end is None else end
        backend = "reference" if traced() else backend
        if x is not None and not traced():
            x = as_laid_out(x)
        shortcut, out = None, []
        for i in range(start, end + 1):
            layer, want_z = self.layer(i), i < end or features is not None
            addend, shortcut = self.addend(i, shortcut) if want_z else (None, shortcut)
            if i or a is None:
                assert x is not None
                z, g = layer.infer(self.transform(i, x), want_z=want_z, training=training,
                                   shortcut=addend, backend=backend)
            else:
                z, g = layer.sweep(a, want_z=want_z, training=training, shortcut=addend,
                                   backend=backend)
            out.append(g)
            if z is not None:
                x, shortcut = self.join(i, z, shortcut, met=addend is not None)
                if features is not None:
                    features.append(x)
        return out


def halved(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Per-sample shape after a 2x2 pool."""
    return (shape[0], *(s // 2 for s in shape[1:]))
