"""A chain of local layers with parameter-free shortcuts: what the engine trains.

One layer's turn is transform -> layer -> join -> branch; `Wire` says which of these it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ffengine.nn.layers import LocalLayer, LocalLinear, keep_weights_channels_last
from ffengine.ops.local_pass import local_pass
from ffengine.reference.local_pass import local_pass as reference_pass


@dataclass(frozen=True)
class Wire:
    """What stands around a layer (DeeperForward fig. 3, SPEC 2.1).

    pool_before: 2x2 average pool of the input. join: how the live shortcut meets z.
    branch: the joined map becomes the live shortcut, average-pooled if branch_pool.
    """

    pool_before: bool = False
    join: Literal["none", "add", "concat"] = "none"
    branch: bool = False
    branch_pool: bool = False


class LocalNet(nn.Module):
    """Layers trained by local losses; class scores are goodness summed over a range of layers.

    Args:
        layers: the chain.
        wires: one per layer; plain (Wire()) if absent.
        num_classes: columns of the scores.
        in_shape: (C, H, W) or (features,) of one sample.
        input_norm: "layer" normalises each sample over all its elements (eps 1e-5, no affine).
        layer_range: first and last layer whose goodness is summed, inclusive.
    """

    #: (name, options) it was built from and the recipe it trains with; set by models.create.
    origin: tuple[str, dict[str, Any]] | None = None
    recipe: Any = None

    def __init__(self, layers: Sequence[LocalLayer], wires: Sequence[Wire] | None = None, *,
                 num_classes: int, in_shape: tuple[int, ...],
                 input_norm: Literal["layer", "none"] = "layer",
                 layer_range: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.wires = tuple(wires) if wires is not None else (Wire(),) * len(layers)
        if len(self.wires) != len(layers):
            raise ValueError(
                f"[network] expected one wire a layer ({len(layers)}), got {len(self.wires)}")
        self.num_classes = num_classes
        self.in_shape = tuple(in_shape)
        self.input_norm = input_norm
        self._range = (0, 0)
        # A chain skips its first layer by default, as the published code does.
        last = len(layers) - 1
        self.set_range(*(layer_range or (min(1, last), last)))
        self.shapes = self._infer_shapes()
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            keep_weights_channels_last)

    def set_range(self, start: int, end: int) -> None:
        """Sum goodness over layers start..end (inclusive); later layers are skipped in forward."""
        if not 0 <= start <= end < len(self.layers):
            raise ValueError(f"[network] layer range must satisfy 0 <= start <= end < "
                             f"{len(self.layers)}, got ({start}, {end})")
        self._range = (start, end)

    @property
    def layer_range(self) -> tuple[int, int]:
        return self._range

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self._range)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.set_range(*(int(v) for v in state))

    def layer(self, i: int) -> LocalLayer:
        """Layer i, typed."""
        layer = self.layers[i]
        assert isinstance(layer, LocalLayer)
        return layer

    def _infer_shapes(self) -> list[tuple[int, ...]]:
        """Per-sample shape of the map after each layer's join; entry 0 is the input's."""
        shapes = [self.in_shape]
        shortcut: tuple[int, ...] | None = None
        for i, wire in enumerate(self.wires):
            a = self.layer(i).out_shape(self.input_of(i, shapes[-1]))
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
        if isinstance(self.layer(i), LocalLinear) and len(shape) > 1:
            total = 1
            for s in shape:
                total *= s
            return (total,)
        return shape

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """The input normalisation, before the first layer."""
        if tuple(x.shape[1:]) != self.in_shape:
            raise ValueError(f"[network] expected input (N, {', '.join(map(str, self.in_shape))}), "
                             f"got {tuple(x.shape)}")
        return F.layer_norm(x, x.shape[1:]) if self.input_norm == "layer" else x

    def transform(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """What stands before layer i."""
        if self.wires[i].pool_before:
            x = F.avg_pool2d(x, 2)
        if isinstance(self.layer(i), LocalLinear) and x.dim() > 2:
            x = x.contiguous().flatten(1)
        return x

    def join(self, i: int, z: torch.Tensor,
             shortcut: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(x, shortcut) after layer i; may write into z."""
        wire = self.wires[i]
        if wire.join == "add":
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

    def shortcut_live_after(self, i: int) -> bool:
        """A later layer still joins the shortcut that is live after layer i."""
        for wire in self.wires[i + 1:]:
            if wire.join != "none":
                return True
            if wire.branch:
                return False
        return False

    def goodness(self, x: torch.Tensor, *, end: int | None = None,
                 backend: str = "auto") -> list[torch.Tensor]:
        """Goodness (N, K) of layers 0..end for a batch; inference, no dropout."""
        end = len(self.layers) - 1 if end is None else end
        x, shortcut, out = self.prepare(x), None, []
        for i in range(end + 1):
            layer = self.layer(i)
            a = layer.preactivation(self.transform(i, x))
            if torch.compiler.is_compiling():  # torch.compile and torch.export see plain PyTorch
                z, g = reference_pass(a, config=layer.config, want_z=i < end)[:2]
            else:
                z, g = local_pass(a, config=layer.config, want_z=i < end, backend=backend)[:2]
            out.append(g)
            if z is not None:
                x, shortcut = self.join(i, z, shortcut)
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores (N, classes): goodness summed over `layer_range`."""
        start, end = self._range
        with torch.no_grad():
            gs = self.goodness(x, end=end)
        return torch.stack(gs[start:]).sum(0)

    def _apply(self, fn: Any, recurse: bool = True) -> LocalNet:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        keep_weights_channels_last(self)
        return self


def halved(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Per-sample shape after a 2x2 pool."""
    return (shape[0], *(s // 2 for s in shape[1:]))
