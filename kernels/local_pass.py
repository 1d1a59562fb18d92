"""`local_pass` in Triton: two sweeps over a, the second of which finds its tail in L2.

stats   moments of h per (sample, group) and part of it                   reads a
finish  one program per few rows: merges parts; goodness, loss, coef, (mean, rstd) per (n, k)
apply   z and da                                                          reads a, writes z, da

The sweeps go by runs of memory in NCHW (kernels/runs.py), by rows of pixels in NHWC
(kernels/rows.py). No atomics: parts are merged in order, and their number never depends on the
batch, so a row's result is the same in any tile of samples.

reference: ffengine/reference/local_pass.py   op: ffengine/ops/local_pass.py
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from ffengine.kernels import losses, philox, rows, runs
from ffengine.kernels.forms import Form, on_device_of
from ffengine.kernels.launch import FinishVariant, Launch, Variant, grid, plan_launch
from ffengine.kernels.tile import group_of

if TYPE_CHECKING:
    from ffengine.ops.params import LocalPassCall, LocalPassTensors

MEAN = tl.constexpr(0)
SUM_SQ = tl.constexpr(1)
NORM_NONE = tl.constexpr(0)
NORM_GROUP = tl.constexpr(1)
NORM_LAYER = tl.constexpr(2)
NORM_LENGTH = tl.constexpr(3)
PHASE_STATS, PHASE_APPLY = 1, 2


@triton.jit
def part_sizes(first, channels, part, pixels, span, chunks, block_inner, v: tl.constexpr):
    """Elements that parts of groups hold; span in pixels (NHWC) or elements of the run."""
    if v.channels_last:
        begin = part % chunks * block_inner
        inside = tl.minimum(first + channels, begin + block_inner) - tl.maximum(first, begin)
        inside = tl.where(chunks == 1, channels, tl.maximum(inside, 0))
        n = tl.maximum(tl.minimum(pixels - part // chunks * span, span), 0) * inside
    else:
        n = tl.maximum(tl.minimum(channels * pixels - part * span, span), 0)
    return n.to(tl.float32)


@triton.jit
def merge_parts(p_moments, p_sums, at, m, first, channels, pixels, span, parts, chunks, block_inner,
                v: tl.constexpr):
    """(mean, M2, sum of squares or 0) of groups (R, B_K) from their parts, block_s at a time."""
    count = tl.zeros(m.shape, tl.float32)
    mean, m2, sums = count, count, count
    for s0 in range(0, parts, v.block_s):
        part = s0 + tl.arange(0, v.block_s)[None, None, :]
        n = part_sizes(first[:, :, None], channels[:, :, None], part, pixels, span, chunks,
                       block_inner, v)
        some = m[:, :, None] & (part < parts) & (n > 0.0)
        n = tl.where(some, n, 0.0)
        o_part = at[:, :, None] * parts + part
        mean_part = tl.load(p_moments + 2 * o_part, mask=some, other=0.0)
        m2_part = tl.load(p_moments + 2 * o_part + 1, mask=some, other=0.0)
        if p_sums is not None:
            sums += tl.sum(tl.load(p_sums + o_part, mask=some, other=0.0), 2)
        total = tl.sum(n, 2)
        share = n / tl.maximum(total, 1.0)[:, :, None]
        centre = tl.sum(mean_part * share, 2)
        gap = tl.where(some, mean_part - centre[:, :, None], 0.0)
        squares = tl.sum(m2_part + n * gap * gap, 2)
        delta = tl.where(total > 0.0, centre - mean, 0.0)
        share = total / tl.maximum(count + total, 1.0)
        m2 += squares + delta * delta * (count * share)
        mean += delta * share
        count += total
    return mean, m2, sums


@triton.jit
def normaliser(mean, m2, squares, size, m, eps, v: tl.constexpr):
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
            squares = losses.total(squares, m) + size * 0.0
            n = losses.total(size, m)
        if v.norm_rms:
            squares = squares / n
        rstd = 1.0 / (tl.sqrt(squares) + eps)
        mean = size * 0.0
    return mean, rstd


@triton.jit
def finish_rows(i_n, N, p_moments, p_sums, p_offsets, p_g0, p_g, p_stats, K, width, pixels, span,
                parts, chunks, block_inner, eps, v: tl.constexpr):
    """g and stats of rows i_n (R, 1), stored and returned with their index, mask and m."""
    i_k = tl.arange(0, v.block_k)[None, :]
    m = (i_k < K) & (i_n < N)
    at = i_n * K + i_k
    first, channels = group_of(p_offsets, tl.minimum(i_k, K - 1), width)
    channels += tl.zeros(i_k.shape, tl.int32)
    size = (channels * pixels).to(tl.float32) + tl.zeros(m.shape, tl.float32)
    mean, m2, squares = merge_parts(p_moments, p_sums, at, m, first, channels, pixels, span, parts,
                                    chunks, block_inner, v)
    if v.goodness == MEAN:
        g = mean
        squares = m2 + size * mean * mean
    else:
        g = squares if v.goodness == SUM_SQ else squares / size
    if p_g0 is not None:
        g += tl.load(p_g0 + at, mask=m, other=0.0).to(tl.float32)
    mean, rstd = normaliser(mean, m2, squares, size, m, eps, v)
    # one part: g and stats are stored over sums and moments that other threads just read
    tl.debug_barrier()
    tl.store(p_g + at, g, mask=m)
    tl.store(p_stats + 2 * at, mean, mask=m)
    tl.store(p_stats + 2 * at + 1, rstd, mask=m)
    divisor = tl.zeros_like(size) + 1.0 if v.goodness == SUM_SQ else size
    return g, at, m, divisor


@triton.jit(do_not_specialize=["N"])
def finish_kernel(p_moments, p_sums, p_offsets, p_y, p_g0, p_g, p_stats, p_loss, p_coef, N, K,
                  width, pixels, span, parts, chunks, block_inner, eps, p0, p1, p2, scale,
                  v: tl.constexpr):
    """Goodness, loss and gradient of R rows (pairs n, n + N / 2 for symba) a program.

    g (N, K) = goodness of the merged moments + g0; coef (N, K) = scale dloss/dg / m, m the group's
    size or 1 for sums of squares; loss (N,) or (N / 2,); stats (N, K, 2).
    """
    i_r = tl.program_id(0).to(tl.int64) * v.rows + tl.arange(0, v.rows)[:, None]
    if v.loss == losses.SYMBA:
        pairs = N // 2
        g_pos, at_pos, m_pos, size = finish_rows(
            i_r, pairs, p_moments, p_sums, p_offsets, p_g0, p_g, p_stats, K, width, pixels, span,
            parts, chunks, block_inner, eps, v)
        i_neg = tl.where(i_r < pairs, i_r + pairs, N)
        g_neg, at_neg, m_neg, _size = finish_rows(
            i_neg, N, p_moments, p_sums, p_offsets, p_g0, p_g, p_stats, K, width, pixels, span,
            parts, chunks, block_inner, eps, v)
        value, dg = losses.symba(g_pos, g_neg, p0)
        tl.store(p_loss + i_r, value, mask=i_r < pairs)
        tl.store(p_coef + at_pos, dg * scale / size, mask=m_pos)
        tl.store(p_coef + at_neg, -dg * scale / size, mask=m_neg)
    else:
        g, at, m, size = finish_rows(
            i_r, N, p_moments, p_sums, p_offsets, p_g0, p_g, p_stats, K, width, pixels, span,
            parts, chunks, block_inner, eps, v)
        if p_y is not None:
            y = tl.load(p_y + i_r, mask=i_r < N, other=0).to(tl.int32)
            value, dg = losses.row_loss(g, y, m, K, p0, p1, p2, v.loss)
            tl.store(p_loss + i_r, value, mask=i_r < N)
            tl.store(p_coef + at, dg * scale / size, mask=m)


class Plan(NamedTuple):
    """What calls of one layer share: launch, kernels, and the numbers that never change."""

    launch: Launch
    stats: Form
    finish: Form
    apply: Form
    programs: int  # a sample: of the first sweep ...
    apply_programs: int  # ... and the second
    geometry: tuple[int, ...]
    apply_geometry: tuple[int, ...]
    finish_geometry: tuple[int, ...]


def local_pass(tensors: LocalPassTensors, call: LocalPassCall) -> None:
    """Run one call's phases; arguments as ffengine/ops/local_pass.py lays them out."""
    a, z = tensors.a, tensors.z
    dropout = call.dropout_threshold != 0
    plan = make_plan(
        a.shape[1:], a.dtype, call.channels_last, call.groups, call.equal_groups, call.pool,
        dropout, call.straight_through, call.goodness, call.norm, call.norm_rms,
        call.norm_per_group, call.loss, call.z_channels, 0 if z is None else z.data_ptr() & 15,
        tuple([t is None for t in tensors]))
    # what names this batch's rows and random words
    words = _words(call, tensors.clock) if dropout else (0, 0, 0, 0, 0)
    batch = (call.blend + 0.0, call.keep_scale, *words, call.start, call.half, call.half_start)
    usual = call.start + call.half + call.half_start < 2**31
    with on_device_of(a):
        if call.phase != PHASE_APPLY:
            _stats(tensors, call, plan, batch, usual)
        if call.phase != PHASE_STATS and (z is not None or tensors.da is not None):
            n = a.shape[0]
            plan.apply.launch(
                grid("local_pass", n, plan.apply_programs),
                (a, tensors.h_prev, tensors.shortcut,
                 None if call.equal_groups else tensors.offsets, tensors.coef, tensors.stats, z,
                 tensors.da, tensors.clock),
                (n, *plan.apply_geometry, call.da_scale, *batch), usual)


def _stats(tensors: LocalPassTensors, call: LocalPassCall, plan: Plan, batch: tuple[Any, ...],
           usual: bool) -> None:
    """The stats and finish kernels; a single part's moments lie in stats and g themselves."""
    n, k, parts = tensors.a.shape[0], call.groups, plan.launch.parts
    offsets = None if call.equal_groups else tensors.offsets
    squares = call.goodness != MEAN.value
    moments, sums = tensors.stats, tensors.g if squares else None
    if parts > 1:
        moments = torch.empty(n, k, parts, 2, dtype=torch.float32, device=tensors.a.device)
        sums = moments.new_empty(n, k, parts) if squares else None
    plan.stats.launch(grid("local_pass", n, plan.programs),
                      (tensors.a, tensors.h_prev, offsets, moments, sums, tensors.clock),
                      (*plan.geometry, *batch), usual)
    with_loss = call.loss >= 0
    rows = n // 2 if call.loss == losses.SYMBA.value else n
    plan.finish.launch(
        grid("local_pass", -(-rows // plan.launch.rows)),
        (moments, sums, offsets, tensors.y if with_loss else None, tensors.g0, tensors.g,
         tensors.stats, tensors.loss if with_loss else None, tensors.coef if with_loss else None),
        # a user's theta may be an int, which Triton would compile as another type
        (n, *plan.finish_geometry, call.norm_eps + 0.0, call.p0 + 0.0, call.p1 + 0.0,
         call.p2 + 0.0, call.scale + 0.0))


@functools.lru_cache(maxsize=4096)
def make_plan(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, groups: int,
              equal: bool, pool: bool, dropout: bool, straight_through: bool, goodness: int,
              norm: int, norm_rms: bool, norm_per_group: bool, loss: int, z_channels: int,
              address_z: int, absent: tuple[bool, ...]) -> Plan:
    """The plan of maps (N, *shape); `absent`: which of LocalPassTensors a call has not, so that
    a form's tensors are always the same ones; address_z: z's, modulo 16."""
    channels, height, width = _chw(shape)
    launch = plan_launch(channels, height, width, groups, equal=equal, channels_last=channels_last,
                         pool=pool, itemsize=dtype.itemsize, dropout=dropout)
    v = _variant(launch, channels, dtype.itemsize, channels_last, z_channels, address_z)
    v = v._replace(
        mean_goodness=goodness == MEAN.value, straight_through=straight_through, pool=pool,
        dropout=dropout, search=0 if equal or not channels_last else (groups - 1).bit_length())
    first = v._replace(mean_goodness=False, straight_through=False, slice_z=False, align_z=1,
                       bytes_z=1, search=0, block_g=launch.block_g, block_b=launch.block_b)
    finish = FinishVariant(goodness, norm, norm_rms, norm_per_group, loss, channels_last,
                           launch.block_k, launch.block_s, launch.rows)
    side_by_side = launch.chunks if channels_last else groups
    geometry = (channels, height, width, groups, channels // groups)

    def split(splits: int) -> tuple[int, ...]:
        if channels_last:
            return launch.row_pixels, launch.span, splits, launch.chunks
        return launch.span, splits

    return Plan(
        launch,
        Form(rows.rows_stats_kernel if channels_last else runs.stats_kernel, v=first,
             warps=launch.warps),
        Form(finish_kernel, v=finish, warps=launch.finish_warps),
        Form(rows.rows_apply_kernel if channels_last else runs.apply_kernel, v=v,
             warps=launch.warps),
        launch.splits * side_by_side, launch.apply_splits * side_by_side,
        (*geometry, *split(launch.splits)),
        (*geometry, *split(launch.apply_splits), z_channels),
        (groups, channels // groups, launch.pixels, launch.span * launch.row_pixels, launch.parts,
         launch.chunks, launch.block_inner))


def _variant(launch: Launch, channels: int, itemsize: int, channels_last: bool, z_channels: int,
             address_z: int) -> Variant:
    """What the second sweep's kernel is told of memory."""
    sliced = z_channels != channels
    align_z = math.gcd(z_channels * (1 if channels_last else launch.pixels), 16) if sliced else 16
    return Variant(
        mean_goodness=False, straight_through=False, pool=False, dropout=False, quads=launch.quads,
        align=launch.align, slice_z=sliced and channels_last,
        align_c=math.gcd(channels, 16) if launch.row_pixels > 1 else 1,
        align_z=align_z if sliced else 1,
        bytes_z=math.gcd(math.gcd(launch.align, align_z) * itemsize, address_z, 16),
        block_outer=launch.block_outer, block_inner=launch.block_inner, many=launch.row_pixels > 1,
        block_g=1, block_b=1, search=0)


def _words(call: LocalPassCall, clock: torch.Tensor | None) -> tuple[int, ...]:
    """What philox reads; with a clock nothing that changes from step to step."""
    seed, step = call.dropout_seed, call.dropout_step if clock is None else 0
    return philox.int32_patterns(seed, seed >> 32, call.dropout_layer, step,
                                 call.dropout_threshold)


def _chw(shape: tuple[int, ...]) -> tuple[int, int, int]:
    channels, *spatial = shape
    if len(spatial) == 2:
        return channels, spatial[0], spatial[1]
    return channels, 1, math.prod(spatial)
