"""`local_pass` in Triton: two sweeps over a, the second of which finds its tail in L2.

stats   one program per (n, k, split): moments and goodness sums of h       reads a
finish  one program per few rows: merges splits; goodness, loss, coef, (mean, rstd) per (n, k)
apply   one program per (n, k, split): z and da                              reads a, writes z, da

No atomics: splits are merged in order, and their number never depends on the batch, so a row's
result is the same in any tile of samples.

reference: ffengine/reference/local_pass.py   op: ffengine/ops/local_pass.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from ffengine.kernels import losses, philox
from ffengine.kernels.launch import Launch, Variant, plan_launch
from ffengine.kernels.tile import aligned, bases, blended, group_of, positions, span_of, tile_h

if TYPE_CHECKING:
    from ffengine.ops.local_pass import LocalPassCall, LocalPassTensors

MEAN = tl.constexpr(0)
SUM_SQ = tl.constexpr(1)
NORM_NONE = tl.constexpr(0)
NORM_GROUP = tl.constexpr(1)
NORM_LAYER = tl.constexpr(2)
NORM_LENGTH = tl.constexpr(3)
PHASE_STATS, PHASE_APPLY = 1, 2

#: Arguments that change from call to call and so must stay out of the compile key.
BATCH_ARGS = ("N", "seed_lo", "seed_hi", "layer", "step", "threshold", "start", "half",
              "half_start")


@triton.jit(do_not_specialize=BATCH_ARGS)
def stats_kernel(p_a, p_h_prev, p_offsets, p_moments, p_sums, C, H, W, K, width, span, blend,
                 keep_scale, seed_lo, seed_hi, layer, step, threshold, start, half, half_start,
                 v: tl.constexpr):
    """Moments of h per (n, k, split), merged over tiles by Chan's formula.

    sums (N, K, splits): sum of h (mean) or h^2 over the split's elements.
    moments (N, K, splits, 2): (mean, sum (h - mean)^2), or (0, sum h^2) for length norms.
    """
    i_k = tl.program_id(0) % K
    i_n = (tl.program_id(0) // K).to(tl.int64)
    i_s = tl.program_id(1)
    drop = (seed_lo, seed_hi, layer, step, threshold)
    first, channels = group_of(p_offsets, i_k, width)
    rows = H // 2 if v.pool else H
    cols = W // 2 if v.pool else W
    base_a, base_z, i_group = bases(i_n, first, C, H, W, start, half, half_start, v)
    if p_h_prev is not None:
        p_h_prev += base_z
    o_start, o_end, i_start, i_end = span_of(i_s, channels, rows * cols, span, v)
    count, mean, m2, sums = 0.0, 0.0, 0.0, 0.0
    for o0 in range(o_start, o_end, v.block_outer):
        for i0 in range(i_start, i_end, v.block_inner):
            o_a, o_z, logical, y, x, m = positions(o0, o_end, i0, i_end, C, H, W, rows, cols, v)
            h, _slope, _winner, _whole = tile_h(p_a + base_a, o_a, logical, y, x, m, i_group, o0,
                                                i0, C, H, W, drop, keep_scale, v)
            h = tl.where(m, blended(h, p_h_prev, o_z, m, blend), 0.0)
            h_sum = tl.sum(h)
            squares = h * h
            sums += h_sum if v.goodness == MEAN else tl.sum(squares)
            if v.norm == NORM_LENGTH:
                m2 += tl.sum(squares)
            elif v.norm != NORM_NONE:
                outer = tl.minimum(o_end - o0, v.block_outer)
                n = (outer * tl.minimum(i_end - i0, v.block_inner)).to(tl.float32)
                centred = tl.where(m, h - h_sum / n, 0.0)
                delta = h_sum / n - mean
                mean += delta * (n / (count + n))
                m2 += tl.sum(centred * centred) + delta * delta * (count * n / (count + n))
                count += n
    at = (i_n * K + i_k) * tl.num_programs(1) + i_s
    tl.store(p_sums + at, sums)
    tl.store(p_moments + 2 * at, mean)
    tl.store(p_moments + 2 * at + 1, m2)


@triton.jit
def merge_splits(p_moments, p_sums, at, m, size, channels, pixels, span, splits,
                 v: tl.constexpr):
    """(mean, M2, sum) of whole groups from their splits, in order; all (R, B_K)."""
    count = size * 0.0
    mean, m2, sums = count, count, count
    for i_s in range(splits):
        if v.channels_last:
            n = tl.maximum(tl.minimum(pixels - i_s * span, span), 0) * channels
        else:
            n = tl.maximum(tl.minimum(channels * pixels - i_s * span, span), 0)
        n = n.to(tl.float32) + count * 0.0
        some = m & (n > 0.0)
        o_split = at * splits + i_s
        sums += tl.load(p_sums + o_split, mask=some, other=0.0)
        delta = tl.load(p_moments + 2 * o_split, mask=some, other=0.0) - mean
        m2_split = tl.load(p_moments + 2 * o_split + 1, mask=some, other=0.0)
        if v.norm != NORM_LENGTH:
            share = tl.where(some, n / tl.maximum(count + n, 1.0), 0.0)
            mean += tl.where(some, delta * share, 0.0)
            m2_split += tl.where(some, delta * delta * count * share, 0.0)
        m2 += m2_split
        count += n
    return mean, m2, sums


@triton.jit
def normaliser(mean, m2, size, m, eps, v: tl.constexpr):
    """(mean, rstd) with z = (h - mean) rstd, per (n, k), whatever the norm's kind and scope."""
    if v.norm == NORM_NONE:
        mean = size * 0.0
        rstd = mean + 1.0
    elif v.norm == NORM_GROUP:
        rstd = tl.rsqrt(m2 / size + eps)
    elif v.norm == NORM_LAYER:
        n = losses.total(size, m)
        centre = losses.total(mean * (size / n), m)
        delta = mean - centre
        rstd = tl.rsqrt(losses.total(m2 + delta * delta * size, m) / n + eps) + size * 0.0
        mean = centre + size * 0.0
    else:
        n = size
        if not v.norm_per_group:
            m2 = losses.total(m2, m) + size * 0.0
            n = losses.total(size, m)
        if v.norm_rms:
            m2 = m2 / n
        rstd = 1.0 / (tl.sqrt(m2) + eps)
        mean = size * 0.0
    return mean, rstd


@triton.jit
def finish_rows(i_n, N, p_moments, p_sums, p_offsets, p_g0, p_g, p_stats, K, width, pixels, span,
                splits, eps, v: tl.constexpr):
    """g and stats of rows i_n (R, 1), stored and returned with their index, mask and m."""
    i_k = tl.arange(0, v.block_k)[None, :]
    m = (i_k < K) & (i_n < N)
    at = i_n * K + i_k
    _first, channels = group_of(p_offsets, tl.minimum(i_k, K - 1), width)
    size = (channels * pixels).to(tl.float32) + tl.zeros(m.shape, tl.float32)
    mean, m2, sums = merge_splits(p_moments, p_sums, at, m, size, channels, pixels, span, splits,
                                  v)
    g = sums if v.goodness == SUM_SQ else sums / size
    if p_g0 is not None:
        g += tl.load(p_g0 + at, mask=m, other=0.0).to(tl.float32)
    mean, rstd = normaliser(mean, m2, size, m, eps, v)
    # one split: g and stats are stored over the sums and moments that other threads just read
    tl.debug_barrier()
    tl.store(p_g + at, g, mask=m)
    tl.store(p_stats + 2 * at, mean, mask=m)
    tl.store(p_stats + 2 * at + 1, rstd, mask=m)
    divisor = tl.zeros_like(size) + 1.0 if v.goodness == SUM_SQ else size
    return g, at, m, divisor


@triton.jit(do_not_specialize=["N"])
def finish_kernel(p_moments, p_sums, p_offsets, p_y, p_g0, p_g, p_stats, p_loss, p_coef, N, K,
                  width, pixels, span, splits, eps, p0, p1, p2, scale, v: tl.constexpr):
    """Goodness, loss and gradient of R rows (pairs n, n + N / 2 for symba) a program.

    g (N, K) = sums / size + g0; coef (N, K) = scale dloss/dg / m, m the group's size or 1 for sums
    of squares; loss (N,) or (N / 2,); stats (N, K, 2).
    """
    i_r = tl.program_id(0).to(tl.int64) * v.rows + tl.arange(0, v.rows)[:, None]
    if v.loss == losses.SYMBA:
        pairs = N // 2
        g_pos, at_pos, m_pos, size = finish_rows(
            i_r, pairs, p_moments, p_sums, p_offsets, p_g0, p_g, p_stats, K, width, pixels, span,
            splits, eps, v)
        i_neg = tl.where(i_r < pairs, i_r + pairs, N)
        g_neg, at_neg, m_neg, _size = finish_rows(
            i_neg, N, p_moments, p_sums, p_offsets, p_g0, p_g, p_stats, K, width, pixels, span,
            splits, eps, v)
        value, dg = losses.symba(g_pos, g_neg, p0)
        tl.store(p_loss + i_r, value, mask=i_r < pairs)
        tl.store(p_coef + at_pos, dg * scale / size, mask=m_pos)
        tl.store(p_coef + at_neg, -dg * scale / size, mask=m_neg)
    else:
        g, at, m, size = finish_rows(
            i_r, N, p_moments, p_sums, p_offsets, p_g0, p_g, p_stats, K, width, pixels, span,
            splits, eps, v)
        if p_y is not None:
            y = tl.load(p_y + i_r, mask=i_r < N, other=0).to(tl.int32)
            value, dg = losses.row_loss(g, y, m, K, p0, p1, p2, v.loss)
            tl.store(p_loss + i_r, value, mask=i_r < N)
            tl.store(p_coef + at, dg * scale / size, mask=m)


@triton.jit(do_not_specialize=BATCH_ARGS)
def apply_kernel(p_a, p_h_prev, p_offsets, p_coef, p_stats, p_z, p_da, N, C, H, W, K, width, span,
                 blend, keep_scale, da_scale, seed_lo, seed_hi, layer, step, threshold, start,
                 half, half_start, v: tl.constexpr):
    """z = (h' - mean) rstd and da = coef [2 h'] blend dh/da da_scale, z and da optional.

    Rows from last to first: what the first sweep read last is still in L2.
    """
    i_k = tl.program_id(0) % K
    i_n = (N - 1 - tl.program_id(0) // K).to(tl.int64)
    i_s = tl.program_id(1)
    drop = (seed_lo, seed_hi, layer, step, threshold)
    first, channels = group_of(p_offsets, i_k, width)
    # ceiling windows: a trailing row or column that no window holds still gets its da = 0
    rows = (H + 1) // 2 if v.pool else H
    cols = (W + 1) // 2 if v.pool else W
    base_a, base_z, i_group = bases(i_n, first, C, H, W, start, half, half_start, v)
    if p_h_prev is not None:
        p_h_prev += base_z
    at = i_n * K + i_k
    mean = tl.load(p_stats + 2 * at)
    rstd = tl.load(p_stats + 2 * at + 1)
    if p_da is not None:
        coef = tl.load(p_coef + at) * (da_scale * blend)
    pixel = aligned(C, v) if v.channels_last else 1
    o_start, o_end, i_start, i_end = span_of(i_s, channels, rows * cols, span, v)
    for o0 in range(o_start, o_end, v.block_outer):
        for i0 in range(i_start, i_end, v.block_inner):
            o_a, o_z, logical, y, x, m = positions(o0, o_end, i0, i_end, C, H, W, rows, cols, v)
            h, slope, winner, whole = tile_h(p_a + base_a, o_a, logical, y, x, m, i_group, o0, i0,
                                             C, H, W, drop, keep_scale, v)
            h = blended(h, p_h_prev, o_z, whole, blend)
            if p_da is not None:
                dh = coef if v.goodness == MEAN else coef * (2.0 * h)
                da = dh * slope
                if v.pool:
                    da = tl.where(whole, da, 0.0)
                    for q in tl.static_range(4):
                        inside = m & (y + q // 2 < H) & (x + q % 2 < W)
                        o_q = o_a + ((q // 2) * W + q % 2) * pixel
                        tl.store(p_da + base_a + o_q, tl.where(winner == q, da, 0.0), mask=inside)
                else:
                    tl.store(p_da + base_a + o_a, da, mask=m)
            if p_z is not None:
                tl.store(p_z + base_z + o_z, (h - mean) * rstd, mask=whole)


def local_pass(tensors: LocalPassTensors, call: LocalPassCall) -> None:
    """Run one call's phases; arguments as ffengine/ops/local_pass.py lays them out."""
    with torch.cuda.device_of(tensors.a):
        _sweeps(tensors, call)


def _sweeps(tensors: LocalPassTensors, call: LocalPassCall) -> None:
    a = tensors.a
    n, channels, height, width = _nchw(a)
    launch = plan_launch(
        channels, height, width, call.groups, equal=call.equal_groups,
        channels_last=call.channels_last, pool=call.pool, itemsize=a.element_size(),
        dropout=call.dropout_threshold != 0)
    v = Variant(
        goodness=call.goodness, norm=call.norm, norm_rms=call.norm_rms,
        norm_per_group=call.norm_per_group, straight_through=call.straight_through,
        pool=call.pool, channels_last=call.channels_last, loss=call.loss,
        dropout=call.dropout_threshold != 0, quads=launch.quads, align=launch.align,
        block_outer=launch.block_outer, block_inner=launch.block_inner, block_k=launch.block_k,
        rows=launch.rows)
    geometry = (channels, height, width, call.groups, channels // call.groups, launch.span)
    offsets = None if call.equal_groups else tensors.offsets
    if call.phase != PHASE_APPLY:
        _stats(tensors, call, v, launch, geometry, offsets)
    if call.phase != PHASE_STATS and (tensors.z is not None or tensors.da is not None):
        apply_kernel[(n * call.groups, launch.apply_splits)](
            a, tensors.h_prev, offsets, tensors.coef, tensors.stats, tensors.z, tensors.da, n,
            *geometry, float(call.blend), call.keep_scale, call.da_scale, *_batch_words(call),
            v=v._replace(norm=0, norm_rms=False, norm_per_group=False, loss=-1),
            num_warps=launch.warps, num_stages=1, enable_fp_fusion=True)


def _stats(tensors: LocalPassTensors, call: LocalPassCall, v: Variant, launch: Launch,
           geometry: tuple[int, ...], offsets: torch.Tensor | None) -> None:
    """The stats and finish kernels; one split uses g and stats themselves as its scratch."""
    n, k, splits = tensors.a.shape[0], call.groups, launch.splits
    moments, sums = tensors.stats, tensors.g
    if splits > 1:
        moments = torch.empty(n, k, splits, 2, dtype=torch.float32, device=tensors.a.device)
        sums = torch.empty(n, k, splits, dtype=torch.float32, device=tensors.a.device)
    stats_kernel[(n * k, splits)](
        tensors.a, tensors.h_prev, offsets, moments, sums, *geometry, float(call.blend),
        call.keep_scale, *_batch_words(call),
        v=v._replace(straight_through=False, loss=-1, norm_rms=False, norm_per_group=False),
        num_warps=launch.warps, num_stages=1, enable_fp_fusion=True)
    with_loss = call.loss >= 0
    # a user's theta may be an int, which Triton would compile as another type
    numbers = map(float, (call.norm_eps, call.p0, call.p1, call.p2, call.scale))
    programs = n // 2 if call.loss == losses.SYMBA.value else n
    finish_kernel[(triton.cdiv(programs, launch.rows),)](
        moments, sums, offsets, tensors.y if with_loss else None, tensors.g0, tensors.g,
        tensors.stats, tensors.loss if with_loss else None,
        tensors.coef if with_loss else None, n, k, geometry[4], launch.pixels, launch.span,
        splits, *numbers,
        v=v._replace(straight_through=False, dropout=False, quads=False, align=1),
        num_warps=launch.finish_warps, num_stages=1, enable_fp_fusion=True)


def _batch_words(call: LocalPassCall) -> tuple[int, ...]:
    """What names this batch's rows and random words, 32-bit words as int32 patterns."""
    seed = call.dropout_seed
    words = philox.int32_patterns(seed, seed >> 32, call.dropout_layer, call.dropout_step,
                                  call.dropout_threshold)
    return (*words, call.start, call.half, call.half_start)


def _nchw(a: torch.Tensor) -> tuple[int, int, int, int]:
    n, channels, *spatial = a.shape
    if len(spatial) == 2:
        return n, channels, spatial[0], spatial[1]
    pixels = 1
    for s in spatial:
        pixels *= s
    return n, channels, 1, pixels
