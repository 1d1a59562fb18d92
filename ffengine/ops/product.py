"""x W^T in fp32 by the library that multiplies faster on this processor.

torch.mm is MKL's on x86, which leaves its best kernels to Intel's processors; oneDNN's product does
not look at the vendor. One thread of a Zen 5, GFLOP/s of torch.mm | oneDNN: 512 x 7200 -> 800
111 | 249, 128 x 784 -> 2000 115 | 242, 32 x 784 -> 500 101 | 177, 10 x 784 -> 500 73 | 110.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
import torch.nn.functional as F

from ffengine.ops.tracing import traced

#: Rows, and multiplications, from which oneDNN's cost a call pays (8 x 100 -> 10: 3 | 12 us).
LEAST_ROWS, LEAST_WORK = 3, 1 << 20
#: Rows of a result that oneDNN, which takes no place to write to, makes at a time for another.
PIECE_ROWS = 256


@functools.cache
def vendor() -> str:
    """The processor's maker, as Linux tells it; empty elsewhere."""
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if "vendor_id" in line)
    except (OSError, StopIteration):
        return ""


@functools.cache
def mkl_lags() -> bool:
    """torch.mm is MKL's, on a processor that is not Intel's, and there is oneDNN instead."""
    there = (torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
             and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
             and hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    return there and vendor() not in ("", "GenuineIntel")


def choose(rows: int, weight_shape: tuple[int, ...], dtype: torch.dtype,
           device: str) -> Literal["torch", "onednn"]:
    """Who multiplies (rows, in) by the transpose of a weight (out, in)."""
    large = rows >= LEAST_ROWS and rows * math.prod(weight_shape) >= LEAST_WORK
    fits = dtype is torch.float32 and device == "cpu"
    return "onednn" if large and fits and mkl_lags() else "torch"


def linear(x: torch.Tensor, weight: torch.Tensor,
           bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias (n, out) of x (n, in) and weight (out, in), like F.linear."""
    if traced() or _recorded(x, weight, bias) or x.dim() != 2 or choose(
            len(x), tuple(weight.shape), x.dtype, x.device.type) == "torch":
        return F.linear(x, weight, bias)
    made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made


def linear_into(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor,
                bias: torch.Tensor | None = None) -> None:
    """out (n, out) = x weight^T + bias, of one dtype."""
    if choose(len(x), tuple(weight.shape), x.dtype, x.device.type) == "onednn":
        for to, rows in zip(torch.split(out, PIECE_ROWS), torch.split(x, PIECE_ROWS), strict=True):
            to.copy_(linear(rows, weight, bias))
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def extra_bytes(rows: int, weight_shape: tuple[int, ...], dtype: torch.dtype,
                device: str) -> int:
    """What `linear_into` holds beside its arguments in fp32; 16-bit products pack inside the
    library."""
    made = choose(rows, weight_shape, dtype, device) == "onednn"
    return made * min(rows, PIECE_ROWS) * weight_shape[0] * dtype.itemsize


def _recorded(*tensors: torch.Tensor | None) -> bool:
    """autograd follows, for which the direct call has no formula."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
