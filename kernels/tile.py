"""What the sweeps of `local_pass` share: groups, rows of the batch, and h = pool(dropout(relu(a)))
on a tile, whatever its geometry (kernels/runs.py, kernels/rows.py).

A position of a tile is an element, or with a pool a 2x2 window. `v` is the kernel's Variant
(kernels/launch.py).
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
def batch_row(i_n, start, half, half_start):
    """Which row of the whole batch row i_n (int64) of this call is."""
    return tl.where(i_n < half, i_n + start, i_n - half + half_start)


@triton.jit
def dropout_key(p_clock, seed_lo, seed_hi, layer, step, threshold):
    """What philox reads; the step is the clock's where there is one."""
    if p_clock is not None:
        step = tl.load(p_clock)
    return seed_lo, seed_hi, layer, step, threshold


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
def window(p_a, o_a, whole, index, W, pixel, drop, keep_scale, v: tl.constexpr):
    """h of whole 2x2 windows: (h of the winner, dh/da there, the winner's number).

    o_a: offset of a window's first element, its neighbours a `pixel` and W of them further; index:
    the first element's logical index in the batch. The winner is the first maximum in row-major
    order, or the last NaN, as in torch's max_pool2d.
    """
    keep = whole
    if v.dropout:
        keep = philox.keeps(index, drop)
    h, slope = activation(p_a, o_a, whole, keep, keep_scale, v)
    winner = tl.zeros_like(o_a)
    for q in tl.static_range(1, 4):
        shift = (q // 2) * W + q % 2
        if v.dropout:
            keep = philox.keeps(index + shift, drop)
        h_q, slope_q = activation(p_a, o_a + shift * pixel, whole, keep, keep_scale, v)
        wins = (h_q > h) | (h_q != h_q)
        h = tl.where(wins, h_q, h)
        slope = tl.where(wins, slope_q, slope)
        winner = tl.where(wins, q, winner)
    return h, slope, winner


@triton.jit
def blended(h, p_h_prev, o_z, m, blend):
    """h' = blend h + (1 - blend) h_prev where there is an h_prev."""
    if p_h_prev is not None:
        previous = tl.load(p_h_prev + o_z, mask=m, other=0.0).to(tl.float32)
        h = blend * h + (1.0 - blend) * previous
    return h


@triton.jit
def merged(count, mean, m2, h, m, n, axis: tl.constexpr):
    """Moments along `axis` of a tile with n valid elements each, merged into those of `count` by
    Chan's formula; where n is 0 they stay."""
    tile_mean = tl.sum(tl.where(m, h, 0.0), axis, keep_dims=True) / tl.maximum(n, 1.0)
    centred = tl.where(m, h - tile_mean, 0.0)
    delta = tl.where(n > 0.0, tile_mean - mean, 0.0)
    share = n / tl.maximum(count + n, 1.0)
    m2 += tl.sum(centred * centred, axis, keep_dims=True) + delta * delta * (count * share)
    return mean + delta * share, m2


@triton.jit
def store_results(p_z, p_da, p_shortcut, o_a, o_z, o_dense, h, slope, winner, m, whole, inside_x,
                  inside_y, W, pixel, mean, rstd, coef, v: tl.constexpr):
    """z = (h - mean) rstd, shortcut added, and da = coef [2 h] dh/da of a tile.

    With a pool da goes to the winner of each window (whole: complete ones) and is 0 elsewhere;
    inside_x, inside_y: whether the window's second column and row exist.
    """
    if p_da is not None:
        dh = coef if v.mean_goodness else coef * (2.0 * h)
        da = dh * slope
        if v.pool:
            da = tl.where(whole, da, 0.0)
            for q in tl.static_range(4):
                inside = m
                if q % 2 == 1:
                    inside = inside & inside_x
                if q // 2 == 1:
                    inside = inside & inside_y
                tl.store(p_da + o_a + ((q // 2) * W + q % 2) * pixel,
                         tl.where(winner == q, da, 0.0), mask=inside)
        else:
            tl.store(p_da + o_a, da, mask=m)
    if p_z is not None:
        z = (h - mean) * rstd
        if p_shortcut is not None:
            z += tl.load(p_shortcut + o_dense, mask=whole, other=0.0).to(tl.float32)
        tl.store(p_z + o_z, z, mask=whole)
