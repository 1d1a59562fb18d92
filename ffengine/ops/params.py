"""What the ops hand to kernels and to torch.library: tensors and flat numbers, nothing else.

The numbers are those of csrc/params.h; the kernels of every back-end read them by these names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ffengine.ops.config import LocalPassConfig, Norm
from ffengine.ops.optim import OptimCall, OptimConfig, OptimState

#: Phases of `batch_pass`.
PHASE_STATS, PHASE_APPLY, PHASE_PEER_STATS, PHASE_PEER_APPLY, PHASE_MIDDLE = range(5)


class LocalPassTensors(NamedTuple):
    """Destination-passing arguments of a back-end; None where a call has no such tensor."""

    a: torch.Tensor
    y: torch.Tensor | None
    g0: torch.Tensor | None
    h_prev: torch.Tensor | None
    shortcut: torch.Tensor | None  # like z, dense
    offsets: torch.Tensor  # (K + 1,) int64, same device as a
    z: torch.Tensor | None
    g: torch.Tensor  # (N, K) fp32
    loss: torch.Tensor | None  # (N,) or (N/2,) fp32
    coef: torch.Tensor | None  # (N, K) fp32
    da: torch.Tensor | None
    stats: torch.Tensor  # (N, K, 2) fp32
    clock: torch.Tensor | None  # (1,) int32: dropout's step, in place of the call's


@dataclass(frozen=True, slots=True)
class LocalPassCall:
    """A call's numbers, flat, as the kernels read them (csrc/params.h: LocalPassParams)."""

    z_channels: int
    groups: int
    equal_groups: bool
    channels_last: bool
    phase: int
    goodness: int
    norm: int
    norm_rms: bool
    norm_per_group: bool
    norm_eps: float
    straight_through: bool
    pool: bool
    blend: float
    dropout_seed: int
    dropout_layer: int
    dropout_step: int
    dropout_threshold: int
    keep_scale: float
    loss: int
    p0: float
    p1: float
    p2: float
    scale: float
    da_scale: float
    start: int
    half: int
    half_start: int


class BatchPassTensors(NamedTuple):
    """Destination-passing arguments of a back-end (csrc/params.h: BatchPassParams)."""

    a: torch.Tensor
    y: torch.Tensor | None = None
    gamma: torch.Tensor | None = None
    table: torch.Tensor | None = None  # (5, C) fp32; stats, peer: (C,)
    weight: torch.Tensor | None = None  # (N, C) fp32
    moments: torch.Tensor | None = None  # (2, N, C) fp32; peer: (C,)
    extrema: torch.Tensor | None = None  # (2, N, C) fp32
    z: torch.Tensor | None = None
    da: torch.Tensor | None = None
    # the middle reads moments, extrema, y, gamma and these, and writes table, weight and the rest
    pivot: torch.Tensor | None = None  # (C,) fp32: the table of the first sweep
    beta: torch.Tensor | None = None
    running_mean: torch.Tensor | None = None  # (C,) fp32, moved in training
    running_var: torch.Tensor | None = None
    offsets: torch.Tensor | None = None  # (K + 1,) int64
    g: torch.Tensor | None = None  # (N, K) fp32
    loss: torch.Tensor | None = None  # (N,) or (N/2,) fp32
    coef: torch.Tensor | None = None  # (N, K) fp32
    dgamma: torch.Tensor | None = None  # (C,) fp32
    dbeta: torch.Tensor | None = None


#: Of these the sweeps in C++ take so many; the rest are the middle's.
SWEPT = 9


@dataclass(frozen=True, slots=True)
class BatchPassCall:
    """A call's numbers, flat, as the kernels read them."""

    phase: int
    channels_last: bool
    pool: bool
    norm_first: bool
    squares: bool
    straight_through: bool
    # of the middle
    groups: int = 1
    equal_groups: bool = True
    goodness: int = 0
    loss: int = -1
    training: bool = True
    use_running: bool = False
    pixels: int = 1  # of a channel of a sample: what the statistics are taken over
    pixels_z: int = 1
    momentum: float = 0.0
    eps: float = 0.0
    p0: float = 0.0
    p1: float = 0.0
    p2: float = 0.0
    scale: float = 0.0  # weight of one loss value in the batch objective
    da_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class WeightUpdateCall:
    """A call's numbers (csrc/params.h: WeightUpdateParams)."""

    x_channels_last: bool
    da_channels_last: bool
    weight_channels_last: bool
    accumulate: bool
    finish: bool
    inv_scale: float
    optim: OptimCall | None


class LinearStepOutput(NamedTuple):
    """What a step leaves beside the new weights: see `linear_step`."""

    g: torch.Tensor
    loss: torch.Tensor
    coef: torch.Tensor


class LinearStepCall(NamedTuple):
    """The arguments of a step, as `linear_step` names them."""

    weight: torch.Tensor
    x: torch.Tensor
    y: Any
    config: LocalPassConfig
    optim: OptimConfig
    state: OptimState | None
    bias: torch.Tensor | None
    bias_state: OptimState | None
    input_norm: Norm
    g0: torch.Tensor | None
    tile_rows: int | None
    grad_out: torch.Tensor | None
    bias_grad_out: torch.Tensor | None
    finish: bool
