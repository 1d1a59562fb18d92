"""A `local_pass` call as the kernels read it: tensors, flat numbers, the way to a back-end."""

from __future__ import annotations

from typing import Any, cast

import torch

from ffengine.ops import backends, library
from ffengine.ops.config import (
    GOODNESS_CODES,
    LOSS_CODES,
    NORM_CODES,
    LocalPassConfig,
    Loss,
    Tile,
)
from ffengine.ops.host import constant
from ffengine.ops.layout import memory_layout, nchw
from ffengine.ops.memory_accounting import declare, is_fake, listeners
from ffengine.ops.params import LocalPassCall, LocalPassTensors
from ffengine.ops.tracing import traced

#: Calls made before, by the identity of their settings (whose hash would take longer than a call)
#: and by all else that they follow from.
_made: dict[Any, tuple[LocalPassConfig, LocalPassCall]] = {}
MOST_MADE = 4096


def make_call(a: torch.Tensor, config: LocalPassConfig, tile: Tile, scale: float, phase: int,
              with_loss: bool, z_channels: int | None = None) -> LocalPassCall:
    """Flatten config and tile into what a kernel reads; a layer's is made once, not every step.

    z_channels: of the map that z is a slice of; None: z is dense.
    """
    last = memory_layout(a) is torch.channels_last
    if traced():  # sizes may be symbols
        return _flat(a, last, config, tile, scale, phase, with_loss, z_channels)
    key = (id(config), a.shape, last, tile, scale, phase, with_loss, z_channels)
    found = _made.get(key)
    if found is None or found[0] is not config:
        if len(_made) >= MOST_MADE:
            _made.clear()
        found = _made[key] = config, _flat(a, last, config, tile, scale, phase, with_loss,
                                           z_channels)
    return found[1]


def _flat(a: torch.Tensor, channels_last: bool, config: LocalPassConfig, tile: Tile, scale: float,
          phase: int, with_loss: bool, z_channels: int | None) -> LocalPassCall:
    """Pure: unit-tested without a GPU."""
    n = a.shape[0]
    p = (0.0, 0.0, 0.0)
    code, weight = LOSS_CODES["none"], 0.0
    if with_loss:
        loss = cast(Loss, config.loss)
        p, code, weight = loss.kernel_p(), loss.code, loss.scale(tile.rows(n))
    start, half, half_start = tile.layout(n)
    drop = config.dropout
    return LocalPassCall(
        z_channels=a.shape[1] if z_channels is None else z_channels,
        groups=len(config.offsets(a.shape[1])) - 1,
        equal_groups=isinstance(config.groups, int),
        channels_last=channels_last,
        phase=phase,
        goodness=GOODNESS_CODES[config.goodness],
        norm=NORM_CODES[config.norm.kind],
        norm_rms=config.norm.length == "rms",
        norm_per_group=config.norm.scope == "group",
        norm_eps=config.norm.eps,
        straight_through=config.relu_gradient == "straight_through",
        pool=config.pool == "max2",
        blend=config.blend,
        dropout_seed=drop.seed & (2**64 - 1),
        dropout_layer=drop.layer & (2**32 - 1),
        dropout_step=drop.step & (2**32 - 1),
        dropout_threshold=drop.threshold,
        keep_scale=drop.keep_scale,
        loss=code, p0=p[0], p1=p[1], p2=p[2], scale=weight, da_scale=scale,
        start=start, half=half, half_start=half_start,
    )


@library.implements("local_pass")
def run(backend: str, tensors: LocalPassTensors, call: LocalPassCall) -> None:
    """Hand a call to a kernel back-end; the one place that knows where they live."""
    if tensors.a.shape[0] == 0:
        return
    if traced():
        library.local_pass(backend, tensors, call)
        return
    if backend == "cpu" and listeners.get():
        declare(cpu_scratch(tensors.a, call, tensors.h_prev is not None,
                            tensors.shortcut is not None, tensors.z is not None))
    if is_fake(tensors.a):
        return
    if backend == "triton":
        from ffengine.kernels import local_pass as kernels

        kernels.local_pass(tensors, call)
        return
    ext = backends.extension()
    assert ext is not None  # resolve() checked
    if backend == "cpu":
        ext.local_pass_cpu(_pointers(tensors), nchw(tensors.a), _dtype_code(tensors.a), call)
    else:
        stream = torch.cuda.current_stream(tensors.a.device).cuda_stream
        ext.local_pass_cuda(
            _pointers(tensors), nchw(tensors.a), _dtype_code(tensors.a), call, stream)


def cpu_scratch(a: torch.Tensor, call: LocalPassCall, has_h_prev: bool, has_shortcut: bool,
                has_z: bool) -> int:
    """Bytes the C++ kernel's threads hold beside the tensors, for a of this shape and dtype."""
    ext = backends.extension()
    if ext is None:
        return 0
    held: int = ext.local_pass_scratch_cpu(
        nchw(a), _dtype_code(a), call, has_h_prev, has_shortcut, has_z)
    return held


def _pointers(tensors: LocalPassTensors) -> tuple[int, ...]:
    return tuple(0 if t is None else t.data_ptr() for t in tensors)


def _dtype_code(t: torch.Tensor) -> int:
    return {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[t.dtype]


def offsets_tensor(offsets: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(K + 1,) int64."""
    return constant(device, torch.tensor, offsets)
