"""`batch_pass` in Triton: the two sweeps of BatchNorm, and those of peer normalisation.

stats        one program per (n, block of channels): mean and M2 of every channel    reads a
apply        one program per (n, block of channels, split): z and da     reads a, writes z, da
peer_stats   one program per block of channels: mean of h over the positive rows     reads a
peer_apply   one program per block of positive rows and channels         reads a, updates da

Between stats and apply stands kernels/batch_middle.py. Tiles are (channels, positions), a
position being a pixel, or a 2x2 window. No atomics; a row's numbers depend on no other row.

reference: ffengine/reference/batch_pass.py   op: ffengine/ops/batch_pass.py
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from ffengine.kernels.batch_middle import batch_middle
from ffengine.kernels.forms import Form, on_device_of
from ffengine.kernels.launch import grid, power_of_two
from ffengine.kernels.tile import aligned

if TYPE_CHECKING:
    from ffengine.ops.params import BatchPassCall, BatchPassTensors

PHASE_STATS, PHASE_APPLY, PHASE_PEER_STATS, PHASE_MIDDLE = 0, 1, 2, 4
#: Elements of a tile by element size, a window counting as four, at sixteen a thread: under 128
#: registers on sm_80 to sm_100 (tests/kernels/test_aot_batch_pass.py). Not timed on a GPU yet.
TILE = {2: 4096, 4: 2048}
#: A tile of one pixel holds every number of its channels' table: four elements a thread.
LINEAR_TILE, LINEAR_WARPS = 512, 4
#: Channels a tile where they are innermost: 128 bytes of bf16, a whole sector line each pixel.
MAX_CHANNELS = 64
#: Tiles an apply program sweeps.
TILES_PER_SPLIT = 4


class Variant(NamedTuple):
    """Compile-time choices of a kernel."""

    channels_last: bool
    pool: bool
    norm_first: bool
    squares: bool
    straight_through: bool
    align: int  # elements: every row of innermost elements starts at a multiple of it
    block_c: int
    block_q: int


@triton.jit
def relu(a):
    """A NaN stays, which tl.maximum would drop."""
    return tl.where(a <= 0.0, 0.0, a)


@triton.jit
def passing(a, v: tl.constexpr):
    """dh/da as a factor, so that a NaN gradient stays one."""
    if v.straight_through:
        return tl.full(a.shape, 1.0, tl.float32)
    return tl.where(a > 0.0, 1.0, 0.0)


@triton.jit
def element(base, i_c, y, x, C, H, W, v: tl.constexpr):
    """Offset of channel i_c (B_C, 1), pixel (y, x) (1, B_Q) of a map H x W."""
    if v.channels_last:
        return base + (y * W + x) * aligned(C, v) + i_c
    if v.pool:
        return base + i_c * (H * W) + y * W + x
    return base + i_c * aligned(H * W, v) + x


@triton.jit
def place(i_q, cols, v: tl.constexpr):
    """(y, x) of positions i_q (1, B_Q) of a map `cols` wide; NCHW: (0, i_q) of a flat one."""
    if v.pool:
        return i_q // cols, i_q % cols
    return i_q * 0, i_q


@triton.jit
def merged(count, mean, m2, h, m, n):
    """Moments per row of h (B_C, B_Q) with n valid columns, merged into the given ones."""
    tile_mean = tl.sum(h, 1) / n
    centred = tl.where(m, h - tile_mean[:, None], 0.0)
    delta = tile_mean - mean
    share = n / (count + n)
    m2 += tl.sum(centred * centred, 1) + delta * delta * (count * share)
    return count + n, mean + delta * share, m2


@triton.jit
def window(p_a, base, i_c, row, col, m, direction, C, H, W, v: tl.constexpr):
    """(winning h, its number) of windows: the first that maximises direction h, the last NaN."""
    h = relu(tl.load(p_a + element(base, i_c, 2 * row, 2 * col, C, H, W, v), mask=m,
                     other=0.0).to(tl.float32))
    winner = tl.zeros(h.shape, tl.int32)
    key = direction * h
    for q in tl.static_range(1, 4):
        at = element(base, i_c, 2 * row + q // 2, 2 * col + q % 2, C, H, W, v)
        other = relu(tl.load(p_a + at, mask=m, other=0.0).to(tl.float32))
        other_key = direction * other
        wins = (other_key > key) | (other_key != other_key)
        h = tl.where(wins, other, h)
        key = tl.where(wins, other_key, key)
        winner = tl.where(wins, q, winner)
    return h, winner


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, 0.0) - tl.where(x < 0.0, 1.0, 0.0)


@triton.jit(do_not_specialize=["N"])
def batch_stats_kernel(p_a, p_gamma, p_pivot, p_moments, p_extrema, N, C, H, W, v: tl.constexpr,
                 flat: tl.constexpr):
    """moments, extrema (2, N, C): mean, from the pivots (C,), and centred M2 of h, or of its
    windows' winners.

    `flat` is v without the pool: it sweeps every pixel.
    """
    blocks = tl.cdiv(C, v.block_c)
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    i_c = tl.program_id(0) % blocks * v.block_c + tl.arange(0, v.block_c)
    m_c = i_c < C
    base = i_n * C * (H * W)
    base_flat = aligned(base, flat)
    o_out = i_n * C + i_c
    plane = N.to(tl.int64) * C
    pivot = tl.load(p_pivot + i_c, mask=m_c, other=0.0)[:, None]
    zero = tl.full([v.block_c], 0.0, tl.float32)  # tl.zeros takes no field of v in triton 3.6
    rows = H // 2
    cols = W // 2
    if not v.pool or v.norm_first:
        count, mean, m2 = 0.0, zero, zero
        for q0 in range(0, H * W, v.block_q):
            i_q = q0 + tl.arange(0, v.block_q)[None, :]
            m = m_c[:, None] & (i_q < H * W)
            y, x = place(i_q, W, flat)
            at = element(base_flat, i_c[:, None], y, x, C, H, W, flat)
            h = relu(tl.load(p_a + at, mask=m, other=0.0).to(tl.float32))
            n = tl.minimum(H * W - q0, v.block_q).to(tl.float32)
            count, mean, m2 = merged(count, mean, m2, tl.where(m, h - pivot, 0.0), m, n)
        tl.store(p_moments + o_out, mean, mask=m_c)
        tl.store(p_moments + plane + o_out, m2, mask=m_c)
    if v.pool:
        direction = tl.full([v.block_c], 1.0, tl.float32)
        if v.norm_first and p_gamma is not None:
            direction = sign(tl.load(p_gamma + i_c, mask=m_c, other=1.0))
        count, mean, m2 = 0.0, zero, zero
        for q0 in range(0, rows * cols, v.block_q):
            i_q = q0 + tl.arange(0, v.block_q)[None, :]
            m = m_c[:, None] & (i_q < rows * cols)
            row, col = place(i_q, cols, v)
            h, _winner = window(p_a, base, i_c[:, None], row, col, m, direction[:, None], C, H, W,
                                v)
            n = tl.minimum(rows * cols - q0, v.block_q).to(tl.float32)
            count, mean, m2 = merged(count, mean, m2, tl.where(m, h - pivot, 0.0), m, n)
        p_out = p_extrema if v.norm_first else p_moments
        tl.store(p_out + o_out, mean, mask=m_c)
        tl.store(p_out + plane + o_out, m2, mask=m_c)


@triton.jit
def entry(p_table, i, i_c, m_c, C):
    """Row i of the table (5, C) at the program's channels, (B_C, 1)."""
    return tl.load(p_table + i * C + i_c, mask=m_c, other=0.0)[:, None]


@triton.jit
def batch_apply_kernel(p_a, p_table, p_weight, p_z, p_da, C, H, W, span, splits, v: tl.constexpr):
    """z = (p - mean) scale + shift and da from
    dL/dp = weight (1 | z) - constant - slope (p - mean), p = h, pooled or not."""
    blocks = tl.cdiv(C, v.block_c)
    i_s = tl.program_id(0) % splits
    i_block = tl.program_id(0) // splits
    i_n = (i_block // blocks).to(tl.int64)
    i_c = i_block % blocks * v.block_c + tl.arange(0, v.block_c)
    m_c = i_c < C
    base = aligned(i_n * C * (H * W), v)
    mean = entry(p_table, 0, i_c, m_c, C)
    scale = entry(p_table, 1, i_c, m_c, C)
    shift = entry(p_table, 2, i_c, m_c, C)
    constant, slope, weight = 0.0, 0.0, 0.0
    if p_da is not None:
        constant = entry(p_table, 3, i_c, m_c, C)
        slope = entry(p_table, 4, i_c, m_c, C)
        weight = tl.load(p_weight + i_n * C + i_c, mask=m_c, other=0.0)[:, None]
    cols = tl.cdiv(W, 2) if v.pool else W
    positions = tl.cdiv(H, 2) * cols if v.pool else H * W
    start = i_s * span
    for q0 in range(start, tl.minimum(start + span, positions), v.block_q):
        i_q = q0 + tl.arange(0, v.block_q)[None, :]
        m = m_c[:, None] & (i_q < positions)
        y, x = place(i_q, cols, v)
        if v.pool:
            whole = m & (y < H // 2) & (x < W // 2)
            direction = sign(scale) if v.norm_first else scale * 0.0 + 1.0
            h, winner = window(p_a, base, i_c[:, None], y, x, whole, direction, C, H, W, v)
            u = (h - mean) * scale + shift
            own = weight * u if v.squares else weight + u * 0.0
            if p_da is not None:
                for q in tl.static_range(4):
                    y_q = 2 * y + q // 2
                    x_q = 2 * x + q % 2
                    inside = m & (y_q < H) & (x_q < W)
                    at = element(base, i_c[:, None], y_q, x_q, C, H, W, v)
                    a = tl.load(p_a + at, mask=inside, other=0.0).to(tl.float32)
                    d = tl.where(whole & (winner == q), own, 0.0)
                    answer = constant + slope * (relu(a) - mean)
                    if v.norm_first:
                        d -= answer
                    else:
                        d = tl.where(whole & (winner == q), d - answer, 0.0)
                    tl.store(p_da + at, d * passing(a, v), mask=inside)
            if p_z is not None:
                base_z = i_n * C * ((H // 2) * (W // 2))
                at_z = element(base_z, i_c[:, None], y, x, C, H // 2, W // 2, v)
                tl.store(p_z + at_z, u, mask=whole)
        else:
            at = element(base, i_c[:, None], y, x, C, H, W, v)
            a = tl.load(p_a + at, mask=m, other=0.0).to(tl.float32)
            centred = relu(a) - mean
            u = centred * scale + shift
            if p_da is not None:
                d = (weight * u if v.squares else weight) - constant - slope * centred
                tl.store(p_da + at, d * passing(a, v), mask=m)
            if p_z is not None:
                tl.store(p_z + at, u, mask=m)


@triton.jit(do_not_specialize=["N"])
def peer_stats_kernel(p_a, p_y, p_mean, N, C, align: tl.constexpr, block_n: tl.constexpr,
                      block_c: tl.constexpr):
    """mean (C,) of h over the rows with y = 1; NaN without any."""
    i_c = tl.program_id(0) * block_c + tl.arange(0, block_c)[None, :]
    total = tl.zeros([1, block_c], tl.float32)
    rows = 0.0
    for n0 in range(0, N, block_n):
        i_n = n0 + tl.arange(0, block_n)[:, None].to(tl.int64)
        positive = tl.load(p_y + i_n, mask=i_n < N, other=0) == 1
        rows += tl.sum(positive.to(tl.float32))
        at = i_n * (C // align * align) + i_c
        a = tl.load(p_a + at, mask=positive & (i_c < C), other=0.0).to(tl.float32)
        total += tl.sum(relu(a), 0)[None, :]
    tl.store(p_mean + i_c, total / rows, mask=i_c < C)


@triton.jit(do_not_specialize=["N"])
def peer_apply_kernel(p_a, p_y, p_answer, p_da, N, C, straight_through: tl.constexpr,
                      align: tl.constexpr, block_n: tl.constexpr, block_c: tl.constexpr):
    """da += answer (C,) dh/da on the rows with y = 1."""
    blocks = tl.cdiv(C, block_c)
    i_n = tl.program_id(0) // blocks * block_n + tl.arange(0, block_n)[:, None].to(tl.int64)
    i_c = tl.program_id(0) % blocks * block_c + tl.arange(0, block_c)[None, :]
    positive = tl.load(p_y + i_n, mask=i_n < N, other=0) == 1
    m = positive & (i_c < C)
    answer = tl.load(p_answer + i_c, mask=i_c < C, other=0.0)
    at = i_n * (C // align * align) + i_c
    a = tl.load(p_a + at, mask=m, other=0.0).to(tl.float32)
    if not straight_through:
        answer = answer * tl.where(a > 0.0, 1.0, 0.0)
    da = tl.load(p_da + at, mask=m, other=0.0).to(tl.float32)
    tl.store(p_da + at, da + answer, mask=m)


class Launch(NamedTuple):
    """How one shape is swept."""

    block_c: int
    block_q: int
    span: int  # positions an apply program sweeps
    splits: int
    align: int
    warps: int


@functools.lru_cache(maxsize=4096)
def plan_launch(channels: int, height: int, width: int, *, channels_last: bool, pool: bool,
                itemsize: int) -> Launch:
    """The launch of a (*, channels, height, width) map, whatever the batch."""
    tile = TILE[itemsize] // (4 if pool else 1)
    pixels = height * width
    positions = -(-height // 2) * -(-width // 2) if pool else pixels
    if channels_last or pixels == 1:
        widest = MAX_CHANNELS if pixels > 1 else LINEAR_TILE
        block_c = min(power_of_two(channels), widest, tile)
        block_q = min(power_of_two(positions), tile // block_c)
        align = math.gcd(channels, 16)
    else:
        block_q = min(power_of_two(positions), tile)
        block_c = min(power_of_two(channels), tile // block_q)
        align = 1 if pool else math.gcd(pixels, 16)
    span = block_q * TILES_PER_SPLIT
    return Launch(block_c, block_q, span, -(-positions // span), align,
                  LINEAR_WARPS if pixels == 1 else
                  max(1, min(8, block_c * block_q * (4 if pool else 1) // 512)))


class Plan(NamedTuple):
    """What calls on maps of one form share."""

    stats: Form
    apply: Form
    programs: int  # a sample: of the first sweep ...
    apply_programs: int  # ... and the second
    geometry: tuple[int, ...]
    apply_geometry: tuple[int, ...]


def batch_pass(tensors: BatchPassTensors, call: BatchPassCall) -> None:
    """Run one phase; arguments as ffengine/ops/params.py lays them out."""
    with on_device_of(tensors.a):
        if call.phase in (PHASE_STATS, PHASE_APPLY):
            _sweep(tensors, call)
        elif call.phase == PHASE_MIDDLE:
            batch_middle(tensors, call)
        else:
            _peer(tensors, call)


def _sweep(t: BatchPassTensors, call: BatchPassCall) -> None:
    n = t.a.shape[0]
    plan = make_plan(t.a.shape[1:], t.a.dtype, call.channels_last, call.pool, call.norm_first,
                     call.squares, call.straight_through, tuple([x is None for x in t]))
    if call.phase == PHASE_STATS:
        gamma = t.gamma if call.norm_first and call.pool else None
        plan.stats.launch(grid("batch_pass", n, plan.programs),
                          (t.a, gamma, t.table, t.moments, t.extrema), (n, *plan.geometry))
    else:
        plan.apply.launch(grid("batch_pass", n, plan.apply_programs),
                          (t.a, t.table, t.weight, t.z, t.da), plan.apply_geometry)


@functools.lru_cache(maxsize=4096)
def make_plan(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, pool: bool,
              norm_first: bool, squares: bool, straight_through: bool,
              absent: tuple[bool, ...]) -> Plan:
    """The plan of maps (N, *shape); `absent`: which of BatchPassTensors a call has not."""
    channels, *spatial = shape
    height, width = spatial if len(spatial) == 2 else (1, math.prod(spatial))
    inner = channels_last or height * width == 1
    launch = plan_launch(channels, height, width, channels_last=inner, pool=pool,
                         itemsize=dtype.itemsize)
    v = Variant(inner, pool, norm_first and pool, squares, straight_through, launch.align,
                launch.block_c, launch.block_q)
    first = v._replace(squares=False, straight_through=False)
    blocks = -(-channels // launch.block_c)
    return Plan(
        Form(batch_stats_kernel, v=first, flat=first._replace(pool=False), warps=launch.warps),
        Form(batch_apply_kernel, v=v, warps=launch.warps), blocks, blocks * launch.splits,
        (channels, height, width), (channels, height, width, launch.span, launch.splits))


def _peer(t: BatchPassTensors, call: BatchPassCall) -> None:
    n, channels = t.a.shape
    stats, apply, block_n, blocks = _peer_forms(channels, t.a.dtype, call.straight_through)
    if call.phase == PHASE_PEER_STATS:
        stats.launch((blocks,), (t.a, t.y, t.moments), (n, channels))
    else:
        apply.launch(grid("batch_pass", -(-n // block_n), blocks), (t.a, t.y, t.table, t.da),
                     (n, channels))


@functools.lru_cache(maxsize=4096)
def _peer_forms(channels: int, dtype: torch.dtype,
                straight_through: bool) -> tuple[Form, Form, int, int]:
    """Both kernels, rows and blocks of channels of a program of the second."""
    tile = TILE[dtype.itemsize]
    block_c = min(power_of_two(channels), 64)
    shared = {"align": math.gcd(channels, 16), "block_n": tile // block_c, "block_c": block_c,
              "warps": tile // 512}
    return (Form(peer_stats_kernel, **shared),
            Form(peer_apply_kernel, straight_through=straight_through, **shared),
            tile // block_c, -(-channels // block_c))
