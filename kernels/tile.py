"""Tiles of one group of one sample: where they lie, and h = pool(dropout(relu(a))) on them.

A tile is (1, B) of the flat group in NCHW and (pixels, channels) in NHWC; with a pool its positions
are 2x2 windows. `v` is the kernel's Variant (kernels/launch.py).
"""

import triton
import triton.language as tl
from ffengine.kernels import philox


@triton.jit
def aligned(x, v: tl.constexpr):
    """x, known by the host to be a multiple of v.align, in a form the compiler sees it in."""
    return x // v.align * v.align


@triton.jit
def group_of(p_offsets, i_k, width):
    """First channel and number of channels of group i_k (scalar or tile)."""
    if p_offsets is None:
        first = i_k * width
        channels = width
    else:
        first = tl.load(p_offsets + i_k).to(tl.int32)
        channels = tl.load(p_offsets + i_k + 1).to(tl.int32) - first
    return first, channels


@triton.jit
def span_of(i_s, channels, windows, span, v: tl.constexpr):
    """The (outer, inner) ranges of split i_s: (pixel, channel) in NHWC, else (0, flat index)."""
    if v.channels_last:
        o_start = i_s * span
        o_end = tl.minimum(windows, o_start + span)
        i_start = 0
        i_end = aligned(channels, v)
    else:
        o_start = 0
        o_end = 1
        i_start = i_s * span
        i_end = tl.minimum(aligned(channels * windows, v), i_start + span)
    return o_start, o_end, i_start, i_end


@triton.jit
def positions(o0, o_end, i0, i_end, C, H, W, rows, cols, v: tl.constexpr):
    """A tile's window positions, relative to the group's first element.

    Returns the offset in a (of the window's first element), the offset in z, the logical NCHW
    index, the window's y and x in a, and the mask; all (B_O, B_I).
    """
    i_o = o0 + tl.arange(0, v.block_outer)[:, None]
    i_i = i0 + tl.arange(0, v.block_inner)[None, :]
    m = (i_o < o_end) & (i_i < i_end)
    if v.pool:
        if v.channels_last:
            window = i_o
            channel = i_i
        else:
            window = i_i % (rows * cols)
            channel = i_i // (rows * cols)
        row = window // cols
        col = window % cols
        y = 2 * row
        x = 2 * col
        logical = channel * (H * W) + y * W + x
        if v.channels_last:
            o_a = (y * W + x) * aligned(C, v) + channel
            o_z = (row * (W // 2) + col) * aligned(C, v) + channel
        else:
            o_a = logical
            o_z = channel * ((H // 2) * (W // 2)) + row * (W // 2) + col
    else:
        y = i_o
        x = i_i
        if v.channels_last:
            o_a = i_o * aligned(C, v) + i_i
            logical = i_i * (H * W) + i_o
        else:
            o_a = i_i
            logical = i_i
        o_z = o_a
    return o_a, o_z, logical, y, x, m


@triton.jit
def activation(p_a, o_a, m, keep, keep_scale, v: tl.constexpr):
    """h = dropout(relu(a)) and dh/da at a tile of elements."""
    a = tl.load(p_a + o_a, mask=m, other=0.0).to(tl.float32)
    h = tl.where(a <= 0.0, 0.0, a)  # a NaN stays, which tl.maximum would drop
    if v.straight_through:
        slope = a * 0.0 + 1.0
        slope = tl.where(slope == slope, slope, 1.0)
    else:
        slope = tl.where(a > 0.0, 1.0, 0.0)
    if v.dropout:
        h = tl.where(keep | (h != h), h * keep_scale, 0.0)
        slope = tl.where(keep, slope * keep_scale, 0.0)
    return h, slope


@triton.jit
def keep_tile(i_group, o0, i0, logical, H, W, drop, v: tl.constexpr):
    """The dropout mask of an unpooled tile; i_group is the batch-wide index of its group."""
    if v.quads:
        if v.channels_last:
            quad = (tl.arange(0, v.block_inner)[None, :] + i0) * ((H * W) // 4)
            quad += tl.arange(0, v.block_outer // 4)[:, None]
            keep = philox.keeps_quads((i_group + o0 >> 2) + quad, drop, False)
        else:
            quad = tl.arange(0, v.block_inner // 4)[None, :]
            keep = philox.keeps_quads((i_group + i0 >> 2) + quad, drop, True)
    else:
        keep = philox.keeps(i_group + logical, drop)
    return keep


@triton.jit
def tile_h(p_a, o_a, logical, y, x, m, i_group, o0, i0, C, H, W, drop, keep_scale,
           v: tl.constexpr):
    """h of a tile: (h after the pool, dh/da at the winner, the winner, whole windows).

    The winner is the first maximum of a 2x2 window in row-major order, or its last NaN, as in
    torch's max_pool2d; without a pool it is the element itself.
    """
    keep = m
    whole = m
    if v.pool:
        whole = m & (y + 1 < H) & (x + 1 < W)
        pixel = aligned(C, v) if v.channels_last else 1
        if v.dropout:
            keep = philox.keeps(i_group + logical, drop)
        h, slope = activation(p_a, o_a, whole, keep, keep_scale, v)
        winner = tl.zeros_like(o_a)
        for q in tl.static_range(1, 4):
            shift = (q // 2) * W + q % 2
            if v.dropout:
                keep = philox.keeps(i_group + logical + shift, drop)
            h_q, slope_q = activation(p_a, o_a + shift * pixel, whole, keep, keep_scale, v)
            wins = (h_q > h) | (h_q != h_q)
            h = tl.where(wins, h_q, h)
            slope = tl.where(wins, slope_q, slope)
            winner = tl.where(wins, q, winner)
    else:
        if v.dropout:
            keep = keep_tile(i_group, o0, i0, logical, H, W, drop, v)
        h, slope = activation(p_a, o_a, m, keep, keep_scale, v)
        winner = 0
    return h, slope, winner, whole


@triton.jit
def blended(h, p_h_prev, o_z, m, blend):
    """h' = blend h + (1 - blend) h_prev where there is an h_prev."""
    if p_h_prev is not None:
        previous = tl.load(p_h_prev + o_z, mask=m, other=0.0).to(tl.float32)
        h = blend * h + (1.0 - blend) * previous
    return h


@triton.jit
def bases(i_n, first, C, H, W, start, half, half_start, v: tl.constexpr):
    """int64 offsets of (n, group): in a, in z, and its logical index in the whole batch."""
    row = tl.where(i_n < half, i_n + start, i_n - half + half_start)
    per_row = C * H * W
    pixels_z = (H // 2) * (W // 2) if v.pool else H * W
    i_group = row * per_row + first * (H * W)
    if v.channels_last:
        base_a = aligned(i_n * per_row + first, v)
        base_z = aligned(i_n * C * pixels_z + first, v)
    else:
        base_a = aligned(i_n * per_row + first * (H * W), v)
        base_z = aligned(i_n * C * pixels_z + first * pixels_z, v)
    if v.quads:
        i_group = i_group // 4 * 4
    return base_a, base_z, i_group
