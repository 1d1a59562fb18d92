// One vector register of floats, as wide as the instruction set has it, and how it is read from and
// written to fp32, bf16 and fp16 memory; the same numbers as load and store of convert.h. Written
// out because gcc 12 does not find two instructions that count here: the max that keeps a NaN, and
// the conversions of fp16.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "convert.h"

namespace ff {
namespace FF_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

FF_HD Floats splat(float x) { return x - Floats{}; }

// max(0, x); of a NaN, or of -0, the instruction returns its second operand.
FF_HD Floats relu_lanes(Floats x) {
#if defined(__AVX512F__)
  return Floats(_mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), __m512(x)));
#elif defined(__AVX2__)
  return Floats(_mm256_max_ps(_mm256_setzero_ps(), __m256(x)));
#elif defined(__x86_64__)
  return Floats(_mm_max_ps(_mm_setzero_ps(), __m128(x)));
#else
  return x < 0.f ? Floats{} : x;
#endif
}

// Halves added to halves, down to one number.
FF_HD float sum_lanes(Floats v) {
#if defined(__AVX512F__)
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
#define FF_LANES(...) __builtin_shufflevector(v, v, __VA_ARGS__, 8, 9, 10, 11, 12, 13, 14, 15)
#elif defined(__AVX2__)
#define FF_LANES(...) __builtin_shufflevector(v, v, __VA_ARGS__)
#endif
#if defined(__AVX2__)
  v += FF_LANES(4, 5, 6, 7, 0, 1, 2, 3);
  v += FF_LANES(2, 3, 0, 1, 4, 5, 6, 7);
  v += FF_LANES(1, 0, 2, 3, 4, 5, 6, 7);
#undef FF_LANES
#else
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
  v += __builtin_shufflevector(v, v, 1, 0, 2, 3);
#endif
  return v[0];
}

FF_HD Floats load_lanes(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FF_HD void store_lanes(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

FF_HD Words widened(const uint16_t* p) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return Words(_mm512_maskz_cvtepu16_epi32(0xffff, halves));
#else
  Halves v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Words);
#endif
}
FF_HD void store_narrow(uint16_t* p, Words w) {
#if defined(__AVX512F__)
  const __m256i v = _mm512_maskz_cvtepi32_epi16(0xffff, __m512i(w));
#else
  const Halves v = __builtin_convertvector(w, Halves);
#endif
  __builtin_memcpy(p, &v, sizeof v);
}

FF_HD Floats load_lanes(const bf16* p) { return Floats(widened(&p->bits) << 16); }
FF_HD void store_lanes(bf16* p, Floats v) {
  const Words u = Words(v);
  const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  store_narrow(&p->bits, v != v ? (u >> 16) | 0x40u : rounded);
}

FF_HD Floats load_lanes(const f16* p) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return Floats(_mm512_maskz_cvtph_ps(0xffff, halves));
#elif defined(__AVX2__)
  return Floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Floats v;
  for (int l = 0; l < kWidth; ++l) v[l] = load(p + l);
  return v;
#endif
}
FF_HD void store_lanes(f16* p, Floats v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, __m512(v), 0));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(__m256(v), 0));
#else
  for (int l = 0; l < kWidth; ++l) store(p + l, v[l]);
#endif
}

// For numbers that T holds exactly: a bf16 then is the upper half.
template <class T>
FF_HD void store_exact(T* p, Floats v) {
  store_lanes(p, v);
}
FF_HD void store_exact(bf16* p, Floats v) { store_narrow(&p->bits, Words(v) >> 16); }

// x as T holds it.
template <class T>
FF_HD float rounded_to(float x) {
  T held;
  store(&held, x);
  return load(&held);
}

// f(i) for vectors that cover n >= kWidth elements, the last overlapping the one before.
template <class F>
FF_HD void over_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) f(i);
  if (i < n) f(n - kWidth);
}

}  // namespace FF_ISA
}  // namespace ff
