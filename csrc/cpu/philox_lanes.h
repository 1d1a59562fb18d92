// Philox4x32-10 over vector lanes (one counter a lane): the words of csrc/common/philox.h, several
// at once. A 32 x 32 -> 64 bit product is one instruction on 64-bit lanes, which the compiler does
// not find by itself (it emits vpmullq, three times slower), hence the one intrinsic.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/philox.h"

namespace ff {
namespace FF_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 8, kUnroll = 4;
typedef uint64_t Lanes64 __attribute__((vector_size(64)));
FF_HD Lanes64 mul32(Lanes64 a, Lanes64 b) {
  return Lanes64(_mm512_maskz_mul_epu32(0xff, __m512i(a), __m512i(b)));  // gcc 12 warns without
}
#elif defined(__AVX2__)
constexpr int kLanes = 4, kUnroll = 2;
typedef uint64_t Lanes64 __attribute__((vector_size(32)));
FF_HD Lanes64 mul32(Lanes64 a, Lanes64 b) {
  return Lanes64(_mm256_mul_epu32(__m256i(a), __m256i(b)));
}
#else
constexpr int kLanes = 2, kUnroll = 2;
typedef uint64_t Lanes64 __attribute__((vector_size(16)));
FF_HD Lanes64 mul32(Lanes64 a, Lanes64 b) {
#if defined(__x86_64__)
  return Lanes64(_mm_mul_epu32(__m128i(a), __m128i(b)));
#else
  return (a & 0xffffffffu) * b;
#endif
}
#endif

// Counters that one call of philox_lanes takes; buffers are padded to a multiple of it.
constexpr int kPhiloxStep = kLanes * kUnroll;

// c[w][u]: word w of kUnroll vectors of counters; the upper halves of the result are not cleared.
FF_HD void philox_rounds(const DropoutParams& d, Lanes64 (&c)[4][kUnroll]) {
  const Lanes64 zero = {};
  uint32_t k0 = uint32_t(d.seed), k1 = uint32_t(d.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int u = 0; u < kUnroll; ++u) {
      const Lanes64 p0 = mul32(c[0][u], zero + 0xD2511F53u);
      const Lanes64 p1 = mul32(c[2][u], zero + 0xCD9E8D57u);
      c[0][u] = (p1 >> 32) ^ c[1][u] ^ (zero + k0);
      c[1][u] = p1;
      c[2][u] = (p0 >> 32) ^ c[3][u] ^ (zero + k1);
      c[3][u] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

FF_HD void philox_start(const DropoutParams& d, int u, Lanes64 counter, Lanes64 (&c)[4][kUnroll]) {
  const Lanes64 zero = {};
  c[0][u] = counter;
  c[1][u] = counter >> 32;
  c[2][u] = zero + d.layer;
  c[3][u] = zero + d.step;
}

// Two words in one store, seen as words where they are read.
typedef uint64_t WordPair __attribute__((may_alias));

// out[4 * b + w] = word w of counter first + b, for `blocks` counters rounded up to kPhiloxStep.
static void philox_run(const DropoutParams& d, uint64_t first, int64_t blocks, uint32_t* out) {
  Lanes64 iota;
  for (int l = 0; l < kLanes; ++l) iota[l] = uint64_t(l);
  for (int64_t b = 0; b < blocks; b += kPhiloxStep) {
    Lanes64 c[4][kUnroll];
    for (int u = 0; u < kUnroll; ++u) philox_start(d, u, iota + (first + b + u * kLanes), c);
    philox_rounds(d, c);
    for (int u = 0; u < kUnroll; ++u) {
      const Lanes64 low = (c[0][u] & 0xffffffffu) | (c[1][u] << 32);
      const Lanes64 high = (c[2][u] & 0xffffffffu) | (c[3][u] << 32);
      WordPair* to = reinterpret_cast<WordPair*>(out + 4 * (b + u * kLanes));
      for (int l = 0; l < kLanes; ++l) to[2 * l] = low[l], to[2 * l + 1] = high[l];
    }
  }
}

// out[w * pitch + l] = word w of counters[l], for n counters rounded up to kPhiloxStep.
[[maybe_unused]] static void philox_columns(const DropoutParams& d, const uint64_t* counters,
                                            int64_t n, uint32_t* out, int64_t pitch) {
  for (int64_t b = 0; b < n; b += kPhiloxStep) {
    Lanes64 c[4][kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      Lanes64 counter;
      __builtin_memcpy(&counter, counters + b + u * kLanes, sizeof counter);
      philox_start(d, u, counter, c);
    }
    philox_rounds(d, c);
    for (int w = 0; w < 4; ++w)
      for (int u = 0; u < kUnroll; ++u)
        for (int l = 0; l < kLanes; ++l)
          out[w * pitch + b + u * kLanes + l] = uint32_t(c[w][u][l]);
  }
}

}  // namespace FF_ISA
}  // namespace ff
