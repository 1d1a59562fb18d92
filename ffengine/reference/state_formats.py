"""Optimizer states and weights in fewer bits, in plain PyTorch: the definition of correct.

bf16: the upper half of fp32. 8 bits: blocks of BLOCK values in memory order share an fp32 scale,
their largest magnitude, and a code holds the exponent and three bits of mantissa of |x| / scale
(dynamic-range codes as in Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022):

    m   sign and 127 magnitudes from 1.25 * 2^-16 to 1, and 0
    v   255 magnitudes from 1.25 * 2^-32 to 1; 0 for 0 alone, or a step divided by its root explodes

Encodings round stochastically between the numbers that there are: 16 random bits are added below
the last bit kept. What lies below the smallest of them does not: an m under 1.125 * 2^-16 of its
block's largest becomes 0 at every step, so that its element moves on the fresh gradient's share
alone (1 - beta1 of its fp32 pace, or less); a v under 1.25 * 2^-32 becomes that. Random bits are
Philox words: key = seed, counter = (i / 4 low, i / 4 high, stream, step), word i mod 4 for the
element i in memory order; m takes its low half, v its high half, a bf16 weight the low half of a
word of stream ^ WEIGHT_STREAM.
"""

from __future__ import annotations

import torch

from ffengine.ops.optim import BLOCK, OptimConfig, OptimState
from ffengine.reference.local_pass import philox4x32
from ffengine.reference.weight_update import optimizer_step

WEIGHT_STREAM = 0x40000000
#: Exponent and mantissa bits of an fp32 magnitude, shifted right by 20, of code 0; largest code.
SIGNED, UNSIGNED = (889, 127), (761, 255)
#: Elements that are decoded at a time.
CHUNK = 256 * BLOCK
#: What a chunk's step holds at most: int64 words and the products they come from.
SCRATCH_BYTES = 160 * CHUNK


def compressed_step(weight: torch.Tensor, grad: torch.Tensor, state: OptimState,
                    optim: OptimConfig, chunks: int | None = None) -> None:
    """One step on a weight (fp32 or bf16) whose states may be rounded; state.step stays as it is.

    grad: fp32, in weight's shape and memory layout. chunks: the first so many only, where a dry
    run asks what a step holds: each holds what the first does.
    """
    w, g = flat(weight), flat(grad)
    m, v = (None if t is None else flat(t) for t in (state.m, state.v))
    for start in range(0, w.numel(), CHUNK)[:chunks]:
        at = slice(start, min(start + CHUNK, w.numel()))
        scaled = slice(start // BLOCK, -(-at.stop // BLOCK))
        word = words(at, state.seed, state.stream, state.step + 1, weight.device)
        kept = [None if t is None else Kept(t[at], None if s is None else s[scaled], r, codes)
                for t, s, r, codes in ((m, state.m_scale, word & 0xFFFF, SIGNED),
                                       (v, state.v_scale, word >> 16, UNSIGNED))]
        first, second = (None if k is None else k.decoded() for k in kept)
        value = w[at].float()  # a copy of a bf16 weight, the fp32 weight itself
        optimizer_step(value, g[at], first, second, optim, state.step + 1)
        for k, x in zip(kept, (first, second), strict=True):
            if k is not None and x is not None:
                k.encode(x)
        if weight.dtype is torch.bfloat16:
            word = words(at, state.seed, state.stream ^ WEIGHT_STREAM, state.step + 1,
                         weight.device)
            w[at] = encode_bf16(value, word & 0xFFFF)


class Kept:
    """A stretch of a stored state: whole blocks of it, but for the last one's end."""

    def __init__(self, stored: torch.Tensor, scale: torch.Tensor | None, random: torch.Tensor,
                 codes: tuple[int, int]) -> None:
        self.stored, self.scale, self.random, self.codes = stored, scale, random, codes

    def decoded(self) -> torch.Tensor:
        """In fp32; the stored tensor itself where it is fp32."""
        if self.scale is None:
            return self.stored.float()
        return decode(self.stored, self.scale, *self.codes)

    def encode(self, x: torch.Tensor) -> None:
        if self.scale is not None:
            codes, scale = encode(x, self.random, *self.codes)
            self.stored.copy_(codes)
            self.scale.copy_(scale)
        elif self.stored.dtype is torch.bfloat16:
            self.stored.copy_(encode_bf16(x, self.random))


def flat(t: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements in memory order: a view."""
    return t.as_strided((t.numel(),), (1,), t.storage_offset())


def words(at: slice, seed: int, stream: int, step: int, device: torch.device) -> torch.Tensor:
    """The random words of elements at.start…, as int64; at.start is a multiple of 4."""
    block = torch.arange(at.start // 4, -(-at.stop // 4), device=device)
    four = torch.stack(philox4x32(seed, block, stream, step), 1)
    return four.view(-1)[:at.stop - at.start]


def encode_bf16(x: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """x (fp32) rounded up with the probability of what it is above the bf16 number below it."""
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rest = bits & 0x7FFFFFFF
    high = torch.where(rest < 0x7F800000, (bits + random) >> 16, bits >> 16)
    high = torch.where(rest > 0x7F800000, high | 0x40, high)  # a NaN stays one
    return high.to(torch.int16).view(torch.bfloat16)


def decode(codes: torch.Tensor, scale: torch.Tensor, bias: int, highest: int) -> torch.Tensor:
    """fp32 (n,) of uint8 codes (n,) and a scale for every block; NaN where it is not finite."""
    code = codes.to(torch.int32)
    c = code & highest
    magnitude = torch.where(c == 0, 0, (c + bias) << 20).view(torch.float32)
    signed = torch.where(code > highest, -magnitude, magnitude)
    return signed * spread(scale, codes.numel())


def encode(x: torch.Tensor, random: torch.Tensor, bias: int,
           highest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 codes (n,), fp32 scales) of fp32 x (n,); a block without a finite scale above 0 has
    codes 0."""
    scale = block_max(x.abs())
    of = spread(scale, x.numel())
    usable = (of > 0) & of.isfinite()
    y = torch.where(usable, x.abs() / of, 0.0)
    c = ((y.view(torch.int32).to(torch.int64) + (random << 4)) >> 20) - bias
    if highest == UNSIGNED[1]:
        c = torch.where(x == 0, 0, c.clamp(1, highest))
    else:
        c = c.clamp(0, highest)
        c = torch.where((c > 0) & x.signbit(), c + 128, c)
    return torch.where(usable, c, 0).to(torch.uint8), scale


def block_max(x: torch.Tensor) -> torch.Tensor:
    """Largest of every block of x (n,) >= 0; NaN where there is one."""
    whole = x.numel() // BLOCK * BLOCK
    found = x[:whole].view(-1, BLOCK).amax(1)
    rest = x[whole:]
    return found if rest.numel() == 0 else torch.cat([found, rest.amax(0, keepdim=True)])


def spread(scale: torch.Tensor, n: int) -> torch.Tensor:
    """Every element's scale."""
    return scale[:, None].expand(-1, BLOCK).reshape(-1)[:n]
