"""`local_pass`: one sweep over a layer's pre-activation.

a -> activation, dropout, pool -> group goodness g (N, K) -> per-sample local loss and its
gradient on g -> normalised features z, and on request da = dL/da.

reference: ffengine/reference/local_pass.py   cpu: csrc/cpu/local_pass.cpp
triton: kernels/local_pass.py                 cuda: csrc/cuda/local_pass.cu
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from ffengine.ops import backends
from ffengine.ops.config import (
    GOODNESS_CODES,
    LOSS_CODES,
    NORM_CODES,
    PHASE_APPLY,
    PHASE_FUSED,
    PHASE_STATS,
    LocalPassConfig,
    Loss,
    LossFunction,
    Tile,
    da_scale,
)
from ffengine.reference import local_pass as reference

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


class LocalPassTensors(NamedTuple):
    """Destination-passing arguments of a back-end; None where a call has no such tensor."""

    a: torch.Tensor
    y: torch.Tensor | None
    g0: torch.Tensor | None
    h_prev: torch.Tensor | None
    offsets: torch.Tensor  # (K + 1,) int64, same device as a
    z: torch.Tensor | None
    g: torch.Tensor  # (N, K) fp32
    loss: torch.Tensor | None  # (N,) or (N/2,) fp32
    coef: torch.Tensor | None  # (N, K) fp32
    da: torch.Tensor | None
    stats: torch.Tensor  # (N, K, 2) fp32


@dataclass(frozen=True, slots=True)
class LocalPassCall:
    """A call's numbers, flat, as the kernels read them (csrc/params.h: LocalPassParams)."""

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


def bytes_moved(shape: tuple[int, ...], dtype: torch.dtype, config: LocalPassConfig, *,
                want_z: bool = True, want_da: bool = True) -> int:
    """Bytes a sweep must move: a read once, z and da written once, the (N, K) results."""
    item = dtype.itemsize
    n, numel = shape[0], _numel(shape)
    pooled = _numel(_pooled_shape(shape, config))
    k = len(config.offsets(shape[1])) - 1
    blend = pooled if config.blend != 1.0 else 0
    acc = 8 if dtype is torch.float64 else 4
    return item * (numel + pooled * want_z + numel * want_da + blend) + acc * n * (2 * k + 1)


def extra_bytes(shape: tuple[int, ...], dtype: torch.dtype, config: LocalPassConfig) -> int:
    """Scratch bytes a kernel back-end holds beside inputs and outputs: the (N, K, 2) statistics."""
    if dtype is torch.float64:  # reference only: plain PyTorch keeps whole maps
        return 8 * _numel(shape) * 4
    return 4 * shape[0] * (len(config.offsets(shape[1])) - 1) * 2


def local_pass(
    a: torch.Tensor,
    y: Any = None,
    *,
    config: LocalPassConfig,
    g0: torch.Tensor | None = None,
    h_prev: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    want_z: bool = True,
    want_da: bool = False,
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
        out: `out=a` writes z over a (no pool); otherwise a tensor of z's shape and dtype.
        want_z, want_da: which of the large results to compute.
        tile: which rows of the whole batch these are; losses scale by the whole batch.

    Returns:
        LocalPassOutput: z (dtype of a), g (N, K), loss (N,) unscaled per row (N/2 for pair
        losses), coef (N, K) = dL/dg / m with L the batch objective (for sums: / 1), da in a's
        dtype times `da_scale`. g, loss and coef are fp32 (fp64 for fp64 input).

    Raises:
        TypeError, ValueError: one line with what was expected and what came.
    """
    shape_z = _check(a, y, config, g0, h_prev, out, tile)
    name = backends.resolve("local_pass", backend, a.device.type, a.dtype)
    if torch.is_grad_enabled() and a.requires_grad:
        result = _run(a.detach(), y, config, g0, h_prev, out, want_z, want_da, tile, name, shape_z)
        return _forbid_backward(a, result)
    return _run(a, y, config, g0, h_prev, out, want_z, want_da, tile, name, shape_z)


def _run(a: torch.Tensor, y: Any, config: LocalPassConfig, g0: torch.Tensor | None,
         h_prev: torch.Tensor | None, out: torch.Tensor | None, want_z: bool, want_da: bool,
         tile: Tile, backend: str, shape_z: tuple[int, ...]) -> LocalPassOutput:
    n, c = a.shape[:2]
    m = _numel(shape_z) // max(n, 1) // (len(config.offsets(c)) - 1)
    scale = da_scale(a.dtype, config.goodness, tile.rows(n), max(m, 1))
    if backend == "reference":
        r = reference.local_pass(a, y, config=config, g0=g0, h_prev=h_prev, want_z=want_z,
                                 want_da=want_da, tile=tile, da_scale=scale)
        z = r[0] if out is None or r[0] is None else out.copy_(r[0])
        return LocalPassOutput(z, *r[1:], scale)
    return _run_kernel(a, y, config, g0, h_prev, out, want_z, want_da, tile, backend, shape_z, scale)


def _run_kernel(a: torch.Tensor, y: Any, config: LocalPassConfig, g0: torch.Tensor | None,
                h_prev: torch.Tensor | None, out: torch.Tensor | None, want_z: bool, want_da: bool,
                tile: Tile, backend: str, shape_z: tuple[int, ...],
                scale: float) -> LocalPassOutput:
    n = a.shape[0]
    layout = _layout(a)
    overwrite = out is not None and out.data_ptr() == a.data_ptr()
    if layout is None:
        a, layout = a.contiguous(), torch.contiguous_format
    offsets = config.offsets(a.shape[1])
    f32 = {"dtype": torch.float32, "device": a.device}
    z = _destination(out, overwrite, shape_z, a, layout) if want_z else None
    custom = y is not None and not isinstance(config.loss, Loss)
    paired = isinstance(config.loss, Loss) and config.loss.paired
    tensors = LocalPassTensors(
        a=a,
        y=y if y is not None and not custom else None,
        g0=None if g0 is None else g0.contiguous(),
        h_prev=None if h_prev is None else h_prev.contiguous(memory_format=layout),
        offsets=_offsets_tensor(offsets, str(a.device)),
        z=z,
        g=torch.empty(n, len(offsets) - 1, **f32),
        loss=torch.empty(n // 2 if paired else n, **f32) if y is not None and not custom else None,
        coef=torch.empty(n, len(offsets) - 1, **f32) if y is not None else None,
        da=torch.empty_like(a, memory_format=layout) if want_da and y is not None else None,
        stats=torch.empty(n, len(offsets) - 1, 2, **f32),
    )
    loss = tensors.loss
    if custom:
        run(backend, tensors._replace(z=None, da=None, coef=None),
            make_call(a, config, tile, scale, PHASE_STATS, False))
        loss, coef = custom_loss(
            cast(LossFunction, config.loss), tensors.g, y, config, shape_z, tile.rows(n))
        tensors = tensors._replace(coef=coef)
        if want_z or want_da:
            run(backend, tensors, make_call(a, config, tile, scale, PHASE_APPLY, False))
    else:
        run(backend, tensors, make_call(a, config, tile, scale, PHASE_FUSED, y is not None))
    if out is not None and z is not None and z is not out:
        out.copy_(z)
        z = out
    return LocalPassOutput(z, tensors.g, loss, tensors.coef, tensors.da, scale)


def make_call(a: torch.Tensor, config: LocalPassConfig, tile: Tile, scale: float, phase: int,
              with_loss: bool) -> LocalPassCall:
    """Flatten config and tile into what a kernel reads. Pure: unit-tested without a GPU."""
    n = a.shape[0]
    p = (0.0, 0.0, 0.0)
    code, weight = LOSS_CODES["none"], 0.0
    if with_loss:
        loss = cast(Loss, config.loss)
        p, code, weight = loss.kernel_p(), loss.code, loss.scale(tile.rows(n))
    start, half, half_start = tile.layout(n)
    drop = config.dropout
    return LocalPassCall(
        groups=len(config.offsets(a.shape[1])) - 1,
        equal_groups=isinstance(config.groups, int),
        channels_last=_layout(a) is torch.channels_last,
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


def custom_loss(fn: LossFunction, g: torch.Tensor, y: Any, config: LocalPassConfig,
                shape_z: tuple[int, ...], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A researcher's loss between the two halves: (loss (N,), coef (N, K))."""
    with torch.enable_grad():
        leaf = g.detach().requires_grad_()
        loss = fn(leaf, y)
        if not isinstance(loss, torch.Tensor) or loss.shape != g.shape[:1]:
            came = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(
                f"[local_pass] a loss function must return one loss a row, shape ({g.shape[0]},), "
                f"got {came}"
            )
        (dg,) = torch.autograd.grad(loss.sum() / max(batch, 1), leaf)
    return loss.detach(), dg / group_sizes(config, shape_z, g)


def group_sizes(config: LocalPassConfig, shape_z: tuple[int, ...], g: torch.Tensor) -> Any:
    """What dL/dg is divided by to give coef: (K,) elements a group, or 1 for sums of squares."""
    if config.goodness == "sum_sq":
        return 1
    off = torch.tensor(config.offsets(shape_z[1]), dtype=g.dtype, device=g.device)
    return off.diff() * (_numel(shape_z[2:]))


def run(backend: str, tensors: LocalPassTensors, call: LocalPassCall) -> None:
    """Hand a call to a kernel back-end; the one place that knows where they live."""
    if tensors.a.shape[0] == 0:
        return
    if backend == "triton":
        from ffengine.kernels import local_pass as kernels

        kernels.local_pass(tensors, call)
        return
    ext = backends.extension()
    assert ext is not None  # resolve() checked
    if backend == "cpu":
        ext.local_pass_cpu(*_pointers(tensors), _nchw(tensors.a), _dtype_code(tensors.a), call)
    else:
        stream = torch.cuda.current_stream(tensors.a.device).cuda_stream
        ext.local_pass_cuda(
            *_pointers(tensors), _nchw(tensors.a), _dtype_code(tensors.a), call, stream)


def _pointers(tensors: LocalPassTensors) -> tuple[int, ...]:
    return tuple(0 if t is None else t.data_ptr() for t in tensors)


def _dtype_code(t: torch.Tensor) -> int:
    return {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[t.dtype]


def _nchw(a: torch.Tensor) -> tuple[int, int, int, int]:
    n, c, *spatial = a.shape
    if len(spatial) == 2:
        return n, c, spatial[0], spatial[1]
    return n, c, 1, _numel(tuple(spatial))


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for s in shape:
        total *= s
    return total


def _pooled_shape(shape: tuple[int, ...], config: LocalPassConfig) -> tuple[int, ...]:
    if config.pool == "none":
        return tuple(shape)
    return (*shape[:2], shape[2] // 2, shape[3] // 2)


_offset_cache: dict[tuple[tuple[int, ...], str], torch.Tensor] = {}


def _offsets_tensor(offsets: tuple[int, ...], device: str) -> torch.Tensor:
    key = (offsets, device)
    if key not in _offset_cache:
        _offset_cache[key] = torch.tensor(offsets, dtype=torch.int64, device=device)
    return _offset_cache[key]


def _layout(a: torch.Tensor) -> torch.memory_format | None:
    if a.is_contiguous():
        return torch.contiguous_format
    if a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None


def _destination(out: torch.Tensor | None, overwrite: bool, shape_z: tuple[int, ...],
                 a: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    if overwrite:
        return a
    if out is not None and out.is_contiguous(memory_format=layout):
        return out
    return torch.empty(shape_z, dtype=a.dtype, device=a.device, memory_format=layout)


def _check(a: torch.Tensor, y: Any, config: LocalPassConfig, g0: torch.Tensor | None,
           h_prev: torch.Tensor | None, out: torch.Tensor | None, tile: Tile) -> tuple[int, ...]:
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
    shape_z = _pooled_shape(tuple(a.shape), config)
    if y is not None and isinstance(config.loss, Loss):
        check_targets(y, n, k, config.loss, a.device, tile)
    if g0 is not None and (tuple(g0.shape) != (n, k) or g0.device != a.device):
        raise ValueError(f"[local_pass] g0 must be ({n}, {k}) on {a.device}, got "
                         f"{tuple(g0.shape)} on {g0.device}")
    if (config.blend != 1.0) != (h_prev is not None):
        raise ValueError("[local_pass] h_prev and a blend other than 1 go together, got blend="
                         f"{config.blend} and h_prev {'given' if h_prev is not None else 'absent'}")
    for name, t in (("h_prev", h_prev), ("out", out)):
        if t is not None and (tuple(t.shape) != shape_z or t.dtype != a.dtype):
            raise ValueError(f"[local_pass] {name} must be {shape_z} {a.dtype}, "
                             f"got {tuple(t.shape)} {t.dtype}")
    return shape_z


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
    if tile.batch is not None and n > tile.batch:
        raise ValueError(f"[local_pass] a tile of {n} rows does not fit a batch of {tile.batch}")
    if device.type == "cpu" and n:
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


def _forbid_backward(a: torch.Tensor, r: LocalPassOutput) -> LocalPassOutput:
    kept = [(i, t) for i, t in enumerate(r[:5]) if t is not None and i in (0, 1, 2)]
    marked = _LocalOnly.apply(a, *(t for _, t in kept))  # type: ignore[no-untyped-call]
    fields = list(r)
    for (i, _), t in zip(kept, marked, strict=True):
        fields[i] = t
    return LocalPassOutput(*fields)
