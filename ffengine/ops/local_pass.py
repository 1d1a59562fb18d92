"""`local_pass`: one sweep over a layer's pre-activation.

a -> activation, dropout, pool -> group goodness g (N, K) -> per-sample local loss and its
gradient on g -> normalised features z, and on request da = dL/da.

reference: ffengine/reference/local_pass.py   cpu: csrc/cpu/local_pass.cpp
triton: kernels/local_pass.py                 cuda: csrc/cuda/local_pass.cu
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch

from ffengine.ops import backends
from ffengine.ops.call import make_call, offsets_tensor, run
from ffengine.ops.config import (
    PHASE_APPLY,
    PHASE_FUSED,
    PHASE_STATS,
    LocalPassConfig,
    Loss,
    LossFunction,
    Tile,
    da_scale,
)
from ffengine.ops.host import widths
from ffengine.ops.launch import scratch
from ffengine.ops.layout import (
    destination,
    map_channels,
    memory_layout,
    nchw,
    numel,
    pooled_shape,
)
from ffengine.ops.memory_accounting import declare, is_fake
from ffengine.ops.overflow import Overflowed, overflows
from ffengine.ops.params import LocalPassCall, LocalPassTensors
from ffengine.ops.tracing import traced
from ffengine.reference import local_pass as reference

__all__ = ["LocalPassCall", "LocalPassOutput", "LocalPassTensors", "bytes_moved", "extra_bytes",
           "local_pass", "make_call", "run"]

WHOLE = Tile()


class LocalPassOutput(NamedTuple):
    """What one sweep leaves: see `local_pass`."""

    z: torch.Tensor | None
    g: torch.Tensor
    loss: torch.Tensor | None
    coef: torch.Tensor | None
    da: torch.Tensor | None
    #: da is dL/da times this power of two (1 except in fp16); weight_update divides by it.
    da_scale: float = 1.0


def bytes_moved(shape: tuple[int, ...], dtype: torch.dtype, config: LocalPassConfig, *,
                want_z: bool = True, want_da: bool = True, shortcut: bool = False) -> int:
    """Bytes a sweep must move: a and a shortcut read once, z and da written once, the (N, K)
    results."""
    item = dtype.itemsize
    n, elements = shape[0], numel(shape)
    pooled = numel(pooled_shape(shape, config))
    k = len(config.offsets(shape[1])) - 1
    beside = pooled * ((config.blend != 1.0) + shortcut)
    acc = 8 if dtype is torch.float64 else 4
    return item * (elements + pooled * want_z + elements * want_da + beside) + acc * n * (2 * k + 1)


def extra_bytes(shape: tuple[int, ...], dtype: torch.dtype, config: LocalPassConfig, *,
                backend: str = "cpu", channels_last: bool = False, want_z: bool = True,
                shortcut: bool = False, z_channels: int | None = None) -> int:
    """Scratch bytes a back-end holds beside inputs and outputs.

    Every kernel back-end keeps the (N, K, 2) statistics; cpu one sample a thread where dropout,
    pool or blend need it; triton the partial moments of groups that one program cannot hold.
    """
    if backend == "reference":  # plain PyTorch keeps whole maps
        return max(dtype.itemsize, 4) * numel(shape) * 4
    k = len(config.offsets(shape[1])) - 1
    stats = 4 * shape[0] * k * 2
    layout = torch.channels_last if channels_last else torch.contiguous_format
    a = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
    if backend == "triton":
        return stats + _triton_partials(a, config, k)
    if backend == "cpu" and shape[0]:
        call = make_call(a, config, WHOLE, 1.0, PHASE_FUSED, isinstance(config.loss, Loss),
                         z_channels)
        there = {"h_prev": config.blend != 1.0, "shortcut": shortcut, "z": want_z}
        present = [there.get(name, False) for name in LocalPassTensors._fields]
        return stats + scratch("local_pass", present, nchw(a), dtype, call)
    return stats


def _triton_partials(a: torch.Tensor, config: LocalPassConfig, groups: int) -> int:
    from ffengine.kernels.launch import plan_launch, scratch_bytes

    n, c, h, w = nchw(a)
    launch = plan_launch(
        c, h, w, groups, equal=isinstance(config.groups, int),
        channels_last=memory_layout(a) is torch.channels_last, pool=config.pool == "max2",
        itemsize=a.element_size(), dropout=config.dropout.p > 0)
    held: int = scratch_bytes(n, groups, launch, config.goodness != "mean")
    return held


def local_pass(
    a: torch.Tensor,
    y: Any = None,
    *,
    config: LocalPassConfig,
    g0: torch.Tensor | None = None,
    h_prev: torch.Tensor | None = None,
    shortcut: torch.Tensor | None = None,
    clock: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    want_z: bool = True,
    want_da: bool = False,
    da_out: torch.Tensor | None = None,
    tile: Tile = WHOLE,
    backend: str = "auto",
) -> LocalPassOutput:
    """Activation, goodness, local loss, its gradient and the normalised features, in one sweep.

    Args:
        a: pre-activation (N, C, *spatial), fp32 | bf16 | fp16 (fp64: reference only), contiguous
            or channels_last; other strides are copied first.
        y: targets int64 (N,): class per row, or 1 / 0 = positive / negative for threshold, bce,
            symba, margin. Anything, if `config.loss` is a function. None: no loss, g and z only.
        g0: (N, K) fp32 term added to the goodness (collaborative FF).
        h_prev: shape of z; blended in when `config.blend` is not 1.
        shortcut: shape and dtype of z, added to it: a residual connection. No gradient, goodness or
            loss sees it.
        clock: int32 (1,), the step of `config.dropout` where a captured call has to read it anew.
        out: `out=a` writes z over a (no pool); otherwise a tensor of z's shape and dtype, or a
            slice of the channels of a wider map (a concatenation).
        want_z, want_da: which of the large results to compute.
        da_out: `da_out=a` writes da over a (no pool, no z); otherwise a tensor like a.
        tile: which rows of the whole batch these are; losses scale by the whole batch.

    Returns:
        LocalPassOutput: z (dtype of a), g (N, K), loss (N,) unscaled per row (N/2 for pair
        losses), coef (N, K) = dL/dg / m with L the batch objective (for sums: / 1), da in a's
        dtype times `da_scale`. g, loss and coef are fp32 (fp64 for fp64 input).

    Raises:
        TypeError, ValueError: one line with what was expected and what came.
    """
    shape_z = _check(a, y, config, g0, h_prev, shortcut, clock, out, want_z, tile)
    if da_out is not None:
        _check_da_out(a, da_out, y, config, want_z, want_da)
    name = backends.resolve("local_pass", backend, a.device.type, a.dtype)
    m = numel(shape_z) // max(a.shape[0], 1) // (len(config.offsets(a.shape[1])) - 1)
    scale = da_scale(a.dtype, config.goodness, tile.rows(a.shape[0]), max(m, 1))
    record = torch.is_grad_enabled() and a.requires_grad
    request = _Request(a.detach() if record else a, y, config, g0, h_prev, shortcut, clock, out,
                       want_z, want_da, tile, shape_z, scale, da_out)
    result = _run_reference(request) if name == "reference" else _run_kernel(request, name)
    if want_z and name in ("cpu", "reference") and not (is_fake(a) or traced()):
        _mend_overflow(request, result)
    return forbid_backward(a, result) if record else result


class _Request(NamedTuple):
    """The checked arguments of one call."""

    a: torch.Tensor
    y: Any
    config: LocalPassConfig
    g0: torch.Tensor | None
    h_prev: torch.Tensor | None
    shortcut: torch.Tensor | None
    clock: torch.Tensor | None
    out: torch.Tensor | None
    want_z: bool
    want_da: bool
    tile: Tile
    shape_z: tuple[int, ...]
    scale: float
    da_out: torch.Tensor | None = None


def _run_reference(r: _Request) -> LocalPassOutput:
    config = r.config
    z, g, loss, coef, da = reference.local_pass(
        r.a, r.y, config=config, g0=r.g0, h_prev=r.h_prev, shortcut=r.shortcut, want_z=r.want_z,
        want_da=r.want_da, tile=r.tile, da_scale=r.scale, clock=r.clock)
    if r.out is not None and z is not None:
        z = r.out.copy_(z)
    if r.da_out is not None and da is not None:
        da = r.da_out.copy_(da)
    return LocalPassOutput(z, g, loss, coef, da, r.scale)


def _mend_overflow(r: _Request, result: LocalPassOutput) -> None:
    """Where squares overflowed fp32, z once more, in fp64; Overflowed if `a` is gone by then."""
    z = result.z
    if z is None or r.a.device.type != "cpu" or r.a.dtype is torch.float64 or not overflows(
            result.g, r.config, r.shape_z[1:]):
        return
    if r.out is not None and r.out.data_ptr() == r.a.data_ptr():
        if result.g.isinf().any():  # which says it
            return
        raise Overflowed("[local_pass] out=a expected activations whose squares are finite in "
                         f"float32, got a goodness of {float(result.g.abs().max()):.3g}")
    wide = reference.local_pass(r.a.double(), config=r.config, h_prev=r.h_prev,
                                shortcut=r.shortcut, tile=r.tile, clock=r.clock)[0]
    assert wide is not None
    z.copy_(wide)


def _run_kernel(r: _Request, backend: str) -> LocalPassOutput:
    layout = memory_layout(r.a)
    a, layout = (r.a, layout) if layout else (r.a.contiguous(), torch.contiguous_format)
    tensors = _allocate(r, a, layout)
    if backend == "triton" and is_fake(a):  # a real call's show themselves
        declare(_triton_partials(a, r.config, tensors.g.shape[1]))
    custom = r.y is not None and not isinstance(r.config.loss, Loss)
    loss, z = tensors.loss, tensors.z

    def call(phase: int, with_loss: bool) -> LocalPassCall:
        return make_call(a, r.config, r.tile, r.scale, phase, with_loss,
                         None if z is None else map_channels(z, layout))

    if custom:
        run(backend, tensors._replace(z=None, da=None, coef=None), call(PHASE_STATS, False))
        loss, coef = custom_loss(cast(LossFunction, r.config.loss), tensors.g, r.y, r.config,
                                 r.shape_z, r.tile.rows(a.shape[0]))
        tensors = tensors._replace(coef=coef)
        if r.want_z or r.want_da:
            run(backend, tensors, call(PHASE_APPLY, False))
    else:
        run(backend, tensors, call(PHASE_FUSED, r.y is not None))
    if r.out is not None and z is not None and z is not r.out:
        z = r.out.copy_(z)
    return LocalPassOutput(z, tensors.g, loss, tensors.coef, tensors.da, r.scale)


def _allocate(r: _Request, a: torch.Tensor, layout: torch.memory_format) -> LocalPassTensors:
    """Every result of a kernel call; z lies over a where `out=a` asks for it."""
    n, loss = a.shape[0], r.config.loss
    offsets = r.config.offsets(a.shape[1])
    k = len(offsets) - 1

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.float32, device=a.device)

    def laid_out(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.contiguous(memory_format=layout)

    built_in = r.y is not None and isinstance(loss, Loss)
    paired = isinstance(loss, Loss) and loss.paired
    return LocalPassTensors(
        a=a,
        y=r.y.contiguous() if built_in else None,
        g0=None if r.g0 is None else r.g0.float().contiguous(),
        h_prev=laid_out(r.h_prev),
        shortcut=laid_out(r.shortcut),
        offsets=offsets_tensor(offsets, a.device),
        z=destination(r.out, r.out is r.a, r.shape_z, a, layout, True) if r.want_z else None,
        g=empty(n, k),
        loss=empty(n // 2 if paired else n) if built_in else None,
        coef=empty(n, k) if r.y is not None else None,
        da=_da_of(r, a, layout) if r.want_da and r.y is not None else None,
        stats=empty(n, k, 2),
        clock=r.clock)


def _da_of(r: _Request, a: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    return torch.empty_like(a, memory_format=layout) if r.da_out is None else r.da_out


def custom_loss(fn: LossFunction, g: torch.Tensor, y: Any, config: LocalPassConfig,
                shape_z: tuple[int, ...], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A researcher's loss between the two halves: (loss (N,), coef (N, K))."""
    with torch.enable_grad():
        leaf = g.detach().requires_grad_()
        loss = reference.own_loss(fn, leaf, y)
        dg = reference.slope(loss.sum() / max(batch, 1), leaf)
    return loss.detach(), dg / group_sizes(config, shape_z, g)


def group_sizes(config: LocalPassConfig, shape_z: tuple[int, ...], g: torch.Tensor) -> Any:
    """What dL/dg is divided by to give coef: (K,) elements a group, or 1 for sums of squares."""
    if config.goodness == "sum_sq":
        return 1
    return widths(config.offsets(shape_z[1]), g.dtype, g.device) * numel(shape_z[2:])


def _check(a: torch.Tensor, y: Any, config: LocalPassConfig, g0: torch.Tensor | None,
           h_prev: torch.Tensor | None, shortcut: torch.Tensor | None,
           clock: torch.Tensor | None, out: torch.Tensor | None, want_z: bool,
           tile: Tile) -> tuple[int, ...]:
    """Validate without a host sync; return z's shape."""
    if not isinstance(a, torch.Tensor) or not a.is_floating_point():
        came = a.dtype if isinstance(a, torch.Tensor) else type(a).__name__
        raise TypeError(f"[local_pass] a must be a floating-point tensor, got {came}")
    if a.dim() < 2:
        raise ValueError(f"[local_pass] a must be (N, C, *spatial), got shape {tuple(a.shape)}")
    offsets = config.offsets(a.shape[1])
    n, k = a.shape[0], len(offsets) - 1
    if config.pool == "max2" and (a.dim() != 4 or a.shape[2] < 2 or a.shape[3] < 2):
        raise ValueError(
            f"[local_pass] max2 pooling needs (N, C, H >= 2, W >= 2), got {tuple(a.shape)}"
        )
    shape_z = pooled_shape(tuple(a.shape), config)
    if y is not None and isinstance(config.loss, Loss):
        check_targets(y, n, k, config.loss, a.device, tile)
    if g0 is not None and (tuple(g0.shape) != (n, k) or g0.device != a.device):
        raise ValueError(f"[local_pass] g0 must be ({n}, {k}) on {a.device}, got "
                         f"{tuple(g0.shape)} on {g0.device}")
    if (config.blend != 1.0) != (h_prev is not None):
        raise ValueError("[local_pass] h_prev and a blend other than 1 go together, got blend="
                         f"{config.blend} and h_prev {'given' if h_prev is not None else 'absent'}")
    if shortcut is not None and (not want_z or shortcut is out):
        raise ValueError("[local_pass] shortcut expected want_z=True and another tensor than out, "
                         f"got want_z={want_z}{' and out=shortcut' * (shortcut is out)}")
    if clock is not None and (clock.dtype is not torch.int32 or clock.numel() != 1
                              or clock.device != a.device):
        raise ValueError(f"[local_pass] clock must be one int32 on {a.device}, got "
                         f"{tuple(clock.shape)} {clock.dtype} on {clock.device}")
    for name, t in (("h_prev", h_prev), ("shortcut", shortcut), ("out", out)):
        if t is not None and (tuple(t.shape) != shape_z or t.dtype != a.dtype
                              or t.device != a.device):
            raise ValueError(f"[local_pass] {name} must be {shape_z} {a.dtype} on {a.device}, "
                             f"got {tuple(t.shape)} {t.dtype} on {t.device}")
    return shape_z


def _check_da_out(a: torch.Tensor, da_out: torch.Tensor, y: Any, config: LocalPassConfig,
                  want_z: bool, want_da: bool) -> None:
    if not want_da or y is None:
        raise ValueError("[local_pass] da_out expected want_da=True and targets, got "
                         f"want_da={want_da} and targets {'absent' if y is None else 'given'}")
    if (da_out.shape != a.shape or da_out.dtype != a.dtype or da_out.device != a.device
            or da_out.stride() != a.stride() or memory_layout(a) is None):
        raise ValueError(f"[local_pass] da_out must be {tuple(a.shape)} {a.dtype} on {a.device} in "
                         f"a's dense layout, got {tuple(da_out.shape)} {da_out.dtype} on "
                         f"{da_out.device} with strides {da_out.stride()}")
    same = da_out is a or (not is_fake(a) and da_out.data_ptr() == a.data_ptr())
    if same and (want_z or config.pool != "none"):
        raise ValueError("[local_pass] da_out=a expected want_z=False and no pool, got "
                         f"want_z={want_z}, pool={config.pool!r}")


def check_targets(y: Any, n: int, k: int, loss: Loss, device: torch.device, tile: Tile) -> None:
    """Shape, dtype and, on the CPU where it costs no sync, range of the targets."""
    if not isinstance(y, torch.Tensor) or y.dtype is not torch.int64:
        came = y.dtype if isinstance(y, torch.Tensor) else type(y).__name__
        raise TypeError(f"[local_pass] labels must be an int64 tensor, got {came}")
    if tuple(y.shape) != (n,) or y.device != device:
        raise ValueError(f"[local_pass] labels must be ({n},) on {device}, "
                         f"got {tuple(y.shape)} on {y.device}")
    if loss.binary and loss.name != "margin" and k != 1:
        raise ValueError(f"[local_pass] {loss.name} is a loss of one goodness, got {k} groups")
    if loss.name in ("pvn", "cwg") and k < 2:
        raise ValueError(f"[local_pass] {loss.name} compares groups: expected 2 or more, got {k}")
    if loss.name == "margin" and not 0 <= int(loss.p[0]) < k:
        raise ValueError(f"[local_pass] margin's group must lie in [0, {k}), got {int(loss.p[0])}")
    if loss.paired and n % 2:
        raise ValueError(f"[local_pass] symba needs pairs: an even number of rows, got {n}")
    if tile.batch is not None and tile.start + (n // 2 if tile.paired else n) > (
            tile.batch // 2 if tile.paired else tile.batch):
        raise ValueError(f"[local_pass] a tile of {n} rows from row {tile.start} must fit the "
                         f"batch, got a batch of {tile.batch}")
    if device.type == "cpu" and n and not (is_fake(y) or traced()):
        low, high = (int(v) for v in torch.aminmax(y))
        top = 2 if loss.binary else k
        if low < 0 or high >= top:
            bad = low if low < 0 else high
            raise ValueError(f"[local_pass] labels must lie in [0, {top}), got {bad}")


class _LocalOnly(torch.autograd.Function):
    """Marks results as results of `a`, and explains itself when someone calls backward."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, *results: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(r.view_as(r) for r in results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(
            "[local_pass] its gradient is local by design: no gradient crosses a layer; "
            "use want_da=True for dL/da, or detach the input"
        )


def forbid_backward(a: torch.Tensor, r: Any) -> Any:
    """An op's results z, g and loss, explaining themselves to whoever calls backward on them."""
    kept = {name: t for name in ("z", "g", "loss") if (t := getattr(r, name, None)) is not None}
    marked = _LocalOnly.apply(a, *kept.values())  # type: ignore[no-untyped-call]
    return r._replace(**dict(zip(kept, marked, strict=True)))
