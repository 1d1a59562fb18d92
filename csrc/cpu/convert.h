// Element types of the CPU kernels: fp32, bf16, fp16, each read to and written from fp32 by integer
// arithmetic without branches, so that the compiler vectorises it for every instruction set.
#pragma once
#include <cstdint>

#include "../common/macros.h"

namespace ff {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

FF_HD uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
FF_HD float float_of(uint32_t x) { return __builtin_bit_cast(float, x); }

FF_HD float load(const float* p) { return *p; }
FF_HD void store(float* p, float x) { *p = x; }

FF_HD float load(const bf16* p) { return float_of(uint32_t(p->bits) << 16); }
// Round to nearest, ties to even; a NaN keeps its sign and stays a NaN.
FF_HD void store(bf16* p, float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p->bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

FF_HD float load(const f16* p) {
  const uint32_t u = p->bits, sign = (u & 0x8000u) << 16, rest = (u & 0x7fffu) << 13;
  // times 2^112 moves fp16's exponent bias to fp32's and normalises subnormals
  const uint32_t finite = bits_of(float_of(rest) * 0x1p112f);
  return float_of(sign | (rest >= 0x0f800000u ? rest | 0x7f800000u : finite));
}
// Round to nearest, ties to even, overflow to infinity.
FF_HD void store(f16* p, float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, rest = u & 0x7fffffffu;
  const uint32_t odd = (rest >> 13) & 1u;
  const uint32_t normal = (rest + 0xc8000fffu + odd) >> 13;
  // adding 0.5 leaves a subnormal's bits, rounded, at the bottom of the sum
  const uint32_t subnormal = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
  uint32_t half = rest < 0x38800000u ? subnormal : normal;
  half = rest >= 0x477ff000u ? 0x7c00u : half;
  half = rest > 0x7f800000u ? 0x7e00u : half;
  p->bits = uint16_t(sign | half);
}

}  // namespace ff
