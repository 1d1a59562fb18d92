"""What lies between the sweeps of `batch_pass` under BatchNorm (ffengine/ops/batch_stats.py defines
it), in three stages of one kernel:

channels  every channel's moments merged over the batch; what z is normalised by; running statistics
rows      goodness, loss, coef and the (N, C) weights of da, row by row
answers   dgamma, dbeta and, with them, what the gradient through the batch statistics subtracts

In fp64, as there. Where the numbers are few one program goes through the stages; else each is a
launch of its own. Sums over the batch go row by row in a fixed order. Predicted for an H100: under
15 µs a layer, where some thirty launches of torch take over 100.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl
from ffengine.kernels import losses
from ffengine.kernels.forms import Form
from ffengine.kernels.launch import grid, power_of_two
from ffengine.kernels.tile import group_of

if TYPE_CHECKING:
    from ffengine.ops.params import BatchPassCall, BatchPassTensors

#: Rows and channels of a tile of the stages over the batch; numbers of a tile of the one over rows.
BLOCK_N, BLOCK_C, TILE = 16, 32, 512
#: Numbers (N C) up to which one program does it all: about 8 tiles a stage.
ALONE = 4096
CHANNELS, ROWS, ANSWERS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
EVERY_STAGE = tl.constexpr(3)
WARPS = 4


class Variant(NamedTuple):
    """Compile-time choices."""

    goodness: int
    loss: int
    training: bool
    use_running: bool
    search: int  # steps in which a channel finds its group among unequal ones
    block_k: int
    block_j: int  # channels of each group at once
    rows: int
    block_n: int
    block_c: int


MEAN, SUM_SQ = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def channel_stage(i_block, p_moments, p_pivot, p_gamma, p_beta, p_mean, p_var, p_table, p_work, N,
                  C, pixels, momentum, eps, v: tl.constexpr):
    """table rows 0 to 2 of a block of channels, 3 and 4 as 0; work (3, C) fp64: mean less pivot,
    rstd, what rounding the mean lost; running statistics moved."""
    i_c = i_block * v.block_c + tl.arange(0, v.block_c)[None, :]
    m_c = i_c < C
    plane = N.to(tl.int64) * C
    pivot = tl.load(p_pivot + i_c, mask=m_c, other=0.0).to(tl.float64)
    count = N.to(tl.float64) * pixels
    centre = pivot * 0.0
    var = centre
    if v.training:
        total = tl.full([1, v.block_c], 0.0, tl.float64)
        for n0 in range(0, N, v.block_n):
            i_n = n0 + tl.arange(0, v.block_n)[:, None].to(tl.int64)
            m = (i_n < N) & m_c
            mean = tl.load(p_moments + i_n * C + i_c, mask=m, other=0.0).to(tl.float64)
            total += tl.sum(mean, 0, keep_dims=True)
        centre = total / N.to(tl.float64)
        squares = tl.full([1, v.block_c], 0.0, tl.float64)
        for n0 in range(0, N, v.block_n):
            i_n = n0 + tl.arange(0, v.block_n)[:, None].to(tl.int64)
            m = (i_n < N) & m_c
            mean = tl.load(p_moments + i_n * C + i_c, mask=m, other=0.0).to(tl.float64)
            m2 = tl.load(p_moments + plane + i_n * C + i_c, mask=m, other=0.0).to(tl.float64)
            gap = tl.where(m, mean - centre, 0.0)
            squares += tl.sum(m2 + gap * gap * pixels, 0, keep_dims=True)
        var = squares / count
    by_mean = centre + pivot
    by_var = var
    if p_mean is not None:
        old_mean = tl.load(p_mean + i_c, mask=m_c, other=0.0).to(tl.float64)
        old_var = tl.load(p_var + i_c, mask=m_c, other=1.0).to(tl.float64)
        if v.training:
            share = pivot * 0.0 + momentum  # in fp64
            moved = (1.0 - share) * old_mean + share * by_mean
            tl.store(p_mean + i_c, moved.to(tl.float32), mask=m_c)
            moved = (1.0 - share) * old_var + share * (var * (count / (count - 1.0)))
            tl.store(p_var + i_c, moved.to(tl.float32), mask=m_c)
        if v.use_running or not v.training:
            by_mean = old_mean
            by_var = old_var
    rstd = 1.0 / tl.sqrt(by_var + eps)
    scale = rstd
    shift = rstd * 0.0
    if p_gamma is not None:
        scale = rstd * tl.load(p_gamma + i_c, mask=m_c, other=0.0).to(tl.float64)
        shift = tl.load(p_beta + i_c, mask=m_c, other=0.0).to(tl.float64)
    # the centre in fp32 and what its rounding lost, in the shift
    rounded = by_mean.to(tl.float32)
    lost = by_mean - rounded.to(tl.float64)
    shift -= scale * lost
    zero = tl.full([1, v.block_c], 0.0, tl.float32)
    tl.store(p_table + i_c, rounded, mask=m_c)
    tl.store(p_table + C + i_c, scale.to(tl.float32), mask=m_c)
    tl.store(p_table + 2 * C + i_c, shift.to(tl.float32), mask=m_c)
    tl.store(p_table + 3 * C + i_c, zero, mask=m_c)
    tl.store(p_table + 4 * C + i_c, zero, mask=m_c)
    tl.store(p_work + i_c, by_mean - pivot, mask=m_c)
    tl.store(p_work + C + i_c, rstd, mask=m_c)
    tl.store(p_work + 2 * C + i_c, lost, mask=m_c)


@triton.jit
def normalised(p_z, p_gamma, p_beta, p_work, i_n, i_c, m, N, C):
    """Of samples' channels: (mean - the normaliser's, M2, scale, mean of z), fp64; p_z (2, N, C):
    moments of what z is made of."""
    at = i_n * C + i_c
    mean = tl.load(p_z + at, mask=m, other=0.0).to(tl.float64)
    m2 = tl.load(p_z + N.to(tl.int64) * C + at, mask=m, other=0.0).to(tl.float64)
    centred = mean - tl.load(p_work + i_c, mask=m, other=0.0)
    scale = tl.load(p_work + C + i_c, mask=m, other=0.0)
    shift = scale * 0.0
    if p_gamma is not None:
        scale *= tl.load(p_gamma + i_c, mask=m, other=0.0).to(tl.float64)
        shift = tl.load(p_beta + i_c, mask=m, other=0.0).to(tl.float64)
    return centred, m2, scale, centred * scale + shift


@triton.jit
def goodness_rows(i_n, end, p_z, p_gamma, p_beta, p_work, p_offsets, p_g, N, C, K, width, pixels_z,
                  v: tl.constexpr):
    """g of rows i_n (R, 1) below `end`, stored; its mask and every group's size, (R, B_K)."""
    i_k = tl.arange(0, v.block_k)[None, :]
    m = (i_k < K) & (i_n < end)
    first, channels = group_of(p_offsets, tl.minimum(i_k, K - 1), width)
    channels += tl.zeros(i_k.shape, tl.int32)
    sums = tl.full([v.rows, v.block_k], 0.0, tl.float64)
    for j0 in range(0, tl.max(channels), v.block_j):
        j = j0 + tl.arange(0, v.block_j)[None, None, :]
        m_j = m[:, :, None] & (j < channels[:, :, None])
        _centred, m2, scale, z_mean = normalised(
            p_z, p_gamma, p_beta, p_work, i_n[:, :, None], first[:, :, None] + j, m_j, N, C)
        if v.goodness == MEAN:
            part = z_mean * pixels_z
        else:
            part = m2 * scale * scale + z_mean * z_mean * pixels_z
        sums += tl.sum(tl.where(m_j, part, 0.0), 2)
    size = channels.to(tl.float64) * pixels_z
    if v.goodness == SUM_SQ:
        size = size * 0.0 + 1.0
    g = (sums / size).to(tl.float32)
    tl.store(p_g + i_n * K + i_k, g, mask=m)
    return g, m, size.to(tl.float32)


@triton.jit
def store_weights(i_n, m, coef, p_coef, p_weight, p_gamma, p_work, p_offsets, C, K, width, factor,
                  v: tl.constexpr):
    """coef (R, B_K), and weight (N, C) = coef scale factor."""
    i_k = tl.arange(0, v.block_k)[None, :]
    tl.store(p_coef + i_n * K + i_k, coef, mask=m)
    first, channels = group_of(p_offsets, tl.minimum(i_k, K - 1), width)
    channels += tl.zeros(i_k.shape, tl.int32)
    for j0 in range(0, tl.max(channels), v.block_j):
        j = j0 + tl.arange(0, v.block_j)[None, None, :]
        m_j = m[:, :, None] & (j < channels[:, :, None])
        i_c = first[:, :, None] + j
        scale = tl.load(p_work + C + i_c, mask=m_j, other=0.0)
        if p_gamma is not None:
            scale *= tl.load(p_gamma + i_c, mask=m_j, other=0.0).to(tl.float64)
        weight = coef[:, :, None].to(tl.float64) * (scale * factor)
        tl.store(p_weight + i_n[:, :, None] * C + i_c, weight.to(tl.float32), mask=m_j)


@triton.jit
def row_stage(i_block, p_z, p_y, p_gamma, p_beta, p_work, p_offsets, p_weight, p_g, p_loss, p_coef,
              N, C, K, width, pixels_z, p0, p1, p2, loss_scale, factor, v: tl.constexpr):
    """g, loss, coef and weight of a block of rows (pairs n, n + N / 2 for symba)."""
    i_n = (i_block * v.rows + tl.arange(0, v.rows)[:, None]).to(tl.int64)
    if v.loss == losses.SYMBA:
        pairs = N // 2
        g_pos, m_pos, size = goodness_rows(i_n, pairs, p_z, p_gamma, p_beta, p_work, p_offsets, p_g,
                                           N, C, K, width, pixels_z, v)
        i_neg = tl.where(i_n < pairs, i_n + pairs, N)
        g_neg, m_neg, _size = goodness_rows(i_neg, N, p_z, p_gamma, p_beta, p_work, p_offsets, p_g,
                                            N, C, K, width, pixels_z, v)
        value, dg = losses.symba(g_pos, g_neg, p0)
        tl.store(p_loss + i_n, value, mask=i_n < pairs)
        coef = dg * loss_scale / size
        store_weights(i_n, m_pos, coef, p_coef, p_weight, p_gamma, p_work, p_offsets, C, K, width,
                      factor, v)
        store_weights(i_neg, m_neg, -coef, p_coef, p_weight, p_gamma, p_work, p_offsets, C, K,
                      width, factor, v)
    else:
        g, m, size = goodness_rows(i_n, N, p_z, p_gamma, p_beta, p_work, p_offsets, p_g, N, C, K,
                                   width, pixels_z, v)
        if p_y is not None:
            y = tl.load(p_y + i_n, mask=i_n < N, other=0).to(tl.int32)
            value, dg = losses.row_loss(g, y, m, K, p0, p1, p2, v.loss)
            tl.store(p_loss + i_n, value, mask=i_n < N)
            store_weights(i_n, m, dg * loss_scale / size, p_coef, p_weight, p_gamma, p_work,
                          p_offsets, C, K, width, factor, v)


@triton.jit
def group_of_channel(p_offsets, i_c, K, width, v: tl.constexpr):
    """The group of each channel, the last for channels beyond the map."""
    if p_offsets is None:
        i_k = tl.minimum(i_c // width, K - 1)
    else:
        i_k = i_c * 0  # the last k with offsets[k] <= c
        high = i_k + K - 1
        for _ in range(v.search):
            middle = (i_k + high + 1) // 2
            right = tl.load(p_offsets + middle) <= i_c
            i_k = tl.where(right, middle, i_k)
            high = tl.where(right, high, middle - 1)
    return i_k


@triton.jit
def answer_stage(i_block, p_z, p_gamma, p_beta, p_work, p_offsets, p_coef, p_table, p_dgamma,
                 p_dbeta, N, C, K, width, pixels, pixels_z, da_scale, v: tl.constexpr):
    """dgamma, dbeta and table rows 3 and 4 of a block of channels."""
    i_c = i_block * v.block_c + tl.arange(0, v.block_c)[None, :]
    m_c = i_c < C
    i_k = group_of_channel(p_offsets, i_c, K, width, v)
    along = tl.full([1, v.block_c], 0.0, tl.float64)
    beside = tl.full([1, v.block_c], 0.0, tl.float64)
    for n0 in range(0, N, v.block_n):
        i_n = n0 + tl.arange(0, v.block_n)[:, None].to(tl.int64)
        m = (i_n < N) & m_c
        centred, m2, scale, z_mean = normalised(p_z, p_gamma, p_beta, p_work, i_n, i_c, m, N, C)
        coef = tl.load(p_coef + i_n * K + i_k, mask=m, other=0.0).to(tl.float64)
        if v.goodness == MEAN:
            part = centred * coef * pixels_z
            own = coef * pixels_z
        else:
            # sum over pixels of z (p - mean) = scale M2 + pixels z_mean centred
            part = (centred * z_mean * pixels_z + m2 * scale) * coef * 2.0
            own = z_mean * coef * (2.0 * pixels_z)
        along += tl.sum(tl.where(m, part, 0.0), 0, keep_dims=True)
        beside += tl.sum(tl.where(m, own, 0.0), 0, keep_dims=True)
    rstd = tl.load(p_work + C + i_c, mask=m_c, other=0.0)
    if p_dgamma is not None:
        tl.store(p_dgamma + i_c, (along * rstd).to(tl.float32), mask=m_c)
        tl.store(p_dbeta + i_c, beside.to(tl.float32), mask=m_c)
    if v.training and not v.use_running:
        scale = rstd
        if p_gamma is not None:
            scale = rstd * tl.load(p_gamma + i_c, mask=m_c, other=0.0).to(tl.float64)
        answer = scale * (da_scale / (N.to(tl.float64) * pixels))
        slope = answer * rstd * rstd * along
        lost = tl.load(p_work + 2 * C + i_c, mask=m_c, other=0.0)
        tl.store(p_table + 3 * C + i_c, (answer * beside - slope * lost).to(tl.float32), mask=m_c)
        tl.store(p_table + 4 * C + i_c, slope.to(tl.float32), mask=m_c)


@triton.jit(do_not_specialize=["N"])
def batch_middle_kernel(p_moments, p_z, p_pivot, p_y, p_gamma, p_beta, p_mean, p_var, p_offsets,
                        p_table, p_weight, p_g, p_loss, p_coef, p_dgamma, p_dbeta, p_work, N, C, K,
                        width, pixels, pixels_z, momentum, eps, p0, p1, p2, loss_scale, da_scale,
                        factor, stage: tl.constexpr, v: tl.constexpr):
    """One stage, a block a program; or every stage, in one program.

    p_moments, p_z (2, N, C): of what is normalised and of what z is made of; factor: da_scale,
    twice that for squares.
    """
    if stage == CHANNELS:
        channel_stage(tl.program_id(0), p_moments, p_pivot, p_gamma, p_beta, p_mean, p_var, p_table,
                      p_work, N, C, pixels, momentum, eps, v)
    if stage == ROWS:
        row_stage(tl.program_id(0), p_z, p_y, p_gamma, p_beta, p_work, p_offsets, p_weight, p_g,
                  p_loss, p_coef, N, C, K, width, pixels_z, p0, p1, p2, loss_scale, factor, v)
    if stage == ANSWERS:
        answer_stage(tl.program_id(0), p_z, p_gamma, p_beta, p_work, p_offsets, p_coef, p_table,
                     p_dgamma, p_dbeta, N, C, K, width, pixels, pixels_z, da_scale, v)
    if stage == EVERY_STAGE:
        blocks = tl.cdiv(C, v.block_c)
        for i in range(blocks):
            channel_stage(i, p_moments, p_pivot, p_gamma, p_beta, p_mean, p_var, p_table, p_work, N,
                          C, pixels, momentum, eps, v)
        tl.debug_barrier()  # other threads read what these wrote
        for i in range(tl.cdiv(N, v.rows)):
            row_stage(i, p_z, p_y, p_gamma, p_beta, p_work, p_offsets, p_weight, p_g, p_loss,
                      p_coef, N, C, K, width, pixels_z, p0, p1, p2, loss_scale, factor, v)
        if p_y is not None:
            tl.debug_barrier()
            for i in range(blocks):
                answer_stage(i, p_z, p_gamma, p_beta, p_work, p_offsets, p_coef, p_table, p_dgamma,
                             p_dbeta, N, C, K, width, pixels, pixels_z, da_scale, v)


class Plan(NamedTuple):
    """What calls on layers of one form share."""

    stages: tuple[Form, ...]  # channels, rows, answers, all of them
    rows: int
    blocks: int
    numbers: tuple[int, ...]


def batch_middle(t: BatchPassTensors, call: BatchPassCall) -> None:
    """Run the phase; arguments as ffengine/ops/params.py lays them out."""
    assert t.moments is not None
    _, n, channels = t.moments.shape
    plan = make_plan(channels, call.groups, call.equal_groups, call.goodness, call.loss,
                     call.training, call.use_running, call.pixels, call.pixels_z,
                     tuple([x is None for x in t]))
    tensors = (t.moments, t.moments if t.extrema is None else t.extrema, t.pivot, t.y, t.gamma,
               t.beta, t.running_mean, t.running_var, None if call.equal_groups else t.offsets,
               t.table, t.weight, t.g, t.loss, t.coef, t.dgamma, t.dbeta, t.work)
    factor = call.da_scale * (1.0 if call.goodness == MEAN.value else 2.0)
    numbers = (n, *plan.numbers, call.momentum + 0.0, call.eps + 0.0, call.p0 + 0.0, call.p1 + 0.0,
               call.p2 + 0.0, call.scale + 0.0, call.da_scale + 0.0, factor)
    if n * channels <= ALONE:
        plan.stages[EVERY_STAGE.value].launch((1,), tensors, numbers)
        return
    rows = n // 2 if call.loss == losses.SYMBA.value else n
    plan.stages[CHANNELS.value].launch((plan.blocks,), tensors, numbers)
    plan.stages[ROWS.value].launch(grid("batch_pass", -(-rows // plan.rows)), tensors, numbers)
    if t.y is not None:
        plan.stages[ANSWERS.value].launch((plan.blocks,), tensors, numbers)


@functools.lru_cache(maxsize=4096)
def make_plan(channels: int, groups: int, equal: bool, goodness: int, loss: int, training: bool,
              use_running: bool, pixels: int, pixels_z: int, absent: tuple[bool, ...]) -> Plan:
    """The plan of (N, channels) moments; `absent`: which of BatchPassTensors a call has not."""
    block_k = power_of_two(groups)
    widest = channels // groups if equal else channels - groups + 1
    block_j = max(1, min(power_of_two(widest), TILE // block_k))
    rows = max(1, min(8, TILE // (block_k * block_j)))
    v = Variant(goodness, loss, training, use_running, 0 if equal else (groups - 1).bit_length(),
                block_k, block_j, rows, BLOCK_N, BLOCK_C)
    forms = [Form(batch_middle_kernel, stage=stage, v=v, warps=WARPS) for stage in range(3)]
    # all stages in one kernel: with more threads some compilers spill around fp64 division
    alone = Form(batch_middle_kernel, stage=EVERY_STAGE.value, v=v._replace(block_n=BLOCK_N // 2),
                 warps=WARPS // 2)
    return Plan((*forms, alone), rows, -(-channels // BLOCK_C),
                (channels, groups, channels // groups, pixels, pixels_z))
