"""One tile of `linear_step` on a kernel back-end: its size, its bytes, its two passes.

    a = scale (x W^T) + bias     scale = 1 / (||x|| + eps) row by row: the normalised input, folded
    dW += (scale da)^T x         bias gradient += the column sums of da

The library multiplies; the kernels compute the scale and apply it, in place but for 16-bit inputs
(csrc/params.h: LinearStepParams).
"""

from __future__ import annotations

import torch

from ffengine.ops import product
from ffengine.ops.config import Norm
from ffengine.ops.launch import launch
from ffengine.ops.params import LinearCall

#: Bytes of a tile, at most: a full batch then works in well under 32 MB. On two idle CPU cores the
#: size counts little (50,000 x 784 -> 500 fp32, s of both products: tiles of 256 rows 0.297, 1024
#: 0.270, 4096 0.262), on shared ones every parallel region of a tile may wait for its thread: few,
#: large tiles. A GPU's launches cost more than its cache misses; not timed on one yet.
TILE_BYTES = {"cpu": 8 << 20, "cuda": 20 << 20}
#: Rows whose bias gradient one program of a GPU kernel sums.
CHUNK = 64


def folds(dtype: torch.dtype, norm: Norm) -> bool:
    """The norm becomes a row scale. In 16 bits a tile's input is normalised instead: x W^T rounded
    before its scale strayed past the tolerance rule in 5 % of random layers, and fp16 has not the
    range for inputs of any length."""
    return norm.kind != "none" and dtype is torch.float32


def copies(dtype: torch.dtype, norm: Norm) -> bool:
    """A tile's normalised input exists in memory."""
    return norm.kind != "none" and not folds(dtype, norm)


def row_bytes(features: int, out: int, dtype: torch.dtype, norm: Norm, device: str) -> int:
    """Bytes that a row of a tile holds, results of (N, K) aside."""
    held = dtype.itemsize * (out + features * copies(dtype, norm)) + 4 * folds(dtype, norm)
    return held if device == "cpu" else held + 4 * -(-out // CHUNK)


def library_bytes(features: int, out: int) -> int:
    """Most the CPU library packs in a 16-bit product: 0.9 MB (bf16) and 1.2 MB (fp16) a thread at
    784 -> 500, 1.3 and 2.4 MB at 2000 -> 2000, 0.2 MB at 100 -> 50, as its allocations show."""
    return torch.get_num_threads() * min(2_400_000, 200_000 + 4 * features * out)


def choose_rows(n: int, features: int, out: int, dtype: torch.dtype, norm: Norm,
                device: str) -> int:
    """Rows of a tile of a batch of n. Pure: unit-tested without a GPU."""
    held = row_bytes(features, out, dtype, norm, device)
    if device != "cpu" and dtype is torch.float16:  # its gradient is formed from fp32 forms there
        held += 4 * (features + out)
    fit = TILE_BYTES["cpu" if device == "cpu" else "cuda"] // max(1, held)
    return max(1, min(n, max(fit // CHUNK * CHUNK, CHUNK)))


def inputs(backend: str, x: torch.Tensor, norm: Norm, room: torch.Tensor | None) -> torch.Tensor:
    """x as the products take it: dense, and normalised in `room` where the norm is no row scale."""
    x = x.contiguous()
    if room is None:
        return x
    _prepare(backend, x, x, room, None, None, norm)
    return room


def forward(backend: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
            norm: Norm, a: torch.Tensor, scale: torch.Tensor | None) -> None:
    """a (n, O) = x weight^T + bias, x times its row scale where one (n,) is to be written."""
    added = None if bias is None or scale is not None else bias.to(x.dtype)
    product.linear_into(a, x, weight, added)
    if scale is not None:
        _prepare(backend, x, a, a, bias, scale, norm)


def _prepare(backend: str, x: torch.Tensor, source: torch.Tensor, a: torch.Tensor,
             bias: torch.Tensor | None, scale: torch.Tensor | None, norm: Norm) -> None:
    """scale = 1 / (||x|| + eps), a = scale source + bias."""
    launch("linear_prepare", backend, (x, source, a, bias, scale), (*x.shape, a.shape[1]),
           LinearCall(rms=norm.length == "rms", eps=norm.eps))


def finish(backend: str, da: torch.Tensor, scale: torch.Tensor | None,
           sums: torch.Tensor | None, inv_scale: float) -> None:
    """sums (O,) += inv_scale * the column sums of da (n, O), then da *= scale, row by row."""
    if scale is None and sums is None:
        return
    call, partial = LinearCall(inv_scale=inv_scale, chunk=CHUNK), sums
    if backend != "cpu" and sums is not None:
        partial = sums.new_empty(-(-da.shape[0] // CHUNK), da.shape[1])
    launch("linear_finish", backend, (da, scale, partial), tuple(da.shape), call)
    if sums is not None and partial is not None and partial is not sums:
        sums.add_(partial.sum(0), alpha=inv_scale)
