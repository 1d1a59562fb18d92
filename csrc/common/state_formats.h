// Optimizer states and weights in fewer bits, shared by C++ and CUDA; the definition of correct is
// ffengine/reference/state_formats.py. Floats travel as their bits, so that no compiler has a say.
//   bf16   the upper half of fp32
//   8 bit  blocks of kStateBlock values in memory order share an fp32 scale, their largest
//          magnitude; a code is the exponent and three bits of mantissa of y = |x| / scale.
//          signed (first moments): sign in bit 7, 127 magnitudes from 1.25 * 2^-16 to 1, and 0;
//          unsigned (second moments): 255 magnitudes from 1.25 * 2^-32 to 1, and 0 for 0 alone, or
//          a step divided by its root would explode.
// Every encoding rounds stochastically by adding random bits below the last one kept; `random` is
// 16 of them. One Philox word serves element i: counter (i / 4 low, i / 4 high, stream, step), word
// i mod 4, its low half for m, its high half for v; a bf16 weight takes the low half of a second
// word, of kWeightStream.
#pragma once
#include <cstdint>

#include "macros.h"

namespace ff {

constexpr int64_t kStateBlock = 256;
constexpr uint32_t kWeightStream = 0x40000000u;  // xor-ed into the stream
constexpr uint32_t kSignedBias = 889, kUnsignedBias = 761;

// A NaN stays a NaN; the largest finite values may become infinite.
FF_HD uint32_t encode_bf16(uint32_t bits, uint32_t random) {
  const uint32_t rest = bits & 0x7fffffffu;
  const uint32_t special = rest > 0x7f800000u ? (bits >> 16) | 0x40u : bits >> 16;
  return rest >= 0x7f800000u ? special : (bits + random) >> 16;
}

// Bits of the magnitude in [0, 1] that a code stands for; times the scale it is the value, for code
// 0 too: 0 times a scale that is not finite is NaN.
FF_HD uint32_t decode_signed(uint32_t code) {
  const uint32_t c = code & 0x7fu;
  return ((code & 0x80u) << 24) | (c == 0 ? 0u : (c + kSignedBias) << 20);
}
FF_HD uint32_t decode_unsigned(uint32_t code) {
  return code == 0 ? 0u : (code + kUnsignedBias) << 20;
}

// Code of a magnitude y in [0, 1].
FF_HD int32_t coded(uint32_t y, uint32_t random, uint32_t bias, int32_t lowest, int32_t highest) {
  const int32_t c = int32_t((y + (random << 4)) >> 20) - int32_t(bias);
  return c < lowest ? lowest : c > highest ? highest : c;
}

// y: bits of |x| / scale; x: bits of the value itself, for its sign. Where the scale is 0 or not
// finite every code is 0, which is the caller's to see to.
FF_HD uint32_t encode_signed(uint32_t y, uint32_t x, uint32_t random) {
  const uint32_t c = uint32_t(coded(y, random, kSignedBias, 0, 127));
  return c == 0 ? 0u : c | ((x >> 31) << 7);
}
FF_HD uint32_t encode_unsigned(uint32_t y, uint32_t x, uint32_t random) {
  return x == 0 ? 0u : uint32_t(coded(y, random, kUnsignedBias, 1, 255));
}

}  // namespace ff
