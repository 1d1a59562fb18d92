// 16-bit pixels of a grid, read channel vector by channel vector and interleaved in pairs.
#pragma once
#include <immintrin.h>

#include "gemm_cursor.h"

// gcc 12 warns about its own AVX-512 headers (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace ff {
namespace {

// 16 channels of a pixel from channel c on; lanes outside `mask` are zero.
__m256i channels16(const PixelSource& s, const uint16_t* at, int64_t c, __mmask16 mask) {
  if (!at) return _mm256_setzero_si256();
  if (s.channels_last) return _mm256_maskz_loadu_epi16(mask, at + c);
  alignas(32) uint16_t lane[16] = {};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) lane[i] = at[(c + i) * s.pixels];
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(lane));
}

__mmask16 mask_of(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1u << count) - 1); }

__m512i pair_words(__m256i even, __m256i odd) {
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}

}  // namespace
}  // namespace ff
