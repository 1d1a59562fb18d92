"""What the ops hand to kernels and to torch.library: tensors and flat numbers, nothing else.

The numbers are those of csrc/params.h; the kernels of every back-end read them by these names.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ffengine.ops.config import LocalPassConfig, Norm, Seed, Written
from ffengine.ops.optim import ConvGeometry, OptimCall, OptimConfig, Parameter

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
    z: Written | None
    g: Written  # (N, K) fp32
    loss: Written | None  # (N,) or (N/2,) fp32
    coef: Written | None  # (N, K) fp32
    da: Written | None
    stats: Written  # (N, K, 2) fp32
    clock: torch.Tensor | None  # (1,) int32: dropout's step, in place of the call's


class LocalPassCall(NamedTuple):
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
    dropout_seed: Seed
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
    table: Written | None = None  # (5, C) fp32; stats, peer: (C,)
    weight: Written | None = None  # (N, C) fp32
    moments: Written | None = None  # (2, N, C) fp32; peer: (C,)
    extrema: Written | None = None  # (2, N, C) fp32
    z: Written | None = None
    da: Written | None = None
    # the middle reads moments, extrema, y, gamma and these, and writes table, weight and the rest
    pivot: torch.Tensor | None = None  # (C,) fp32: the table of the first sweep
    beta: torch.Tensor | None = None
    running_mean: Written | None = None  # (C,) fp32, moved in training
    running_var: Written | None = None
    offsets: torch.Tensor | None = None  # (K + 1,) int64
    g: Written | None = None  # (N, K) fp32
    loss: Written | None = None  # (N,) or (N/2,) fp32
    coef: Written | None = None  # (N, K) fp32
    dgamma: Written | None = None  # (C,) fp32
    dbeta: Written | None = None
    work: Written | None = None  # (3, C) fp64


class BatchPassCall(NamedTuple):
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


class WeightUpdateRequest(NamedTuple):
    """The arguments of `weight_update`, by its names."""

    weight: Parameter
    x: torch.Tensor
    da: torch.Tensor
    optim: OptimConfig
    geometry: ConvGeometry | None
    bias: Parameter | None
    finish: bool
    da_scale: float


class WeightUpdateCall(NamedTuple):
    """The numbers of the CPU's kernel (csrc/params.h: WeightUpdateParams)."""

    x_channels_last: bool = False
    da_channels_last: bool = False
    weight_channels_last: bool = False
    accumulate: bool = False
    finish: bool = False
    inv_scale: float = 1.0
    optim: OptimCall | None = None


class StepCall(NamedTuple):
    """The numbers of an optimizer step (csrc/params.h: OptimizerStepParams, CompressedStepParams).

    Its tensors: grad, weight, m, v, m_scale, v_scale; and on a GPU half, which gets the weight in
    16 bits, and row, (8,) fp32 in place of lr, weight_decay and step, or None.
    """

    optim: OptimCall
    inv_scale: float
    half_dtype: int = 0
    format: int = 0
    bf16_weight: bool = False
    seed: int = 0
    stream: int = 0


class LinearCall(NamedTuple):
    """The numbers of the passes around a tile's local_pass (csrc/params.h: LinearStepParams)."""

    rms: bool = False
    eps: float = 0.0
    inv_scale: float = 1.0
    chunk: int = 0


class RoutesCall(NamedTuple):
    """The settings of `routes` (csrc/params.h: RoutesParams)."""

    pool: bool
    straight: bool = False


class LinearStepOutput(NamedTuple):
    """What a step leaves beside the new weights: see `linear_step`."""

    g: Written
    loss: Written
    coef: Written


class LinearStepRequest(NamedTuple):
    """The arguments of `linear_step`, by its names."""

    weight: Parameter
    x: torch.Tensor
    y: torch.Tensor
    config: LocalPassConfig
    optim: OptimConfig
    bias: Parameter | None
    input_norm: Norm
    g0: torch.Tensor | None
    tile_rows: int | None
    finish: bool
