"""Launch choice of `local_pass`: a pure function of shape and dtype, never of the batch."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

#: (largest element size, elements of a tile). A tile of 128 threads holds 16 fp32 or 32 16-bit
#: elements a thread, four 16-byte loads in flight each, in under 128 registers (no spills on
#: sm_80 to sm_100, tests/kernels/test_aot_triton.py). Not timed on a GPU yet.
TILE = ((2, 4096), (4, 2048))
#: Dropout keeps four generator words an element in flight: half the tile. A pooled position is a
#: window of four elements: a quarter (a whole tile took 252 registers on sm_90).
DROPOUT_TILE_DIVISOR, POOL_TILE_DIVISOR = 2, 4
#: Programs a sample (NCHW: a group) is split into, so that a micro-batch of one sample still makes
#: tens of programs: this many where a program's tiles stay at most TILES_PER_SPLIT, and never more
#: than MAX_SPLITS, because another kernel merges their moments.
SPLITS, TILES_PER_SPLIT, MAX_SPLITS = 8, 4, 32
#: NHWC: columns of a tile, at least a warp's 16-byte loads in fp32, at most eight a thread, whose
#: moments live in registers (sixteen took 141 on sm_90). Predicted for an H100, 128 × 100 × 32 × 32
#: bf16 in 10 groups: 32 µs or less (79 MB moved, 26 MB more from L2), 70 by single groups.
MIN_COLUMNS, MAX_COLUMNS = 128, 1024
#: Entries a warp of the table (groups, columns of a group) from which an NHWC program forms its
#: groups: four a thread (sixteen took 154 registers on sm_90, eight spilled two in one variant).
GATHERED = 128
#: Goodness entries a `finish` program handles at once, so that small K fills a warp, and parts of
#: each: two moments a thread, up to 8 warps (K = 4096 then stays under 128 registers on sm_80).
FINISH_ENTRIES, FINISH_PARTS, FINISH_MOMENTS = 64, 8, 64
#: Programs of a grid's x. Its y and z end at 65,535, so no kernel uses them.
MAX_PROGRAMS = 2**31 - 1
#: Offsets inside a sample are 32-bit.
MAX_SAMPLE = 2**30

#: Arguments that change from call to call and so must stay out of the compile key.
BATCH_ARGS = ("N", "seed_lo", "seed_hi", "layer", "step", "threshold", "start", "half",
              "half_start")


class Variant(NamedTuple):
    """Compile-time choices of a sweep; fields a kernel does not read are set to one value."""

    mean_goodness: bool
    straight_through: bool
    pool: bool
    dropout: bool
    quads: bool  # dropout words are drawn four elements at a time
    align: int  # elements: every run or row of a, da and dense z starts and ends at a multiple
    slice_z: bool  # NHWC: z's pixels are further apart than a's
    align_c: int  # NHWC, many: of a pixel
    align_z: int  # NHWC: of z_channels
    bytes_z: int  # every run or row of z starts at a multiple
    block_outer: int
    block_inner: int
    many: bool  # NHWC: a row is several pixels
    block_g: int  # NHWC: groups formed at once ...
    block_b: int  # ... from so many columns each
    search: int  # NHWC: steps in which a channel finds its group among unequal ones


class FinishVariant(NamedTuple):
    """Compile-time choices of the kernel between the sweeps."""

    goodness: int
    norm: int
    norm_rms: bool
    norm_per_group: bool
    loss: int
    channels_last: bool
    block_k: int
    block_s: int
    rows: int


@dataclass(frozen=True)
class Launch:
    """How one shape is swept."""

    block_outer: int  # NHWC: rows a tile; else 1
    block_inner: int  # NHWC: columns a tile; else elements of a run
    row_pixels: int  # NHWC: pixels a row; else 1
    chunks: int  # NHWC: programs side by side where a pixel is wider than a tile; else 1
    span: int  # rows (NHWC) or elements of a run that a program sweeps
    splits: int  # programs a sample (NHWC) or group, first sweep
    apply_splits: int  # second sweep: its windows include the ones a floor-mode pool leaves out
    warps: int
    pixels: int  # of z
    align: int
    quads: bool
    block_g: int
    block_b: int
    block_k: int
    block_s: int  # parts whose moments a `finish` program merges at once
    rows: int  # goodness rows a `finish` program
    finish_warps: int

    @property
    def parts(self) -> int:
        """Moments of a group that are merged."""
        return self.splits * self.chunks


class Sweep(NamedTuple):
    """The part of a launch that depends on the layout."""

    block_outer: int
    block_inner: int
    row_pixels: int
    chunks: int
    length: int  # rows (NHWC) or elements of the widest run, first sweep
    apply_length: int
    align: int
    block_b: int


@functools.lru_cache(maxsize=4096)
def plan_launch(channels: int, height: int, width: int, groups: int, *, equal: bool,
                channels_last: bool, pool: bool, itemsize: int, dropout: bool) -> Launch:
    """The launch of a (*, channels, height, width) map in `groups` groups."""
    if channels * height * width >= MAX_SAMPLE:
        raise ValueError(f"[local_pass] expected under 2^30 elements a sample, got "
                         f"{channels * height * width}")
    pixels = (height // 2) * (width // 2) if pool else height * width
    windows = -(-height // 2) * -(-width // 2) if pool else pixels
    # the widths of unequal groups live on the device: plan for the widest there can be
    widest = channels // groups if equal else channels - groups + 1
    tile = next(t for size, t in TILE if itemsize <= size)
    tile //= DROPOUT_TILE_DIVISOR if dropout else 1
    tile //= POOL_TILE_DIVISOR if pool else 1
    quads = dropout and not pool and height * width % 4 == 0
    if channels_last:
        sweep = plan_rows(channels, pixels, windows, widest, tile, 16 // itemsize,
                          one=pool or quads)
        quads = quads and sweep.block_outer >= 4
    else:
        sweep = plan_runs(channels, pixels, windows, widest if equal else 1, widest, tile, pool)
        quads = quads and sweep.align % 4 == 0 and sweep.block_inner >= 4
    block = sweep.block_outer if channels_last else sweep.block_inner
    span = block * tiles_per_split(-(-sweep.length // block))
    block_k = power_of_two(groups)
    splits = -(-sweep.length // span)
    rows = max(1, FINISH_ENTRIES // block_k)
    block_s = max(1, min(power_of_two(splits * sweep.chunks), FINISH_PARTS,
                         FINISH_ENTRIES * FINISH_PARTS // (rows * block_k)))
    warps = warps_for(sweep.block_outer * sweep.block_inner * (4 if pool else 1))
    return Launch(
        block_outer=sweep.block_outer, block_inner=sweep.block_inner, row_pixels=sweep.row_pixels,
        chunks=sweep.chunks, span=span, splits=splits, apply_splits=-(-sweep.apply_length // span),
        warps=warps, pixels=pixels, align=sweep.align, quads=quads,
        block_g=max(1, min(block_k, GATHERED * warps // sweep.block_b)), block_b=sweep.block_b,
        block_k=block_k, block_s=block_s, rows=rows,
        finish_warps=max(1, min(8, max(rows * block_k * block_s // FINISH_MOMENTS,
                                       block_k // 128))))


def plan_runs(channels: int, pixels: int, windows: int, width: int, widest: int, tile: int,
              pool: bool) -> Sweep:
    """NCHW: a group of a sample is one run; `width`: of every group, 1 if they differ."""
    # neighbouring windows are two elements apart: nothing to vectorise
    align = 1 if pool else math.gcd(channels * pixels, width * pixels, 16)
    return Sweep(1, min(power_of_two(widest * windows), tile), 1, 1, widest * pixels,
                 widest * windows, align, 1)


def plan_rows(channels: int, pixels: int, windows: int, widest: int, tile: int, vector: int, *,
              one: bool) -> Sweep:
    """NHWC: rows of pixels in tiles, 16-byte vectors first, then fewest idle columns, of which a
    sixteenth is worth a chunk less: a chunk more is a part more to merge.

    vector: elements of 16 bytes; one: a row is one pixel.
    """
    # several rows a tile, four for quads
    most = max(MIN_COLUMNS, min(MAX_COLUMNS, tile // (4 if one else 2)))
    found = []
    for block in (1 << b for b in range(MIN_COLUMNS.bit_length() - 1, most.bit_length())):
        for per_row in range(1, 2 if one else max(2, min(block // channels, pixels) + 1)):
            chunks = -(-channels // block)
            lanes = -(-pixels // per_row) * chunks * block * (16 + chunks)
            align = math.gcd(per_row * channels, channels * pixels, 16)
            found.append((-min(align, vector), lanes, block, per_row, chunks, align))
    _, _, block, per_row, chunks, align = min(found)
    rows, apply_rows = -(-pixels // per_row), -(-windows // per_row)
    return Sweep(min(power_of_two(apply_rows), tile // block), block, per_row, chunks, rows,
                 apply_rows, align, min(power_of_two(per_row * widest), block))


def tiles_per_split(tiles: int) -> int:
    """How many of a sample's (or group's) tiles a program sweeps."""
    return max(1, min(TILES_PER_SPLIT, -(-tiles // SPLITS)), -(-tiles // MAX_SPLITS))


def warps_for(elements: int) -> int:
    """Sixteen elements a thread, one to four warps."""
    return max(1, min(4, elements // 512))


def power_of_two(x: int) -> int:
    """The smallest power of two that is at least x."""
    return 1 << max(0, x - 1).bit_length()


def scratch_bytes(n: int, groups: int, launch: Launch, squares: bool) -> int:
    """Bytes of partial moments, and sums where the goodness is of squares; those of a single part
    lie in the (N, K, 2) statistics and in g."""
    return 0 if launch.parts == 1 else 4 * (2 + squares) * n * groups * launch.parts


def grid(op: str, *programs: int) -> tuple[int]:
    """A grid of so many programs, x alone."""
    total = math.prod(programs)
    if total > MAX_PROGRAMS:
        raise ValueError(f"[{op}] expected at most 2^31 - 1 programs, got {total}: give the batch "
                         "in smaller tiles")
    return (total,)
