"""Philox4x32-10 words and dropout masks with the counter layout that every back-end shares.

key = seed, counter = (i / 4 low, i / 4 high, layer, step), word i mod 4 decides element i, i its
logical NCHW index in the whole batch; kept iff word >= threshold. tl.rand's own counter layout
differs and would draw another mask.
"""

import triton
import triton.language as tl


def int32_patterns(*numbers: int) -> tuple[int, ...]:
    """The low 32 bits of each as the int32 a kernel takes."""
    return tuple(((n & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000 for n in numbers)


@triton.jit
def words(block, key):
    """The four uint32 words of the blocks i / 4 (int64, any shape).

    key = (seed low, seed high, layer, step, ...): 32-bit words passed as int32 patterns.
    """
    seed_lo, seed_hi, layer, step = key[0], key[1], key[2], key[3]
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
def quads(block, key):
    """(*block, 2, 2): those words, with word 2 i + j at (i, j)."""
    w0, w1, w2, w3 = words(block, key)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def keeps(i, drop):
    """Which elements i (int64) are kept, drop = (*key, threshold): a generator call an element."""
    w0, w1, w2, w3 = words(i >> 2, drop)
    lane = i & 3
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return word >= drop[4].to(tl.uint32, bitcast=True)


@triton.jit
def keeps_quads(block, drop, along_rows: tl.constexpr):
    """The masks of whole blocks of four: one generator call per four elements.

    block (R, Q): (R, 4 Q) when the four lie along the row, else (4 R, Q).
    """
    four = quads(block, drop)
    if along_rows:
        word = tl.reshape(four, (block.shape[0], 4 * block.shape[1]))
    else:
        word = tl.reshape(tl.permute(four, (0, 2, 3, 1)), (4 * block.shape[0], block.shape[1]))
    return word >= drop[4].to(tl.uint32, bitcast=True)
