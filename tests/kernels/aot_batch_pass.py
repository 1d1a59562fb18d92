"""The batch_pass calls that tests/kernels/aot_worker.py compiles."""

from __future__ import annotations

import torch
from ffengine.kernels import batch_pass

from ffengine.ops.batch_call import BatchPassCall, BatchPassTensors


def sweeps(shape: tuple[int, ...], pool: bool = False, norm_first: bool = False,
           dtype: torch.dtype = torch.float32, channels_last: bool = False) -> None:
    """Both sweeps under BatchNorm, of every result."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    a = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout)
    n, channels = shape[:2]
    size_z = [s // 2 if pool else s for s in shape[2:]]
    z = torch.zeros(n, channels, *size_z, dtype=dtype)
    zeros = torch.zeros
    for phase in (0, 1):
        batch_pass.batch_pass(
            BatchPassTensors(
                a, gamma=zeros(channels), table=zeros(5, channels), weight=zeros(n, channels),
                moments=zeros(2, n, channels), extrema=zeros(2, n, channels), z=z,
                da=torch.zeros_like(a)),
            BatchPassCall(phase, channels_last, pool, norm_first, True, False))


def peer() -> None:
    """The two kernels of peer normalisation."""
    a = torch.zeros(8, 1000)
    for phase in (2, 3):
        batch_pass.batch_pass(
            BatchPassTensors(a, y=torch.zeros(8, dtype=torch.int64), table=torch.zeros(1000),
                             moments=torch.zeros(1000), da=torch.zeros_like(a)),
            BatchPassCall(phase, False, False, False, False, False))


VARIANTS = {
    "batch-nhwc-fp32": lambda: sweeps((2, 240, 16, 16), channels_last=True),
    "batch-nhwc-bf16": lambda: sweeps((2, 240, 16, 16), dtype=torch.bfloat16, channels_last=True),
    "batch-nchw-bf16": lambda: sweeps((2, 240, 16, 16), dtype=torch.bfloat16),
    "batch-linear-fp32": lambda: sweeps((2, 2048)),
    "batch-pool-nhwc-fp32": lambda: sweeps((2, 80, 32, 32), True, channels_last=True),
    "batch-first-nhwc-bf16": lambda: sweeps((2, 480, 16, 16), True, True, torch.bfloat16, True),
    "batch-first-nchw-fp32": lambda: sweeps((2, 80, 33, 31), True, True),
    "batch-peer": peer,
}
