"""The sweeps of `local_pass` in NHWC: a program owns whole pixels and reduces channels to groups.

A sample is rows of `row_pixels` pixels each, as many as make a row's bytes whole 16-byte vectors
and its elements nearly fill the block_inner columns of a tile (kernels/launch.py); a tile is
block_outer rows. Column e of a row is channel e % C of the row's pixel e // C, so a thread keeps
its columns' moments in registers and groups are formed once, at the end. Where a pixel is wider
than a tile (`chunks` of its channels), pools or draws its dropout by quads, a row is one pixel.
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
def owner(splits, chunks):
    """(sample, split, chunk of channels) of this program."""
    i_part = tl.program_id(0) % (splits * chunks)
    i_n = tl.program_id(0) // (splits * chunks)
    return i_n.to(tl.int64), i_part // chunks, i_part % chunks


@triton.jit
def columns(i_chunk, C, v: tl.constexpr):
    """A program's columns (1, block_inner): element of the row, its pixel there, its channel."""
    e = i_chunk * v.block_inner + tl.arange(0, v.block_inner)[None, :]
    if v.many:
        pixel = C // v.align_c * v.align_c
        j = e // pixel
        c = e % pixel
    else:
        j = e * 0
        c = e
    return e, j, c


@triton.jit
def columns_z(j, c, z_channels, v: tl.constexpr):
    """Offsets of columns in a row of z, in the row's pixels one after the other."""
    return j * (z_channels // v.align_z * v.align_z) + c


@triton.jit
def positions(r0, e, row, total, windows, C, H, W, cols, v: tl.constexpr):
    """A tile: the rows, offset in a of each position, the windows' y and x, the mask."""
    r = r0 + tl.arange(0, v.block_outer)[:, None]
    if v.pool:
        y = r // cols * 2
        x = r % cols * 2
        o_a = (y * W + x) * aligned(C, v) + e
        m = (r < windows) & (e < row)
    else:
        y = r
        x = r
        o_a = r * row + e
        m = (e < row) & (o_a < total)
    return r, o_a, y, x, m


@triton.jit
def row_h(p_a, o_a, r0, r, j, c, y, x, m, index, C, H, W, row_pixels, drop, keep_scale,
          v: tl.constexpr):
    """h of a tile: (h, dh/da, winner of each window, whole windows)."""
    if v.pool:
        whole = m & (y + 1 < H) & (x + 1 < W)
        logical = index + c * (H * W) + (y * W + x)
        h, slope, winner = window(p_a, o_a, whole, logical, W, aligned(C, v), drop, keep_scale, v)
    else:
        whole = m
        winner = 0
        keep = m
        if v.quads:
            quad = (index + r0 >> 2) + c * ((H * W) // 4)
            quad += tl.arange(0, v.block_outer // 4)[:, None]
            keep = philox.keeps_quads(quad, drop, False)
        elif v.dropout:
            keep = philox.keeps(index + c * (H * W) + (r * row_pixels + j), drop)
        h, slope = activation(p_a, o_a, m, keep, keep_scale, v)
    return h, slope, winner, whole


@triton.jit
def rows_with(j, pixels, row_pixels, begin, end, v: tl.constexpr):
    """How many of the rows [begin, end) have a pixel j."""
    limit = tl.cdiv(pixels - j, row_pixels) if v.many else pixels
    return tl.maximum(tl.minimum(limit, end) - begin, 0).to(tl.float32)


@triton.jit
def store_groups(p_moments, p_sums, p_offsets, mean, m2, at, parts, i_chunk, pixels, row_pixels,
                 begin, end, C, K, width, v: tl.constexpr):
    """Moments of every group from those of its columns, block_g groups at a time.

    mean, m2 (1, block_inner); at: index of group 0's moments of this part.
    """
    mean = tl.reshape(mean, (v.block_inner,))
    m2 = tl.reshape(m2, (v.block_inner,))
    i_b = tl.arange(0, v.block_b)[None, :]
    for k0 in range(0, K, v.block_g):
        i_k = k0 + tl.arange(0, v.block_g)[:, None]
        first, channels = group_of(p_offsets, tl.minimum(i_k, K - 1), width)
        if v.many:
            j = i_b // channels
            column = j * C + first + i_b % channels
            exists = (i_b < channels * row_pixels) & (i_k < K)
        else:
            j = i_b * 0
            begin_c = tl.maximum(first - i_chunk * v.block_inner, 0)
            end_c = tl.minimum(first + channels - i_chunk * v.block_inner, v.block_inner)
            column = begin_c + i_b
            exists = (column < end_c) & (i_k < K)
        n = tl.where(exists, rows_with(j, pixels, row_pixels, begin, end, v), 0.0)
        place = tl.reshape(tl.where(exists, column, 0), (v.block_g * v.block_b,))
        mean_b = tl.reshape(tl.gather(mean, place, 0), (v.block_g, v.block_b))
        m2_b = tl.reshape(tl.gather(m2, place, 0), (v.block_g, v.block_b))
        total = tl.sum(n, 1, keep_dims=True)
        some = exists & (n > 0.0)
        share = n / tl.maximum(total, 1.0)
        centre = tl.sum(tl.where(some, mean_b * share, 0.0), 1, keep_dims=True)
        gap = mean_b - centre
        m2_k = tl.sum(tl.where(some, m2_b + n * gap * gap, 0.0), 1, keep_dims=True)
        m = (i_k < K) & (total > 0.0)
        at_k = at + i_k * parts
        tl.store(p_moments + 2 * at_k, centre, mask=m)
        tl.store(p_moments + 2 * at_k + 1, m2_k, mask=m)
        if p_sums is not None:
            squares = tl.where(some, m2_b + n * mean_b * mean_b, 0.0)
            tl.store(p_sums + at_k, tl.sum(squares, 1, keep_dims=True), mask=m)


@triton.jit(do_not_specialize=BATCH_ARGS)
def rows_stats_kernel(p_a, p_h_prev, p_offsets, p_moments, p_sums, p_clock, C, H, W, K, width,
                      row_pixels, span, splits, chunks, blend, keep_scale, seed_lo, seed_hi, layer,
                      step, threshold, start, half, half_start, v: tl.constexpr):
    """moments (N, K, splits * chunks, 2): mean and sum (h - mean)^2 of a group's part of `span`
    rows and a chunk of channels, sums, where the goodness is of squares: sum h^2. Parts that hold
    nothing of a group are not written."""
    i_n, i_s, i_chunk = owner(splits, chunks)
    drop = dropout_key(p_clock, seed_lo, seed_hi, layer, step, threshold)
    pixels = (H // 2) * (W // 2) if v.pool else H * W
    row = aligned(row_pixels * C, v)
    total = aligned(H * W * C, v)
    index = batch_row(i_n, start, half, half_start) * C * (H * W)
    p_a += aligned(i_n * C * (H * W), v)
    if p_h_prev is not None:
        p_h_prev += aligned(i_n * C * pixels, v)
    e, j, c = columns(i_chunk, C, v)
    begin = i_s * span
    end = tl.minimum(begin + span, tl.cdiv(pixels, row_pixels))
    zero = tl.full([1, v.block_inner], 0.0, tl.float32)
    mean, m2 = zero, zero
    for r0 in range(begin, end, v.block_outer):
        r, o_a, y, x, m = positions(r0, e, row, total, pixels, C, H, W, W // 2, v)
        h, _slope, _winner, _whole = row_h(p_a, o_a, r0, r, j, c, y, x, m, index, C, H, W,
                                           row_pixels, drop, keep_scale, v)
        h = blended(h, p_h_prev, r * row + e, m, blend)
        n = rows_with(j, pixels, row_pixels, r0, tl.minimum(r0 + v.block_outer, end), v)
        count = rows_with(j, pixels, row_pixels, begin, r0, v)
        mean, m2 = merged(count, mean, m2, h, m, n, 0)
    parts = splits * chunks
    at = i_n * K * parts + i_s * chunks + i_chunk
    store_groups(p_moments, p_sums, p_offsets, mean, m2, at, parts, i_chunk, pixels, row_pixels,
                 begin, end, C, K, width, v)


@triton.jit
def group_index(p_offsets, c, C, K, width, v: tl.constexpr):
    """Which group channel c of each column belongs to; the last for columns beyond C."""
    if p_offsets is None:
        i_k = tl.minimum(c // width, K - 1)
    else:
        i_k = c * 0  # the last k with offsets[k] <= c
        high = i_k + K - 1
        for _ in range(v.search):
            middle = (i_k + high + 1) // 2
            right = tl.load(p_offsets + middle) <= c
            i_k = tl.where(right, middle, i_k)
            high = tl.where(right, high, middle - 1)
    return i_k


@triton.jit(do_not_specialize=BATCH_ARGS)
def rows_apply_kernel(p_a, p_h_prev, p_shortcut, p_offsets, p_coef, p_stats, p_z, p_da, p_clock, N,
                      C, H, W, K, width, row_pixels, span, splits, chunks, z_channels, da_scale,
                      blend, keep_scale, seed_lo, seed_hi, layer, step, threshold, start, half,
                      half_start, v: tl.constexpr):
    """z and da of `span` rows and a chunk of channels, both optional.

    Samples from last to first: what the first sweep read last is still in L2.
    """
    i_n, i_s, i_chunk = owner(splits, chunks)
    i_n = N - 1 - i_n
    drop = dropout_key(p_clock, seed_lo, seed_hi, layer, step, threshold)
    pixels_z = (H // 2) * (W // 2) if v.pool else H * W
    # ceiling windows: a trailing row or column that no window holds still gets its da = 0
    cols = (W + 1) // 2 if v.pool else W
    windows = (H + 1) // 2 * cols if v.pool else H * W
    row = aligned(row_pixels * C, v)
    total = aligned(H * W * C, v)
    index = batch_row(i_n, start, half, half_start) * C * (H * W)
    base_a = aligned(i_n * C * (H * W), v)
    base_dense = aligned(i_n * C * pixels_z, v)
    p_a += base_a
    if p_h_prev is not None:
        p_h_prev += base_dense
    if p_shortcut is not None:
        p_shortcut += base_dense
    if p_z is not None:
        bytes_z: tl.constexpr = v.bytes_z
        p_z = tl.multiple_of(p_z + i_n * z_channels * pixels_z, bytes_z)
    e, j, c = columns(i_chunk, C, v)
    e_z = columns_z(j, c, z_channels, v)
    at = i_n * K + group_index(p_offsets, c, C, K, width, v)
    mean = tl.load(p_stats + 2 * at)
    rstd = tl.load(p_stats + 2 * at + 1)
    coef = 0.0
    if p_da is not None:
        p_da += base_a
        coef = tl.load(p_coef + at) * (da_scale * blend)
    begin = i_s * span
    end = tl.minimum(begin + span, tl.cdiv(windows, row_pixels))
    for r0 in range(begin, end, v.block_outer):
        r, o_a, y, x, m = positions(r0, e, row, total, windows, C, H, W, cols, v)
        h, slope, winner, whole = row_h(p_a, o_a, r0, r, j, c, y, x, m, index, C, H, W, row_pixels,
                                        drop, keep_scale, v)
        r_z = r
        if v.pool:
            r_z = y // 2 * (W // 2) + x // 2
        o_dense = r_z * row + e
        o_z = o_dense
        if v.slice_z:
            o_z = r_z * (row_pixels * (z_channels // v.align_z * v.align_z)) + e_z
        h = blended(h, p_h_prev, o_dense, whole, blend)
        store_results(p_z, p_da, p_shortcut, o_a, o_z, o_dense, h, slope, winner, m, whole,
                      x + 1 < W, y + 1 < H, W, aligned(C, v), mean, rstd, coef, v)
