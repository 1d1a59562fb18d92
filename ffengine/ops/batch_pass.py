"""`batch_pass`: `local_pass` for layers whose samples see each other through the batch.

BatchNorm:  a -> h = relu(a) -> max-pool, BatchNorm (either order) -> z -> group goodness g (N, K)
            -> local loss -> da = dL/da through the batch statistics, dgamma, dbeta.
Peer:       `local_pass` with Hinton's peer normalisation added to the objective.

reference: ffengine/reference/batch_pass.py   cpu: csrc/cpu/batch_pass.cpp
triton: kernels/batch_pass.py                 cuda: csrc/cuda/batch_pass.cu
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch

from ffengine.ops import backends, batch_middle, batch_stats
from ffengine.ops.call import run_batch
from ffengine.ops.config import BatchNorm, LocalPassConfig, Loss, Peer, Tile, da_scale
from ffengine.ops.launch import scratch
from ffengine.ops.layout import destination, memory_layout, nchw, numel, pooled_shape
from ffengine.ops.local_pass import (
    check_targets,
    forbid_backward,
    local_pass,
)
from ffengine.ops.local_pass import extra_bytes as local_extra_bytes
from ffengine.ops.memory_accounting import is_fake
from ffengine.ops.overflow import check_variance
from ffengine.ops.params import (
    PHASE_APPLY,
    PHASE_PEER_APPLY,
    PHASE_PEER_STATS,
    PHASE_STATS,
    BatchPassCall,
    BatchPassTensors,
)
from ffengine.ops.tracing import traced, unrecorded
from ffengine.reference import batch_pass as reference

Coupling = BatchNorm | Peer


class BatchPassOutput(NamedTuple):
    """What one call leaves: see `batch_pass`."""

    z: torch.Tensor | None
    g: torch.Tensor
    loss: torch.Tensor | None
    coef: torch.Tensor | None
    da: torch.Tensor | None
    #: da is dL/da times this power of two (1 except in fp16); weight_update divides by it.
    da_scale: float = 1.0
    dgamma: torch.Tensor | None = None
    dbeta: torch.Tensor | None = None
    #: Peer's share of the objective, 0-d; None under BatchNorm.
    penalty: torch.Tensor | None = None


def bytes_moved(shape: tuple[int, ...], dtype: torch.dtype, config: LocalPassConfig,
                coupling: BatchNorm | Peer, *, want_z: bool = True, want_da: bool = True) -> int:
    """Bytes two sweeps must move: a read twice, z and da written once, the small results.

    BatchNorm: the (2, N, C) moments between the sweeps are written and read, for the windows' too
    where a pool comes after it; weight (N, C) likewise. Peer: its gradient is added to da.
    """
    item, acc = dtype.itemsize, 8 if dtype is torch.float64 else 4
    n, c = shape[:2]
    k = len(config.offsets(c)) - 1
    large = 2 * numel(shape) + numel(pooled_shape(shape, config)) * want_z + numel(shape) * want_da
    small = n * (2 * k + 1)
    if isinstance(coupling, Peer):
        return item * (large + 3 * numel(shape) * want_da) + acc * small
    planes = 4 if config.pool == "max2" and coupling.order == "norm_pool" else 2
    return item * large + acc * (small + 2 * n * c * (planes + want_da))


#: Most (N, C) fp64 tensors that ffengine/ops/batch_stats.py holds at once, and fp64 numbers a
#: channel and a goodness; measured (torch widens the fp32 operand of a mixed product into another).
MIDDLE_TENSORS, MIDDLE_CHANNEL, MIDDLE_GOODNESS = 4.5, 16, 4


def extra_bytes(shape: tuple[int, ...], dtype: torch.dtype, config: LocalPassConfig,
                coupling: BatchNorm | Peer, *, backend: str = "cpu", channels_last: bool = False,
                want_z: bool = True, want_da: bool = True) -> int:
    """Scratch bytes a back-end holds at most beside inputs and outputs.

    BatchNorm: weight (N, C) beside z and da; or, before these exist, the moments and the
    arithmetic between the sweeps, if that is more than z and da (want_z, want_da: False where the
    call allocates none). cpu: and a few rows of channels a thread, or a pooled sample.
    """
    n, c = shape[:2]
    if backend == "reference":  # plain PyTorch keeps whole maps for its backward
        return max(dtype.itemsize, 4) * numel(shape) * 12
    if isinstance(coupling, Peer):
        return local_extra_bytes(shape, dtype, config, backend=backend) + 4 * 6 * c
    layout = torch.channels_last if channels_last else torch.contiguous_format
    a = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
    norm_first, pools = coupling.order == "norm_pool", config.pool == "max2"
    call = BatchPassCall(PHASE_STATS, channels_last, pools, norm_first, True, False)
    present = [True] * len(BatchPassTensors._fields)
    stats, apply = (scratch("batch_pass", present, nchw(a), dtype, call._replace(phase=p))
                    if backend == "cpu" and n else 0 for p in (PHASE_STATS, PHASE_APPLY))
    moments = 4 * 2 * n * c * (2 if pools and norm_first else 1)
    groups = len(config.offsets(c)) - 1
    if backend in batch_middle.BACKENDS and isinstance(config.loss, Loss):  # weight, table, its own
        middle = 4 * (n * c + 5 * c) + batch_middle.CHANNEL_BYTES * c
    else:
        middle = 8 * int(MIDDLE_TENSORS * n * c + MIDDLE_CHANNEL * c + MIDDLE_GOODNESS * n * groups)
    later = dtype.itemsize * (numel(pooled_shape(shape, config)) * want_z
                              + numel(shape) * want_da)
    return max(moments + max(stats, middle) - later, 4 * (n * c * want_da + 5 * c) + apply)


def batch_pass(
    a: torch.Tensor,
    y: Any = None,
    *,
    config: LocalPassConfig,
    coupling: BatchNorm | Peer,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    training: bool = True,
    out: torch.Tensor | None = None,
    want_z: bool = True,
    want_da: bool = False,
    backend: str = "auto",
) -> BatchPassOutput:
    """Activation, BatchNorm or peer normalisation, goodness, local loss and all its gradients.

    The whole batch in one call: its rows are coupled. The running statistics are the only
    arguments written (in place, when training), and `out`.

    Args:
        a: pre-activation (N, C, *spatial), fp32 | bf16 | fp16 (fp64: reference only), contiguous
            or channels_last; other strides are copied first. Peer: (N, C).
        y: targets as in `local_pass`; None: no loss, no gradients. Peer: int64 (N,), 1 = positive.
        config: groups, goodness, loss, relu_gradient and pool of `local_pass`; without dropout
            and blend. BatchNorm: norm none (z is BatchNorm's output, goodness is read from z).
        coupling: BatchNorm (CwComp, support neurons) or Peer (Löwe et al.).
        gamma, beta: BatchNorm's affine (C,), both or neither; fp32 (fp64 beside an fp64 a).
        running_mean, running_var: (C,) like gamma; BatchNorm's running statistics with torch's
            semantics (unbiased variance), both or neither. Peer: running_mean is its state r.
        training: False normalises by the running statistics and updates nothing; for Peer the
            penalty is that of the state as it is, without gradient.
        out: `out=a` writes z over a (no pool); otherwise a tensor of z's shape and dtype.
        want_z, want_da: which of the large results to compute.

    Returns:
        BatchPassOutput: z (dtype of a), g (N, K), loss (N,) unscaled per row (N/2 for pair
        losses), coef (N, K) = dL/dg / m with L the batch objective (for sums: / 1), da in a's
        dtype times `da_scale`; dgamma, dbeta (C,) of L; penalty. The small ones are fp32 (fp64
        for fp64 input). A max-pool's gradient goes to the first maximum in row-major order.

    Raises:
        TypeError, ValueError: one line with what was expected and what came.
    """
    shape_z = _check(a, y, config, coupling, gamma, beta, running_mean, running_var, training, out)
    name = backends.resolve("batch_pass", backend, a.device.type, a.dtype)
    groups = len(config.offsets(a.shape[1])) - 1
    m = numel(shape_z) // max(a.shape[0], 1) // groups
    scale = da_scale(a.dtype, config.goodness, a.shape[0], max(m, 1))
    record = torch.is_grad_enabled() and a.requires_grad
    # no row: nothing to learn from, and nothing to divide by
    request = _Request(a.detach() if record else a, y, config, coupling, gamma, beta, running_mean,
                       running_var, training and a.shape[0] > 0, out, want_z, want_da, shape_z,
                       scale)
    if name == "reference" or a.shape[0] == 0:
        result = _run_reference(request)
    elif isinstance(coupling, BatchNorm):
        result = _run_norm(request, coupling, name)
    else:
        result = _run_peer(request, coupling, name)
    if request.training and name in ("cpu", "reference") and not (is_fake(a) or traced()):
        check_variance(running_var)
    return cast(BatchPassOutput, forbid_backward(a, result)) if record else result


class _Request(NamedTuple):
    """The checked arguments of one call."""

    a: torch.Tensor
    y: Any
    config: LocalPassConfig
    coupling: Coupling
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    training: bool
    out: torch.Tensor | None
    want_z: bool
    want_da: bool
    shape_z: tuple[int, ...]
    scale: float


def _run_reference(r: _Request) -> BatchPassOutput:
    z, g, loss, coef, da, dgamma, dbeta, penalty = reference.batch_pass(
        r.a, r.y, config=r.config, coupling=r.coupling, gamma=r.gamma, beta=r.beta,
        running_mean=r.running_mean, running_var=r.running_var, training=r.training,
        want_z=r.want_z, want_da=r.want_da, da_scale=r.scale)
    if r.out is not None and z is not None:
        z = r.out.copy_(z)
    return BatchPassOutput(z, g, loss, coef, da, r.scale, dgamma, dbeta, penalty)


def _run_norm(r: _Request, coupling: BatchNorm, backend: str) -> BatchPassOutput:
    layout = memory_layout(r.a)
    a, layout = (r.a, layout) if layout else (r.a.contiguous(), torch.contiguous_format)
    call = _call(r, coupling, layout)
    middle = _first_sweep(r, coupling, backend, a, call)
    z = destination(r.out, r.out is r.a, r.shape_z, a, layout) if r.want_z else None
    da = torch.empty_like(a, memory_format=layout) if r.want_da and r.y is not None else None
    if z is not None or da is not None:
        run_batch(
            backend, BatchPassTensors(a, table=middle.table, weight=middle.weight, z=z, da=da),
            call._replace(phase=PHASE_APPLY))
    if r.out is not None and z is not None and z is not r.out:
        z = r.out.copy_(z)
    return BatchPassOutput(z, middle.g, middle.loss, middle.coef, da, r.scale, middle.dgamma,
                           middle.dbeta)


def _call(r: _Request, coupling: BatchNorm, layout: torch.memory_format) -> BatchPassCall:
    return BatchPassCall(
        phase=PHASE_STATS, channels_last=layout is torch.channels_last,
        pool=r.config.pool == "max2", norm_first=coupling.order == "norm_pool",
        squares=r.config.goodness != "mean",
        straight_through=r.config.relu_gradient == "straight_through")


def _first_sweep(r: _Request, coupling: BatchNorm, backend: str, a: torch.Tensor,
                 call: BatchPassCall) -> batch_stats.Middle:
    """Moments of a, and what follows from them; the moments are gone on return."""
    n, channels = a.shape[:2]
    moments = torch.empty((2, n, channels), dtype=torch.float32, device=a.device)
    extrema = torch.empty_like(moments) if call.pool and call.norm_first else None
    gamma = None if r.gamma is None else r.gamma.contiguous()
    pivot = batch_stats.pivots(a)
    run_batch(
        backend, BatchPassTensors(a, gamma=gamma, table=pivot, moments=moments, extrema=extrema),
        call)
    pixels_z = numel(r.shape_z[2:])
    sweep = batch_stats.Sweep(
        config=r.config, coupling=coupling,
        affine=None if r.gamma is None or r.beta is None else (r.gamma, r.beta),
        running=None if r.running_mean is None or r.running_var is None
        else (r.running_mean, r.running_var),
        training=r.training, pixels=numel(tuple(a.shape[2:])) if call.norm_first else pixels_z,
        pixels_z=pixels_z, da_scale=r.scale)
    if batch_middle.usable(backend, r.y, r.config):
        return batch_middle.between(
            backend, BatchPassTensors(a, moments=moments, extrema=extrema, pivot=pivot), call, r.y,
            sweep)
    return batch_stats.between(moments, extrema, pivot, r.y, sweep)


def _run_peer(r: _Request, coupling: Peer, backend: str) -> BatchPassOutput:
    """`local_pass`, then the penalty's gradient on the positive rows of its da."""
    a = r.a.contiguous()
    call = BatchPassCall(PHASE_PEER_STATS, False, False, False, False,
                         r.config.relu_gradient == "straight_through")
    with unrecorded():
        penalty, answer = _peer_penalty(r, coupling, backend, a, call)
    late = r.want_da and r.out is r.a  # the mask is read from a: z may cover it only at the end
    local = local_pass(a, r.y, config=r.config, out=None if late else r.out,
                       want_z=r.want_z and not late, want_da=r.want_da, backend=backend)
    if answer is not None and local.da is not None:
        run_batch(
            backend,
            BatchPassTensors(a, y=r.y.contiguous(), table=answer * r.scale, da=local.da),
            call._replace(phase=PHASE_PEER_APPLY))
    z = local.z
    if late and r.want_z:
        z = local_pass(a, config=r.config, out=r.out, backend=backend).z
    return BatchPassOutput(z, local.g, local.loss, local.coef, local.da, r.scale, penalty=penalty)


def _peer_penalty(r: _Request, coupling: Peer, backend: str, a: torch.Tensor,
                  call: BatchPassCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(penalty, its gradient (C,) on h of every positive row); r' over the state when training."""
    state = r.running_mean
    assert state is not None  # the op checked
    if not r.training or not coupling.weight:
        return coupling.weight * (state.mean() - state).square().mean(), None
    mean = torch.empty_like(state)
    run_batch(backend, BatchPassTensors(a, y=r.y.contiguous(), moments=mean), call)
    rows = (r.y == 1).sum()
    after = coupling.momentum * state + (1 - coupling.momentum) * mean
    state.copy_(torch.where(rows > 0, after, state))
    gap = state - state.mean()
    share = 2 * coupling.weight * (1 - coupling.momentum) / state.numel()
    return coupling.weight * gap.square().mean(), gap * (share / rows)


def _check(a: torch.Tensor, y: Any, config: LocalPassConfig, coupling: Coupling,
           gamma: torch.Tensor | None, beta: torch.Tensor | None,
           running_mean: torch.Tensor | None, running_var: torch.Tensor | None, training: bool,
           out: torch.Tensor | None) -> tuple[int, ...]:
    """Validate without a host sync; return z's shape."""
    if not isinstance(a, torch.Tensor) or not a.is_floating_point():
        came = a.dtype if isinstance(a, torch.Tensor) else type(a).__name__
        raise TypeError(f"[batch_pass] a must be a floating-point tensor, got {came}")
    if a.dim() < 2:
        raise ValueError(f"[batch_pass] a must be (N, C, *spatial), got shape {tuple(a.shape)}")
    groups = len(config.offsets(a.shape[1])) - 1
    _check_config(config, coupling, tuple(a.shape))
    shape_z = pooled_shape(tuple(a.shape), config)
    _check_vectors(a, coupling, gamma, beta, running_mean, running_var, training)
    if y is not None and isinstance(config.loss, Loss):
        check_targets(y, a.shape[0], groups, config.loss, a.device, Tile())
    if isinstance(coupling, BatchNorm):
        stats_shape = shape_z if coupling.order == "pool_norm" else tuple(a.shape)
        if training and a.shape[0] and numel(stats_shape) == a.shape[1]:
            raise ValueError("[batch_pass] batch statistics need more than one value a channel, "
                             f"got {tuple(a.shape)}")
    elif training:
        _check_positive_rows(a, y)
    if out is not None and (tuple(out.shape) != shape_z or out.dtype != a.dtype
                            or out.device != a.device):
        raise ValueError(f"[batch_pass] out must be {shape_z} {a.dtype} on {a.device}, "
                         f"got {tuple(out.shape)} {out.dtype} on {out.device}")
    return shape_z


def _check_config(config: LocalPassConfig, coupling: Coupling, shape: tuple[int, ...]) -> None:
    if not isinstance(coupling, Coupling):
        raise TypeError("[batch_pass] coupling must be BatchNorm or Peer, "
                        f"got {type(coupling).__name__}")
    if config.dropout.p:
        raise ValueError(f"[batch_pass] expected no dropout, got p={config.dropout.p}")
    if config.blend != 1.0:
        raise ValueError(f"[batch_pass] expected no blend, got blend={config.blend}")
    if isinstance(coupling, Peer):
        if len(shape) != 2:
            raise ValueError("[batch_pass] Peer is for linear layers: a must be (N, C), "
                             f"got {shape}")
        if isinstance(config.loss, Loss) and not config.loss.binary:
            raise ValueError("[batch_pass] Peer needs a loss of positive and negative rows, "
                             f"got {config.loss.name}")
    elif config.norm.kind != "none":
        raise ValueError("[batch_pass] BatchNorm's output is z: config.norm must be none, "
                         f"got {config.norm.kind}")
    if config.pool == "max2" and (len(shape) != 4 or shape[2] < 2 or shape[3] < 2):
        raise ValueError(
            f"[batch_pass] max2 pooling needs (N, C, H >= 2, W >= 2), got {shape}")


def _check_vectors(a: torch.Tensor, coupling: Coupling, gamma: torch.Tensor | None,
                   beta: torch.Tensor | None, running_mean: torch.Tensor | None,
                   running_var: torch.Tensor | None, training: bool) -> None:
    dtype = torch.float64 if a.dtype is torch.float64 else torch.float32
    for name, t in (("gamma", gamma), ("beta", beta), ("running_mean", running_mean),
                    ("running_var", running_var)):
        if t is not None and (tuple(t.shape) != (a.shape[1],) or t.dtype != dtype
                              or t.device != a.device):
            raise ValueError(f"[batch_pass] {name} must be ({a.shape[1]},) {dtype} on {a.device}, "
                             f"got {tuple(t.shape)} {t.dtype} on {t.device}")
    if (gamma is None) != (beta is None):
        raise ValueError("[batch_pass] expected gamma and beta both or neither, got one")
    if isinstance(coupling, Peer):
        if running_mean is None or running_var is not None or gamma is not None:
            raise ValueError("[batch_pass] Peer takes running_mean and neither running_var nor "
                             "an affine, got something else")
    elif (running_mean is None) != (running_var is None):
        raise ValueError("[batch_pass] expected running_mean and running_var both or neither, "
                         "got one")
    elif running_mean is None and (coupling.use_running or not training):
        raise ValueError("[batch_pass] expected running statistics where the batch's are not "
                         "used, got None")


def _check_positive_rows(a: torch.Tensor, y: Any) -> None:
    if not isinstance(y, torch.Tensor) or y.dtype is not torch.int64:
        came = y.dtype if isinstance(y, torch.Tensor) else type(y).__name__
        raise TypeError("[batch_pass] Peer in training needs positive rows: an int64 tensor y, "
                        f"got {came}")
    if tuple(y.shape) != (a.shape[0],) or y.device != a.device:
        raise ValueError(f"[batch_pass] y must be ({a.shape[0]},) on {a.device}, "
                         f"got {tuple(y.shape)} on {y.device}")
