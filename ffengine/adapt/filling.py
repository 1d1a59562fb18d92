"""What the positions hold that an edit adds."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ffengine.nn.layers import initial
from ffengine.nn.network import LocalNet
from ffengine.nn.wiring import Axis, Wiring


class Fill:
    """Values of new units: as given, copied of the units they are like, or drawn.

    Args:
        layer: the layer that `values` are of.
        clones: layer -> for each new unit the one that it is like, or None.
        values, outgoing, seed: as add_units takes them.
    """

    def __init__(self, net: LocalNet, layer: int, found: Wiring,
                 clones: dict[int, list[int | None]], values: Mapping[str, torch.Tensor],
                 outgoing: Mapping[str, torch.Tensor], seed: int | None) -> None:
        self.net, self.layer, self.found, self.clones = net, layer, found, clones
        self.values, self.outgoing = values, outgoing
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.drawn = {i: self._draw(i, len(rows)) for i, rows in clones.items()}

    def _draw(self, i: int, count: int) -> dict[str, torch.Tensor]:
        """A layer's own tensors for `count` new units."""
        layer = self.net.layer(i)
        shape = (layer.units + count, *layer.weight.shape[1:])
        weight, bias = initial(shape, True, layer.init)
        assert bias is not None
        affine = layer.running_var is not None
        constant = {"norm_weight": 1.0, "norm_bias": 0.0, "running_var": 1.0,
                    "running_mean": 0.0 if affine else 0.5}
        return {"weight": weight.detach()[layer.units:], "bias": bias.detach()[layer.units:],
                **{name: torch.full((count,), v) for name, v in constant.items()},
                f"hidden_{i}": torch.rand(1, count)}

    def __call__(self, axis: Axis, tensor: torch.Tensor, count: int) -> torch.Tensor:
        """(..., count, ...) along the axis, of the tensor as it is before."""
        shape = (*tensor.shape[:axis.dim], count, *tensor.shape[axis.dim + 1:])
        path, _, name = axis.name.rpartition(".")
        if axis.read:
            return self._given(self.outgoing, axis.name, shape, tensor)
        own = len(axis.runs) == 1 and path in (f"layers.{axis.runs[0].layer}", "")
        if own and path == f"layers.{self.layer}" and name in self.values:
            return self._given(self.values, name, shape, tensor)
        fresh = (self.drawn[axis.runs[0].layer or 0][name] if own else
                 torch.full(shape, float(name in ("weight", "running_var"))))
        out = fresh.to(tensor.device, tensor.dtype).clone()
        self._copy(axis, tensor, out)
        return out

    def _copy(self, axis: Axis, tensor: torch.Tensor, out: torch.Tensor) -> None:
        """Over the drawn values what the units hold that the new ones are like."""
        start, at = 0, 0
        for layer, repeat in axis.runs:
            for unit in self.clones.get(-1 if layer is None else layer, ()):
                if unit is not None:
                    out.narrow(axis.dim, at, repeat).copy_(
                        tensor.narrow(axis.dim, start + unit * repeat, repeat))
                at += repeat
            start += repeat * (1 if layer is None else self.found.units[layer])

    def _given(self, known: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...],
               like: torch.Tensor) -> torch.Tensor:
        if name not in known:
            return like.new_zeros(shape)
        if tuple(known[name].shape) != shape:
            raise ValueError(f"[edits] expected {name} of shape {shape}, got "
                             f"{tuple(known[name].shape)}")
        return known[name].detach().to(like.device, like.dtype).clone()


