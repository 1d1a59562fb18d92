"""A `batch_pass` kernel call: tensors, flat numbers, the way to a back-end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ffengine.ops import backends, library_batch_pass
from ffengine.ops.call import _dtype_code
from ffengine.ops.layout import nchw
from ffengine.ops.memory_accounting import declare, is_fake, listeners
from ffengine.ops.tracing import traced

PHASE_STATS, PHASE_APPLY, PHASE_PEER_STATS, PHASE_PEER_APPLY, PHASE_MIDDLE = range(5)


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


def run(backend: str, tensors: BatchPassTensors, call: BatchPassCall) -> None:
    """Hand a call to a kernel back-end; the one place that knows where they live."""
    if traced():
        library_batch_pass.batch_pass(backend, tensors, call)
        return
    if tensors.a.shape[0] == 0:
        return
    a = tensors.a
    if backend == "cpu" and listeners.get():
        declare(cpu_scratch(a, call))
    if is_fake(a):
        return
    if backend == "triton":
        from ffengine.kernels import batch_pass as kernels

        kernels.batch_pass(tensors, call)
        return
    ext = backends.extension()
    assert ext is not None  # resolve() checked
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    numbers = (nchw(a), _dtype_code(a), call)
    if backend == "cpu":
        ext.batch_pass_cpu(pointers[:SWEPT], *numbers)
        return
    stream = torch.cuda.current_stream(a.device).cuda_stream
    if call.phase == PHASE_MIDDLE:
        work = torch.empty(3, a.shape[1], dtype=torch.float64, device=a.device)
        ext.batch_middle_cuda(pointers[:SWEPT], (*pointers[SWEPT:], work.data_ptr()), *numbers,
                              stream)
    else:
        ext.batch_pass_cuda(pointers[:SWEPT], *numbers, stream)


def cpu_scratch(a: torch.Tensor, call: BatchPassCall) -> int:
    """Bytes the C++ kernel's threads hold beside the tensors, for a of this shape and dtype."""
    ext = backends.extension()
    if ext is None:
        return 0
    held: int = ext.batch_pass_scratch_cpu(nchw(a), _dtype_code(a), call)
    return held
