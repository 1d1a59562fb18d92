"""Launch choice of `local_pass`: a pure function of shape and dtype, never of the batch."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

#: (largest element size, elements of a tile). A tile of 128 threads holds 16 fp32 or 32 16-bit
#: elements a thread, four 16-byte loads in flight each, in under 64 registers (no spills on
#: sm_80 to sm_100, tests/kernels/test_aot_triton.py). Not timed on a GPU yet.
TILE = ((2, 4096), (4, 2048))
#: Dropout keeps four generator words an element in flight: half the tile. A pooled position is a
#: window of four elements: a quarter (a whole tile took 252 registers on sm_90).
DROPOUT_TILE_DIVISOR, POOL_TILE_DIVISOR = 2, 4
#: Tiles a program sweeps: 4 keeps the merge of partial moments short (K = 1, 100 k elements: 13
#: splits) while a micro-batch of one sample and ten groups still makes tens of programs.
TILES_PER_SPLIT = 4
#: NHWC tiles: channels a row; wider groups are swept in several steps.
MAX_BLOCK_CHANNELS = 128
#: Goodness entries a `finish` program handles at once, so that small K fills a warp; above it a
#: warp more per 128 groups, up to 8 (K = 4096 then stays under 128 registers on sm_80).
FINISH_ENTRIES = 128


class Variant(NamedTuple):
    """Compile-time choices of a kernel; fields a kernel does not read are set to one value."""

    goodness: int
    norm: int
    norm_rms: bool
    norm_per_group: bool
    straight_through: bool
    pool: bool
    channels_last: bool
    loss: int
    dropout: bool
    quads: bool  # dropout words are drawn four elements at a time
    align: int  # elements: every group of every row starts and ends at a multiple of it
    block_outer: int
    block_inner: int
    block_k: int
    rows: int


@dataclass(frozen=True)
class Launch:
    """How one shape is swept."""

    block_outer: int  # NHWC: pixels a tile; else 1
    block_inner: int  # NHWC: channels a tile; else elements of the flat group
    span: int  # outer (NHWC) or inner positions a program sweeps
    splits: int  # programs a group, first sweep
    apply_splits: int  # second sweep: its windows include the ones a floor-mode pool leaves out
    warps: int
    pixels: int  # of z
    align: int
    quads: bool
    block_k: int
    rows: int  # goodness rows a `finish` program
    finish_warps: int


@functools.lru_cache(maxsize=4096)
def plan_launch(channels: int, height: int, width: int, groups: int, *, equal: bool,
                channels_last: bool, pool: bool, itemsize: int, dropout: bool) -> Launch:
    """The launch of a (*, channels, height, width) map in `groups` groups."""
    pixels = (height // 2) * (width // 2) if pool else height * width
    windows = -(-height // 2) * -(-width // 2) if pool else pixels
    # the widths of unequal groups live on the device: plan for the widest there can be
    widest = channels // groups if equal else channels - groups + 1
    tile = next(t for size, t in TILE if itemsize <= size)
    tile //= DROPOUT_TILE_DIVISOR if dropout else 1
    tile //= POOL_TILE_DIVISOR if pool else 1
    if channels_last:
        typical = -(-channels // groups)
        block_inner = min(power_of_two(typical), MAX_BLOCK_CHANNELS)
        block_outer = min(power_of_two(windows), max(tile // block_inner, 4))
        length, window_length, block = pixels, windows, block_outer
        tiles = max(1, TILES_PER_SPLIT // -(-typical // block_inner))
    else:
        length, window_length = widest * pixels, widest * windows
        block_outer, block_inner = 1, min(power_of_two(window_length), tile)
        block, tiles = block_inner, TILES_PER_SPLIT
    span = block * tiles
    align = alignment(channels, height * width, widest if equal else 1, channels_last, pool)
    block_k = power_of_two(groups)
    return Launch(
        block_outer=block_outer, block_inner=block_inner, span=span,
        splits=-(-length // span), apply_splits=-(-window_length // span),
        warps=warps_for(block_outer * block_inner * (4 if pool else 1)), pixels=pixels, align=align,
        quads=dropout and draws_quads(height * width, channels_last, pool, align, block),
        block_k=block_k, rows=max(1, FINISH_ENTRIES // block_k),
        finish_warps=max(1, min(8, block_k // 128)))


def alignment(channels: int, pixels: int, width: int, channels_last: bool, pool: bool) -> int:
    """Largest power of two up to 16 that divides every group's first offset and size."""
    if channels_last:
        return math.gcd(channels, width, 16)
    if pool:
        return 1  # neighbouring windows are two elements apart: nothing to vectorise
    return math.gcd(channels * pixels, width * pixels, 16)


def draws_quads(pixels: int, channels_last: bool, pool: bool, align: int, block: int) -> bool:
    """Tiles start at multiples of four logical elements and hold whole quads."""
    if pool or block < 4:
        return False
    return pixels % 4 == 0 if channels_last else align % 4 == 0


def warps_for(elements: int) -> int:
    """Sixteen elements a thread, one to four warps."""
    return max(1, min(4, elements // 512))


def power_of_two(x: int) -> int:
    """The smallest power of two that is at least x."""
    return 1 << max(0, x - 1).bit_length()


def scratch_bytes(n: int, groups: int, launch: Launch) -> int:
    """Bytes of partial moments beside the (N, K, 2) statistics: none for groups of one split."""
    return 0 if launch.splits == 1 else 4 * 3 * n * groups * launch.splits
