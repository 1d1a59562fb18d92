"""Philox4x32-10 dropout masks with the counter layout that every back-end shares.

key = seed, counter = (i / 4 low, i / 4 high, layer, step), word i mod 4 decides element i, i its
logical NCHW index in the whole batch; kept iff word >= threshold. tl.rand's own counter layout
differs and would draw another mask.
"""

import triton
import triton.language as tl


@triton.jit
def words(block, drop):
    """The four uint32 words of the blocks i / 4 (int64, any shape).

    drop = (seed low, seed high, layer, step, threshold): 32-bit words passed as int32 patterns.
    """
    seed_lo, seed_hi, layer, step, _threshold = drop
    zero = (block * 0).to(tl.uint32)
    return tl.philox_impl(
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32),
        zero + layer.to(tl.uint32, bitcast=True),
        zero + step.to(tl.uint32, bitcast=True),
        seed_lo.to(tl.uint32, bitcast=True),
        seed_hi.to(tl.uint32, bitcast=True),
        10,
    )


@triton.jit
def keeps(i, drop):
    """Which elements i (int64) are kept: one generator call an element."""
    w0, w1, w2, w3 = words(i >> 2, drop)
    lane = i & 3
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return word >= drop[4].to(tl.uint32, bitcast=True)


@triton.jit
def keeps_quads(block, drop, along_rows: tl.constexpr):
    """The masks of whole blocks of four: one generator call per four elements.

    block (R, Q): (R, 4 Q) when the four lie along the row, else (4 R, Q).
    """
    w0, w1, w2, w3 = words(block, drop)
    # (R, Q, 2, 2) with element (i, j) = word 2 i + j
    four = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    if along_rows:
        word = tl.reshape(four, (block.shape[0], 4 * block.shape[1]))
    else:
        word = tl.reshape(tl.permute(four, (0, 2, 3, 1)), (4 * block.shape[0], block.shape[1]))
    return word >= drop[4].to(tl.uint32, bitcast=True)
