"""`batch_stats.between` as a kernel of the back-ends that have one.

triton: kernels/batch_middle.py   cuda: csrc/cuda/batch_middle.cu
"""

from __future__ import annotations

from typing import Any, cast

import torch

from ffengine.ops.batch_stats import Middle, Sweep
from ffengine.ops.call import offsets_tensor, run_batch
from ffengine.ops.config import GOODNESS_CODES, LocalPassConfig, Loss
from ffengine.ops.params import PHASE_MIDDLE, BatchPassCall, BatchPassTensors

BACKENDS = frozenset({"triton", "cuda"})
#: Held beside the tensors, a channel: the kernels' three fp64 numbers.
CHANNEL_BYTES = 24


def usable(backend: str, y: Any, config: LocalPassConfig) -> bool:
    """Is there a kernel: for every built-in loss, and for none."""
    return backend in BACKENDS and (y is None or isinstance(config.loss, Loss))


def between(backend: str, swept: BatchPassTensors, call: BatchPassCall, y: torch.Tensor | None,
            s: Sweep) -> Middle:
    """Everything between the sweeps, on the device.

    swept: a, moments, extrema and pivot, as the first sweep left them; call: its.
    """
    n, channels = swept.a.shape[:2]
    offsets = s.config.offsets(channels)
    loss = None if y is None else cast(Loss, s.config.loss)
    made = _allocate(swept.a, n, channels, len(offsets) - 1, loss, s.affine is not None)
    gamma, beta = (t.contiguous() for t in s.affine) if s.affine else (None, None)
    running_mean, running_var = s.running or (None, None)
    tensors = swept._replace(
        y=None if y is None else y.contiguous(), gamma=gamma, beta=beta,
        running_mean=running_mean, running_var=running_var,
        offsets=offsets_tensor(offsets, swept.a.device), **made._asdict(),
        work=torch.empty(3, channels, dtype=torch.float64, device=swept.a.device))
    run_batch(backend, tensors, _call(call, s, len(offsets) - 1, loss, n))
    return made


def _allocate(a: torch.Tensor, n: int, channels: int, groups: int, loss: Loss | None,
              affine: bool) -> Middle:
    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.float32, device=a.device)

    table, g = empty(5, channels), empty(n, groups)
    if loss is None:
        return Middle(table, g)
    return Middle(table, g, weight=empty(n, channels), loss=empty(n // 2 if loss.paired else n),
                  coef=empty(n, groups), dgamma=empty(channels) if affine else None,
                  dbeta=empty(channels) if affine else None)


def _call(call: BatchPassCall, s: Sweep, groups: int, loss: Loss | None, n: int) -> BatchPassCall:
    p = (0.0, 0.0, 0.0) if loss is None else loss.kernel_p()
    return call._replace(
        phase=PHASE_MIDDLE, groups=groups, equal_groups=isinstance(s.config.groups, int),
        goodness=GOODNESS_CODES[s.config.goodness], loss=-1 if loss is None else loss.code,
        training=s.training, use_running=s.coupling.use_running, pixels=s.pixels,
        pixels_z=s.pixels_z, momentum=s.coupling.momentum, eps=s.coupling.eps, p0=p[0], p1=p[1],
        p2=p[2], scale=0.0 if loss is None else loss.scale(n), da_scale=s.da_scale)
