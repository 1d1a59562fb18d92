"""The sweeps of `local_pass` where a group of a sample is one run of memory: NCHW, linear.

A program owns a split of one (sample, group)'s run; a tile is (1, block_inner) of it, with a pool
of its windows.
"""

import triton
import triton.language as tl
from ffengine.kernels import philox
from ffengine.kernels.launch import BATCH_ARGS
from ffengine.kernels.tile import (
    activation,
    aligned,
    batch_row,
    blended,
    dropout_key,
    group_of,
    merged,
    store_results,
    window,
)


@triton.jit
def owner(K, splits):
    """(sample, group, split) of this program."""
    i_run = tl.program_id(0) // splits
    return (i_run // K).to(tl.int64), i_run % K, tl.program_id(0) % splits


@triton.jit
def positions(i0, end, H, W, rows, cols, v: tl.constexpr):
    """A tile of a run: offset in a of each position, in z, the window's y and x, the mask."""
    i = i0 + tl.arange(0, v.block_inner)[None, :]
    m = i < end
    if v.pool:
        channel = i // (rows * cols)
        y = i % (rows * cols) // cols * 2
        x = i % cols * 2
        o_a = channel * (H * W) + y * W + x
        o_z = channel * ((H // 2) * (W // 2)) + (y // 2) * (W // 2) + x // 2
    else:
        y = i
        x = i
        o_a = i
        o_z = i
    return o_a, o_z, y, x, m


@triton.jit
def run_h(p_a, o_a, y, x, m, index, i0, H, W, drop, keep_scale, v: tl.constexpr):
    """h of a tile: (h, dh/da, winner of each window, whole windows)."""
    if v.pool:
        whole = m & (y + 1 < H) & (x + 1 < W)
        h, slope, winner = window(p_a, o_a, whole, index + o_a, W, 1, drop, keep_scale, v)
    else:
        whole = m
        winner = 0
        keep = m
        if v.quads:
            quad = (index + i0 >> 2) + tl.arange(0, v.block_inner // 4)[None, :]
            keep = philox.keeps_quads(quad, drop, True)
        elif v.dropout:
            keep = philox.keeps(index + o_a, drop)
        h, slope = activation(p_a, o_a, m, keep, keep_scale, v)
    return h, slope, winner, whole


@triton.jit
def places(i_n, first, C, H, W, z_channels, start, half, half_start, v: tl.constexpr):
    """int64 offsets of (sample, group): in a, in z, in a dense map like z, and its logical index
    in the batch."""
    pixels_z = (H // 2) * (W // 2) if v.pool else H * W
    base_a = aligned(i_n * C * (H * W) + first * (H * W), v)
    base_dense = aligned(i_n * C * pixels_z + first * pixels_z, v)
    base_z = i_n * z_channels * pixels_z + first * pixels_z
    index = batch_row(i_n, start, half, half_start) * C * (H * W) + first * (H * W)
    if v.quads:
        index = index // 4 * 4
    return base_a, base_z, base_dense, index


@triton.jit(do_not_specialize=BATCH_ARGS)
def stats_kernel(p_a, p_h_prev, p_offsets, p_moments, p_sums, p_clock, C, H, W, K, width, span,
                 splits, blend, keep_scale, seed_lo, seed_hi, layer, step, threshold, start, half,
                 half_start, v: tl.constexpr):
    """moments (N, K, splits, 2): mean and sum (h - mean)^2 of every split; where the goodness is of
    squares, sums (N, K, splits): sum h^2."""
    i_n, i_k, i_s = owner(K, splits)
    drop = dropout_key(p_clock, seed_lo, seed_hi, layer, step, threshold)
    first, channels = group_of(p_offsets, i_k, width)
    rows = H // 2 if v.pool else H
    cols = W // 2 if v.pool else W
    base_a, _base_z, base_dense, index = places(i_n, first, C, H, W, C, start, half, half_start, v)
    if p_h_prev is not None:
        p_h_prev += base_dense
    begin = i_s * span
    end = tl.minimum(begin + span, aligned(channels * rows * cols, v))
    zero = tl.full([1, 1], 0.0, tl.float32)
    mean, m2, squares = zero, zero, zero
    for i0 in range(begin, end, v.block_inner):
        o_a, o_z, y, x, m = positions(i0, end, H, W, rows, cols, v)
        h, _slope, _winner, _whole = run_h(p_a + base_a, o_a, y, x, m, index, i0, H, W, drop,
                                           keep_scale, v)
        h = blended(h, p_h_prev, o_z, m, blend)
        n = tl.minimum(end - i0, v.block_inner).to(tl.float32)
        mean, m2 = merged((i0 - begin).to(tl.float32), mean, m2, h, m, n, 1)
        if p_sums is not None:
            squares += tl.sum(tl.where(m, h * h, 0.0), 1, keep_dims=True)
    at = (i_n * K + i_k) * splits + i_s + tl.full([1, 1], 0, tl.int64)
    tl.store(p_moments + 2 * at, mean)
    tl.store(p_moments + 2 * at + 1, m2)
    if p_sums is not None:
        tl.store(p_sums + at, squares)


@triton.jit(do_not_specialize=BATCH_ARGS)
def apply_kernel(p_a, p_h_prev, p_shortcut, p_offsets, p_coef, p_stats, p_z, p_da, p_clock, N, C, H,
                 W, K, width, span, splits, z_channels, da_scale, blend, keep_scale, seed_lo,
                 seed_hi, layer, step, threshold, start, half, half_start, v: tl.constexpr):
    """z and da of every split, both optional.

    Rows from last to first: what the first sweep read last is still in L2.
    """
    i_n, i_k, i_s = owner(K, splits)
    i_n = N - 1 - i_n
    drop = dropout_key(p_clock, seed_lo, seed_hi, layer, step, threshold)
    first, channels = group_of(p_offsets, i_k, width)
    # ceiling windows: a trailing row or column that no window holds still gets its da = 0
    rows = (H + 1) // 2 if v.pool else H
    cols = (W + 1) // 2 if v.pool else W
    base_a, base_z, base_dense, index = places(i_n, first, C, H, W, z_channels, start, half,
                                               half_start, v)
    p_a += base_a
    if p_h_prev is not None:
        p_h_prev += base_dense
    if p_shortcut is not None:
        p_shortcut += base_dense
    if p_z is not None:
        bytes_z: tl.constexpr = v.bytes_z
        p_z = tl.multiple_of(p_z + base_z, bytes_z)
    at = i_n * K + i_k
    mean = tl.load(p_stats + 2 * at)
    rstd = tl.load(p_stats + 2 * at + 1)
    coef = 0.0
    if p_da is not None:
        p_da += base_a
        coef = tl.load(p_coef + at) * (da_scale * blend)
    begin = i_s * span
    end = tl.minimum(begin + span, aligned(channels * rows * cols, v))
    for i0 in range(begin, end, v.block_inner):
        o_a, o_z, y, x, m = positions(i0, end, H, W, rows, cols, v)
        h, slope, winner, whole = run_h(p_a, o_a, y, x, m, index, i0, H, W, drop, keep_scale, v)
        h = blended(h, p_h_prev, o_z, whole, blend)
        store_results(p_z, p_da, p_shortcut, o_a, o_z, o_z, h, slope, winner, m, whole, x + 1 < W,
                      y + 1 < H, W, 1, mean, rstd, coef, v)
