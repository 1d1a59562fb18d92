"""What every layer of a network holds, in bytes per sample: the planner's only input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ffengine.engine.meter import call_measured
from ffengine.nn.layers import LocalLayer
from ffengine.nn.network import LocalNet, halved
from ffengine.ops import backends
from ffengine.ops import weight_update as update_op
from ffengine.ops.weight_update import ConvGeometry


@dataclass(frozen=True)
class LayerSizes:
    """Per-sample bytes of one layer's turn, in the order they come to life."""

    x_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    x_bytes: int  # arriving map
    shortcut_in_shape: tuple[int, ...] | None
    shortcut_in_bytes: int
    shortcut_in_is_x: bool
    transform_bytes: int  # what the transform allocates; 0: the map itself
    a_bytes: int  # pre-activation, and da
    z_bytes: int
    small_bytes: int  # goodness, loss, coef, statistics
    out_bytes: int  # after the join
    pooled_branch_bytes: int
    shortcut_out_shape: tuple[int, ...] | None
    shortcut_out_bytes: int
    shortcut_out_is_x: bool
    join: str
    branch: bool
    shortcut_live_after: bool
    weight_bytes: int
    forward_scratch: int  # whole call, independent of the tile in channels_last
    update_scratch: Callable[[int, bool], int]  # of (tile, whole batch in one tile)
    pixels: int
    flops: int  # forward and weight gradient
    must_cut: bool = False


@dataclass(frozen=True)
class NetSizes:
    """A network at one batch size and compute dtype."""

    layers: tuple[LayerSizes, ...]
    batch: int
    itemsize: int
    floor_bytes: int  # parameters and optimizer states
    input_bytes: int  # the caller's batch and targets


def measure(net: LocalNet, batch: int, dtype: torch.dtype, *, states: int, device: str = "cpu",
            backend: str = "auto") -> NetSizes:
    """Sizes of a network.

    Args:
        states: optimizer state tensors per parameter (Adam 2, SGD with momentum 1, else 0).
    """
    item = dtype.itemsize
    rows = [_layer(net, i, dtype, device, backend) for i in range(len(net.layers))]
    parameters = sum(p.numel() * p.element_size() for p in net.parameters())
    inputs = batch * (item_count(net.in_shape) * 4 + 8)
    return NetSizes(tuple(_with_shortcuts(net, rows, item)), batch, item,
                    parameters * (1 + states), inputs)


def _with_shortcuts(net: LocalNet, rows: list[dict[str, object]], item: int) -> list[LayerSizes]:
    """Follow the live shortcut through the chain."""
    out, shape, is_x = [], None, False
    for i, row in enumerate(rows):
        wire = net.wires[i]
        before, before_is_x = shape, is_x
        joined = net.shapes[i + 1]
        if wire.branch:
            shape, is_x = (halved(joined), False) if wire.branch_pool else (joined, True)
        else:
            is_x = False
        live = net.shortcut_live_after(i)
        if not live:
            shape, is_x = None, False
        out.append(LayerSizes(
            **row,  # type: ignore[arg-type]
            shortcut_in_shape=before,
            shortcut_in_bytes=item_count(before) * item if before else 0,
            shortcut_in_is_x=before_is_x,
            pooled_branch_bytes=item_count(halved(joined)) * item if wire.branch_pool else 0,
            shortcut_out_shape=shape,
            shortcut_out_bytes=item_count(shape) * item if shape else 0,
            shortcut_out_is_x=is_x,
            join=wire.join, branch=wire.branch, shortcut_live_after=live))
    return out


def _layer(net: LocalNet, i: int, dtype: torch.dtype, device: str,
           backend: str) -> dict[str, object]:
    layer, item = net.layer(i), dtype.itemsize
    x_shape = net.shapes[i]
    seen = net.input_of(i, x_shape)
    a_shape = layer.out_shape(seen)
    weight = layer.weight
    groups = len(layer.config.offsets(a_shape[0])) - 1
    pixels = item_count(a_shape[1:])
    z_shape = halved(a_shape) if layer.config.pool == "max2" else a_shape
    resolved = backends.resolve("weight_update", backend, device, dtype)
    cast = weight.numel() * item if weight.dtype is not dtype else 0
    last = i + 1 == len(net.layers)
    return {
        "x_shape": x_shape,
        "out_shape": net.shapes[i + 1],
        "x_bytes": item_count(x_shape) * item,
        "transform_bytes": item_count(seen) * item if seen != x_shape else 0,
        "a_bytes": item_count(a_shape) * item,
        "z_bytes": 0 if last else item_count(z_shape) * item,
        "small_bytes": 4 * (4 * groups + 1),
        "out_bytes": 0 if last else item_count(net.shapes[i + 1]) * item,
        "weight_bytes": weight.numel() * weight.element_size(),
        "forward_scratch": cast + forward_scratch(
            seen, tuple(weight.shape), layer.geometry, dtype, device),
        "update_scratch": functools.partial(
            _update_scratch, seen, a_shape, tuple(weight.shape), layer, dtype, resolved),
        "pixels": pixels,
        "flops": 4 * pixels * weight.numel() if layer.geometry else 4 * weight.numel(),
    }


def _update_scratch(x_shape: tuple[int, ...], a_shape: tuple[int, ...], w_shape: tuple[int, ...],
                    layer: LocalLayer, dtype: torch.dtype, backend: str, tile: int,
                    whole: bool) -> int:
    return update_op.extra_bytes((tile, *x_shape), (tile, *a_shape), w_shape, dtype,
                                 geometry=layer.geometry, accumulate=not whole, backend=backend)


@functools.cache
def forward_scratch(x_shape: tuple[int, ...], w_shape: tuple[int, ...],
                    geometry: ConvGeometry | None, dtype: torch.dtype, device: str) -> int:
    """Bytes the library's forward holds beside its output, measured once on one sample.

    In channels_last this is the reordered weight (and a fixed scratchpad) and does not grow with
    the batch. On a GPU the library's workspace is not part of the plan: `allocated` shows it.
    """
    if device != "cpu":
        return 0
    x, w = torch.zeros(1, *x_shape, dtype=dtype), torch.zeros(w_shape, dtype=dtype)
    if geometry is None:
        out, inside = call_measured(torch.nn.functional.linear, (x, w), {})
    else:
        layout = torch.channels_last
        x, w = x.contiguous(memory_format=layout), w.contiguous(memory_format=layout)
        with torch.no_grad():
            torch.nn.functional.conv2d(x, w, None, geometry.stride, geometry.padding)
            out, inside = call_measured(torch.nn.functional.conv2d,
                                        (x, w, None, geometry.stride, geometry.padding), {})
    return max(0, inside - out.numel() * out.element_size())


def item_count(shape: tuple[int, ...] | None) -> int:
    total = 1
    for s in shape or ():
        total *= s
    return total
