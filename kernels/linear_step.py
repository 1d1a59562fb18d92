"""`linear_step`: what surrounds a tile's local_pass on a GPU; the library multiplies.

prepare   one program a few rows: scale = 1 / (||x|| + eps), a = scale source + bias
finish    one program (columns, chunk of rows): column sums of da, then da = scale da in place

No atomics: chunks are summed in order afterwards.

reference: ffengine/reference/linear_step.py   op: ffengine/ops/linear_step.py
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from ffengine.kernels.forms import Form, on_device_of
from ffengine.kernels.launch import grid, power_of_two

if TYPE_CHECKING:
    from ffengine.ops.params import LinearCall

Tensors = tuple[torch.Tensor | None, ...]

#: Elements of a tile: 128 threads with 16 each, as local_pass (kernels/launch.py).
TILE = 2048
#: Columns a program of `finish` walks down: a 128-thread row of 16-byte loads in fp32.
COLUMNS = 512


@triton.jit(do_not_specialize=["N"])
def linear_prepare_kernel(p_x, p_from, p_a, p_bias, p_scale, N, features, out, eps,
                          rms: tl.constexpr, rows: tl.constexpr, block: tl.constexpr):
    """scale (N,) of x (N, in), and a (N, out) = scale from + bias; `rows` rows a program."""
    i_n = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    b_n = i_n < N
    square = tl.zeros([rows, block], tl.float32)
    for i0 in range(0, features, block):
        i_i = i0 + tl.arange(0, block)[None, :]
        x = tl.load(p_x + i_n * features + i_i, mask=b_n & (i_i < features), other=0.0)
        x = x.to(tl.float32)
        square += x * x
    total = tl.sum(square, axis=1)[:, None]
    if rms:
        total = total / features
    scale = 1.0 / (tl.sqrt(total) + eps)
    if p_scale is not None:
        tl.store(p_scale + i_n, scale, mask=b_n)
    for i0 in range(0, out, block):
        i_o = i0 + tl.arange(0, block)[None, :]
        m = b_n & (i_o < out)
        a = tl.load(p_from + i_n * out + i_o, mask=m, other=0.0).to(tl.float32) * scale
        if p_bias is not None:
            a += tl.load(p_bias + i_o, mask=i_o < out, other=0.0)
        tl.store(p_a + i_n * out + i_o, a, mask=m)


@triton.jit(do_not_specialize=["N"])
def linear_finish_kernel(p_da, p_scale, p_sums, N, out, chunk: tl.constexpr,
                         rows: tl.constexpr, block: tl.constexpr):
    """sums (chunks, out) of da (N, out) over runs of `chunk` rows, then da = scale da."""
    blocks = tl.cdiv(out, block)
    i_o = tl.program_id(0) % blocks * block + tl.arange(0, block)[None, :]
    i_chunk = (tl.program_id(0) // blocks).to(tl.int64)
    sums = tl.zeros([rows, block], tl.float32)
    for n0 in range(0, chunk, rows):
        i_row = i_chunk * chunk + n0 + tl.arange(0, rows)
        i_n = i_row[:, None]
        m = (i_n < N) & (i_o < out)
        da = tl.load(p_da + i_n * out + i_o, mask=m, other=0.0).to(tl.float32)
        sums += da
        if p_scale is not None:
            # by rows, not (rows, 1): triton 3.6 loads that once an element
            scale = tl.load(p_scale + i_row, mask=i_row < N, other=0.0)
            tl.store(p_da + i_n * out + i_o, da * scale[:, None], mask=m)
    if p_sums is not None:
        total = tl.sum(sums, axis=0)[None, :]
        tl.store(p_sums + i_chunk * out + i_o, total, mask=i_o < out)


def prepare(tensors: Tensors, call: LinearCall) -> None:
    """scale (n,) of x (n, in), and a (n, out) = scale source + bias; bias and scale fp32.

    tensors: x, source, a, bias, scale. source may be a or x; see LinearStepParams in
    csrc/params.h.
    """
    x, source, a, bias, scale = tensors
    n, features = x.shape
    out = a.shape[1]
    form, rows = _prepare_form(features, out, x.dtype, source.dtype, a.dtype, call.rms,
                               bias is None, scale is None)
    with on_device_of(a):
        form.launch(grid("linear_step", -(-n // rows)), (x, source, a, bias, scale),
                    (n, features, out, call.eps + 0.0))


@functools.lru_cache(maxsize=4096)
def _prepare_form(features: int, out: int, x: torch.dtype, source: torch.dtype, a: torch.dtype,
                  rms: bool, no_bias: bool, no_scale: bool) -> tuple[Form, int]:
    """The kernel, and the rows of a program."""
    block = min(power_of_two(max(features, out)), TILE)
    rows = TILE // block
    return Form(linear_prepare_kernel, rms=rms, rows=rows, block=block, warps=4), rows


def finish(tensors: Tensors, call: LinearCall) -> None:
    """sums (chunks, out) fp32 of da (n, out) over call.chunk rows each, then da *= scale (n,).

    tensors: da, scale, sums.
    """
    da, scale, sums = tensors
    n, out = da.shape
    chunk = call.chunk
    form, blocks = _finish_form(out, da.dtype, chunk, scale is None, sums is None)
    with on_device_of(da):
        form.launch(grid("linear_step", -(-n // chunk), blocks), (da, scale, sums), (n, out))


@functools.lru_cache(maxsize=4096)
def _finish_form(out: int, dtype: torch.dtype, chunk: int, no_scale: bool,
                 no_sums: bool) -> tuple[Form, int]:
    """The kernel, and its programs beside one another."""
    block = min(power_of_two(out), COLUMNS)
    return Form(linear_finish_kernel, chunk=chunk, rows=min(TILE // block, chunk), block=block,
                warps=4), -(-out // block)
