"""Optimizer states and weights in bf16 or 8-bit codes, rounded stochastically.

Formats and random words: csrc/common/state_formats.h. bf16 travels as int16 patterns. Everything is
(block,), a program's elements in memory order.
"""

import triton
import triton.language as tl
from ffengine.kernels import philox

#: Elements that share a scale in 8 bits.
SCALED = tl.constexpr(256)
#: A code c > 0 of a magnitude stands for the fp32 bits (c + bias) << 20.
SIGNED_BIAS, UNSIGNED_BIAS = tl.constexpr(889), tl.constexpr(761)
#: xor-ed into the stream for the word of a bf16 weight.
WEIGHT_STREAM = tl.constexpr(0x40000000)


@triton.jit
def random_words(key, block: tl.constexpr):
    """A uint32 word an element; key = (seed low, seed high, stream, step)."""
    quad = tl.program_id(0).to(tl.int64) * (block // 4) + tl.arange(0, block // 4)
    return tl.reshape(philox.quads(quad, key), (block,))


@triton.jit
def load_bf16(p, i, b):
    return (tl.load(p + i, mask=b, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def store_bf16(p, i, b, x, random):
    """`random`: 16 bits an element. NaN and infinities stay what they are."""
    bits = x.to(tl.uint32, bitcast=True)
    rest = bits & 0x7FFFFFFF
    special = tl.where(rest > 0x7F800000, (bits >> 16) | 0x40, bits >> 16)
    code = tl.where(rest >= 0x7F800000, special, (bits + random) >> 16)
    tl.store(p + i, code.to(tl.uint16).to(tl.int16, bitcast=True), mask=b)


@triton.jit
def scale_rows(numel, block: tl.constexpr):
    """Indices of this program's scales, and which of them exist."""
    rows: tl.constexpr = block // SCALED
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    return row, row * SCALED < numel


@triton.jit
def spread(scale, block: tl.constexpr):
    """Each scale over its elements."""
    rows: tl.constexpr = block // SCALED
    return tl.reshape(tl.broadcast_to(scale[:, None], (rows, SCALED)), (block,))


@triton.jit
def load_codes(p, p_scale, i, b, numel, signed: tl.constexpr, block: tl.constexpr):
    row, exists = scale_rows(numel, block)
    scale = spread(tl.load(p_scale + row, mask=exists, other=0.0), block)
    code = tl.load(p + i, mask=b, other=0).to(tl.int32)
    if signed:
        magnitude = code & 127
        bits = tl.where(magnitude == 0, 0, (magnitude + SIGNED_BIAS) << 20) | ((code & 128) << 24)
    else:
        bits = tl.where(code == 0, 0, (code + UNSIGNED_BIAS) << 20)
    return bits.to(tl.float32, bitcast=True) * scale


@triton.jit
def store_codes(p, p_scale, i, b, x, random, numel, signed: tl.constexpr, block: tl.constexpr):
    """`x` is 0 beyond numel; the largest magnitude is found among bits, where a NaN wins."""
    bits = x.to(tl.int32, bitcast=True)
    rest = bits & 0x7FFFFFFF
    rows: tl.constexpr = block // SCALED
    largest = tl.max(tl.reshape(rest, (rows, SCALED)), axis=1)
    row, exists = scale_rows(numel, block)
    tl.store(p_scale + row, largest.to(tl.float32, bitcast=True), mask=exists)
    largest = spread(largest, block)
    coded = (largest > 0) & (largest < 0x7F800000)
    y = tl.div_rn(rest.to(tl.float32, bitcast=True), largest.to(tl.float32, bitcast=True))
    cut = (y.to(tl.int32, bitcast=True) + (random << 4).to(tl.int32)) >> 20
    if signed:
        code = tl.minimum(tl.maximum(cut - SIGNED_BIAS, 0), 127)
        code = tl.where(code == 0, 0, code | ((bits >> 24) & 128))
    else:
        code = tl.where(bits == 0, 0, tl.minimum(tl.maximum(cut - UNSIGNED_BIAS, 1), 255))
    tl.store(p + i, tl.where(coded, code, 0).to(tl.uint8), mask=b)
