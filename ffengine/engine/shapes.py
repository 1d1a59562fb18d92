"""What every layer of a network holds, in bytes per sample: the planner's only input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ffengine.engine.meter import call_measured
from ffengine.nn.convolution import choose, convolve, samples_at_once
from ffengine.nn.layers import LocalLayer, as_channels_last
from ffengine.nn.network import LocalNet, halved
from ffengine.ops import backends
from ffengine.ops import batch_pass as batch_op
from ffengine.ops import local_pass as pass_op
from ffengine.ops import weight_update as update_op
from ffengine.ops.config import BatchNorm, LocalPassConfig, Loss, Peer
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
    da_over_a: bool  # nobody wants z, and da lies over a
    pooled_bytes: int  # z, where it cannot lie over a
    small_bytes: int  # loss, coef, statistics
    goodness_bytes: int  # kept until the step's report
    out_bytes: int  # after the join
    pooled_branch_bytes: int
    shortcut_out_shape: tuple[int, ...] | None
    shortcut_out_bytes: int
    shortcut_out_is_x: bool
    join: str
    branch: bool
    shortcut_live_after: bool
    weight_bytes: int
    enter_bytes: int  # normalised copies of the input
    forward_scratch: Callable[[int], int]  # of the tile: what the library's forward holds
    pass_scratch: Callable[[int], int]  # of the tile: what the sweep's kernel holds
    update_scratch: Callable[[int, bool], int]  # of (tile, whole batch in one tile)
    pixels: int
    flops: int  # forward and weight gradient


@dataclass(frozen=True)
class NetSizes:
    """A network at one batch size and compute dtype."""

    layers: tuple[LayerSizes, ...]
    batch: int
    itemsize: int
    floor_bytes: int  # parameters and optimizer states
    input_bytes: int  # the caller's batch and targets
    copies_input: bool  # the first map is not the caller's own batch
    whole: bool  # a layer's turn needs the whole batch in one tile
    crosses: bool = False  # a loss trains the layer before its own too


def measure(net: LocalNet, batch: int, dtype: torch.dtype, *, states: int, device: str = "cpu",
            backend: str = "auto", floor: int | None = None,
            crosses: bool = False) -> NetSizes:
    """Sizes of a network at a batch of so many rows.

    Args:
        states: optimizer state tensors per parameter (Adam 2, SGD with momentum 1, else 0).
        floor: bytes of parameters and states, where they are not these (ffengine.engine.optim).
        crosses: a loss crosses one layer boundary (OLU).
    """
    item = dtype.itemsize
    rows = [_layer(net, i, dtype, device, backend) for i in range(len(net.layers))]
    parameters = sum(p.numel() * p.element_size() for p in net.parameters())
    inputs = batch * (item_count(net.in_shape) * 4 + 8)
    copies = net.input_norm != "none" or net.encoding is not None or net.makes_pairs
    whole = crosses or net.propagate == "updated" or any(
        is_whole(net.layer(i)) for i in range(len(net.layers)))
    return NetSizes(tuple(_with_shortcuts(net, rows, item)), batch, item,
                    parameters * (1 + states) if floor is None else floor, inputs, copies, whole,
                    crosses)


def is_whole(layer: LocalLayer) -> bool:
    """The layer's turn takes the whole batch at once: pairs, batch statistics, affine inputs."""
    loss = layer.config.loss
    return (isinstance(loss, Loss) and loss.paired) or (
        layer.couple is not None or layer.pre_norm is not None)


def _with_shortcuts(net: LocalNet, rows: list[dict[str, object]], item: int) -> list[LayerSizes]:
    """Follow the live shortcut through the chain."""
    out: list[LayerSizes] = []
    shape: tuple[int, ...] | None = None
    is_x = False
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
    if layer.pre_norm is not None and layer.pre_norm.folded:
        cast += weight.numel() * weight.element_size()
    last = i + 1 == len(net.layers)
    accumulate = 8 if dtype is torch.float64 else 4
    return {
        "x_shape": x_shape,
        "out_shape": net.shapes[i + 1],
        "x_bytes": item_count(x_shape) * item,
        "transform_bytes": item_count(seen) * item if seen != x_shape else 0,
        "a_bytes": item_count(a_shape) * item,
        "z_bytes": 0 if last else item_count(z_shape) * item,
        "da_over_a": (last or net.propagate == "updated") and layer.couple is None
                     and z_shape == a_shape,
        "pooled_bytes": 0 if last or z_shape == a_shape else item_count(z_shape) * item,
        "small_bytes": accumulate * (3 * groups + 1),
        "goodness_bytes": accumulate * groups,
        "out_bytes": 0 if last else item_count(net.shapes[i + 1]) * item,
        "weight_bytes": weight.numel() * weight.element_size(),
        "enter_bytes": 0 if layer.pre_norm is None else (
            (1 if layer.pre_norm.folded else 2) * item_count(seen) * item),
        "forward_scratch": functools.partial(
            _forward_scratch, seen, tuple(weight.shape), layer.geometry, dtype, device, cast),
        "pass_scratch": functools.partial(
            _pass_scratch, a_shape, dtype, layer.settings(), not last, resolved, layer.couple),
        "update_scratch": functools.partial(
            _update_scratch, seen, a_shape, tuple(weight.shape), layer, dtype, resolved),
        "pixels": pixels,
        "flops": 4 * pixels * weight.numel() if layer.geometry else 4 * weight.numel(),
    }


@functools.cache
def _pass_scratch(a_shape: tuple[int, ...], dtype: torch.dtype, config: LocalPassConfig,
                  want_z: bool, backend: str, couple: BatchNorm | Peer | None,
                  tile: int) -> int:
    """Bytes the sweep's kernel holds beside its results and the statistics (small_bytes)."""
    if tile == 0:
        return 0
    if couple is not None:
        return batch_op.extra_bytes(
            (tile, *a_shape), dtype, config, couple, backend=backend,
            channels_last=len(a_shape) == 3, want_z=want_z and config.pool != "none")
    if backend == "reference":
        return 0
    groups = len(config.offsets(a_shape[0])) - 1
    return pass_op.extra_bytes(
        (tile, *a_shape), dtype, config, backend=backend, channels_last=len(a_shape) == 3,
        want_z=want_z) - 4 * 2 * tile * groups


def _update_scratch(x_shape: tuple[int, ...], a_shape: tuple[int, ...], w_shape: tuple[int, ...],
                    layer: LocalLayer, dtype: torch.dtype, backend: str, tile: int,
                    whole: bool) -> int:
    inside = update_op.extra_bytes(
        (tile, *x_shape), (tile, *a_shape), w_shape, dtype, geometry=layer.geometry,
        accumulate=not whole or layer.pre_norm is not None, backend=backend)
    # against x̂ the gradient is formed first, then its parts (engine.affine.contract)
    weight = 4 * item_count(w_shape)
    return max(inside + weight, 3 * weight) if layer.pre_norm is not None else inside


#: Output pixels of a call from which the library's choice of kernel no longer changes (measured on
#: AVX-512 and AMX: the last change is at 64).
SETTLED_PIXELS = 256


def _forward_scratch(x_shape: tuple[int, ...], w_shape: tuple[int, ...],
                     geometry: ConvGeometry | None, dtype: torch.dtype, device: str, cast: int,
                     n: int) -> int:
    """Bytes the forward of `n` samples holds beside its output: cast weights, library scratch.

    Measured on zeros, on few samples where more would not change it. On a GPU the library's
    workspace is not part of the plan: `allocated` shows it.
    """
    if device != "cpu" or n == 0:
        return cast
    pixels = 1 if geometry is None else item_count(geometry.output_size(*x_shape[1:]))
    if geometry is not None and choose(pixels, geometry.kernel, dtype, device) == "patches":
        n = min(n, samples_at_once(pixels, item_count(w_shape[1:]), dtype.itemsize))
        return cast + library_scratch(n, x_shape, w_shape, geometry, dtype)
    few = max(2, -(-SETTLED_PIXELS // pixels))
    if n <= 2 * few:
        return cast + library_scratch(n, x_shape, w_shape, geometry, dtype)
    low, high = (library_scratch(k, x_shape, w_shape, geometry, dtype) for k in (few, 2 * few))
    return cast + low + (high - low) * (n - few) // few


@functools.cache
def library_scratch(n: int, x_shape: tuple[int, ...], w_shape: tuple[int, ...],
                    geometry: ConvGeometry | None, dtype: torch.dtype) -> int:
    """Bytes the forward of `n` samples holds beside its output; measured once."""
    x, w = torch.zeros(n, *x_shape, dtype=dtype), torch.zeros(w_shape, dtype=dtype)
    args: tuple[object, ...] = (x, w)
    call: Callable[..., torch.Tensor] = torch.nn.functional.linear
    if geometry is not None:
        w = w.contiguous(memory_format=torch.channels_last)
        args, call = (as_channels_last(x), w, None, geometry), convolve
    with torch.no_grad():
        call(*args)
        out, inside = call_measured(call, args, {})
    return max(0, inside - int(out.numel() * out.element_size()))


def item_count(shape: tuple[int, ...] | None) -> int:
    total = 1
    for s in shape or ():
        total *= s
    return total
