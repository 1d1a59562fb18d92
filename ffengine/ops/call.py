"""`local_pass` and `batch_pass` calls as the kernels read them: tensors and flat numbers."""

from __future__ import annotations

from typing import Any, cast

import torch

from ffengine.ops.config import (
    GOODNESS_CODES,
    LOSS_CODES,
    NORM_CODES,
    LocalPassConfig,
    Loss,
    Tile,
)
from ffengine.ops.host import constant
from ffengine.ops.launch import launch, recorded
from ffengine.ops.layout import memory_layout, nchw
from ffengine.ops.params import (
    BatchPassCall,
    BatchPassTensors,
    LocalPassCall,
    LocalPassTensors,
)
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


@recorded("local_pass")
def run(backend: str, tensors: LocalPassTensors, call: LocalPassCall) -> None:
    """`local_pass` on a kernel back-end."""
    if tensors.a.shape[0]:
        launch("local_pass", backend, tensors, nchw(tensors.a), call)


@recorded("batch_pass")
def run_batch(backend: str, tensors: BatchPassTensors, call: BatchPassCall) -> None:
    """A phase of `batch_pass` on a kernel back-end."""
    if tensors.a.shape[0]:
        launch("batch_pass", backend, tensors, nchw(tensors.a), call)


def offsets_tensor(offsets: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(K + 1,) int64."""
    return constant(device, torch.tensor, offsets)
