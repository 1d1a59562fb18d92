"""Where a gradient goes through relu and a 2x2 max pool: one byte a unit of z.

All that a layer's own update needs of its pre-activation once the next layer's loss is there
(overlapping updates, Trifecta sec. 4):

    1 where relu passes a gradient; of a pooled window its arg-max, the first in row-major order on
    ties, or BLOCKED where all of it lies below zero

A CPU runs csrc/cpu/routes_kernel.cpp on maps in channels_last, everything else plain PyTorch:
Triton and CUDA have no kernel.
"""

from __future__ import annotations

import math

import torch

from ffengine.ops import backends
from ffengine.ops.launch import launch
from ffengine.ops.params import RoutesCall

#: Where a pool's window takes no gradient.
BLOCKED = 4
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


def routes(a: torch.Tensor, out: torch.Tensor, *, pool: bool, straight: bool,
           backend: str = "auto") -> None:
    """Write the routes of some rows into `out`.

    Args:
        a: (N, C) or (N, C, H, W), the pre-activations; fp32, bf16, fp16, or fp64.
        out: uint8 like z; a last odd row or column of `a` is in no window.
        pool: 2x2 max pool after relu.
        straight: relu passes every gradient (straight-through).
        backend: auto, reference, or cpu where both maps are contiguous, (N, C, H, W) in
            channels_last.

    Raises:
        ValueError: `out` is not uint8, or not like z; a back-end without a kernel for these maps.
    """
    expected = (a.shape[0], *_pooled(tuple(a.shape[1:]), pool))
    if out.dtype is not torch.uint8 or tuple(out.shape) != expected:
        raise ValueError(f"[routes] out expected torch.uint8 of shape {expected}, got {out.dtype} "
                         f"of shape {tuple(out.shape)}")
    if _kernel_takes(backend, a, out):
        launch("routes", "cpu", (a, out), _shape(a), RoutesCall(pool, straight))
    else:
        out.copy_(_plain(a, pool, straight))


def along_routes(found: torch.Tensor, dz: torch.Tensor, shape: tuple[int, ...], *, pool: bool,
                 backend: str = "auto") -> torch.Tensor:
    """dL/da (N, *shape), in dz's dtype, of dL/dz through relu and pool.

    Args:
        found: what `routes` wrote, (N, *shape of z).
        dz: like z.
        shape: of a, per sample.
        backend: as of `routes`.

    Raises:
        ValueError: the shapes do not go together; a back-end without a kernel for these maps.
    """
    expected = _pooled(shape, pool)
    if tuple(found.shape[1:]) != expected or found.shape != dz.shape:
        raise ValueError(f"[routes] expected routes and dz of shape (N, {expected}), got "
                         f"{tuple(found.shape)} and {tuple(dz.shape)}")
    if not _kernel_takes(backend, found, dz):
        return _plain_along(found, dz, shape, pool)
    da = torch.empty((dz.shape[0], *shape), dtype=dz.dtype, device=dz.device,
                     memory_format=_layout(dz))
    launch("along_routes", "cpu", (dz, found, da), _shape(da), RoutesCall(pool))
    return da


def extra_bytes(shape: tuple[int, ...], dtype: torch.dtype, *, pool: bool, straight: bool = False,
                along: bool = False, backend: str = "cpu") -> int:
    """Most bytes that `routes`, or `along_routes`, holds beside its arguments and result; for maps
    a of `shape` in channels_last.

    The CPU's kernels hold nothing; plain PyTorch some maps of the pooled size.
    """
    if backend == "cpu":
        return 0
    units, item = math.prod((shape[0], *_pooled(shape[1:], pool))), dtype.itemsize
    if along:  # where this corner won and, pooled, what it gets; a zero
        return units * (1 + item * pool) + item
    if not pool:
        return units * (1 if straight else 2)
    # the best so far, its successor, a corner; where it won; the routes themselves
    return units * (2 * item + 2)


def _kernel_takes(backend: str, *maps: torch.Tensor) -> bool:
    """The CPU's kernels are asked for, or taken by themselves where they take these maps."""
    dtypes = {t.dtype for t in maps} - {torch.uint8}
    chosen = backends.resolve("routes", backend, maps[0].device.type, *dtypes)
    if chosen == "cpu" and all(t.is_contiguous(memory_format=_layout(t)) for t in maps):
        return True
    if backend not in ("auto", "reference"):
        raise ValueError(f"[routes] backend {backend!r} has no kernel for maps of strides "
                         f"{', '.join(str(t.stride()) for t in maps)}: expected auto, reference "
                         "or, on maps in channels_last, cpu")
    return False


def _pooled(shape: tuple[int, ...], pool: bool) -> tuple[int, ...]:
    """Per-sample shape of z, of a's."""
    return (shape[0], *(s // 2 if pool else s for s in shape[1:]))


def _layout(t: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if t.dim() == 4 else torch.contiguous_format


def _shape(a: torch.Tensor) -> tuple[int, int, int, int]:
    """(N, C, H, W); any other map as one pixel."""
    n, c = a.shape[:2]
    return (n, c, *a.shape[2:]) if a.dim() == 4 else (n, c * math.prod(a.shape[2:]), 1, 1)


def _plain(a: torch.Tensor, pool: bool, straight: bool) -> torch.Tensor:
    if not pool:
        return torch.ones_like(a, dtype=torch.uint8) if straight else (a > 0).to(torch.uint8)
    height, width = a.shape[2] // 2 * 2, a.shape[3] // 2 * 2
    best, found = None, None
    for k, (r, c) in enumerate(CORNERS):
        corner = a[:, :, r:height:2, c:width:2]
        if best is None or found is None:
            best = corner.clamp(min=0)
            # strictly above zero, or the relu's flat zero came first
            found = torch.zeros_like(best, dtype=torch.uint8)
        else:
            above = corner > best
            found.masked_fill_(above, k)
            best = torch.maximum(best, corner)
    assert best is not None and found is not None
    return found if straight else found.masked_fill_(best <= 0, BLOCKED)


def _plain_along(found: torch.Tensor, dz: torch.Tensor, shape: tuple[int, ...],
                 pool: bool) -> torch.Tensor:
    if not pool:
        return torch.where(found > 0, dz, 0)
    height, width = shape[1] // 2 * 2, shape[2] // 2 * 2
    da = torch.empty((dz.shape[0], *shape), dtype=dz.dtype, device=dz.device,
                     memory_format=torch.channels_last)
    if (height, width) != tuple(shape[1:]):
        da.zero_()  # a last row or column that no window holds
    for k, (r, c) in enumerate(CORNERS):
        da[:, :, r:height:2, c:width:2] = torch.where(found == k, dz, 0)
    return da
