// fp32 FMA kernels: packing with conversion, and the register-blocked multiply. See gemm.h.
#include "gemm.h"

#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace ff::FF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kMostRows = 14, kPairs = 2;
#elif defined(__AVX2__)
constexpr int kWidth = 8, kMostRows = 6, kPairs = 1;
#else
constexpr int kWidth = 4, kMostRows = 3, kPairs = 1;
#endif
typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef float LooseVec __attribute__((vector_size(kWidth * 4), aligned(4)));

struct Half { uint16_t bits; };
struct Brain { uint16_t bits; };

inline float to_float(float x) { return x; }
inline float to_float(Brain x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // exponent rebias by a multiplication, which also normalises subnormals; then inf and NaN
  uint32_t bits = uint32_t(x.bits & 0x7fff) << 13;
  float y;
  std::memcpy(&y, &bits, 4);
  y *= 0x1p112f;
  std::memcpy(&bits, &y, 4);
  if ((x.bits & 0x7c00) == 0x7c00) bits = 0x7f800000u | (uint32_t(x.bits & 0x3ff) << 13);
  bits |= uint32_t(x.bits & 0x8000) << 16;
  std::memcpy(&y, &bits, 4);
  return y;
#endif
}

// The pixel at grid position t of channel 0, or null where the grid is zero padding.
template <class T>
inline const T* pixel(const PixelSource& s, int64_t t) {
  const int64_t n = t / s.positions;
  if (n >= s.samples) return nullptr;
  const int64_t g = t - n * s.positions, i = s.index ? s.index[g] : g;
  if (i < 0) return nullptr;
  return static_cast<const T*>(s.data) + n * s.pixels * s.channels +
         (s.channels_last ? i * s.channels : i);
}

// `count` channels of one pixel, padded with zeros to `width`.
template <class T>
inline void channels(const PixelSource& s, const T* at, int64_t c, int64_t count, int64_t width,
                     float* __restrict dst) {
  const int64_t valid = at ? count : 0;
  if (s.channels_last && valid == kPanel) {
    for (int i = 0; i < kPanel; ++i) dst[i] = to_float(at[c + i]);
    return;
  }
  const int64_t stride = s.channels_last ? 1 : s.pixels;
  for (int64_t i = 0; i < valid; ++i) dst[i] = to_float(at[(c + i) * stride]);
  for (int64_t i = valid; i < width; ++i) dst[i] = 0.f;
}

template <class T>
void pack_x(const PixelSource& s, int64_t c0, int64_t count, int64_t t0, int64_t t1,
            int64_t panel_stride, float* dst) {
  for (int64_t t = t0; t < t1; ++t, dst += kPanel) {
    const T* at = pixel<T>(s, t);
    for (int64_t c = 0; c < count; c += kPanel)
      channels(s, at, c0 + c, count - c < kPanel ? count - c : kPanel, kPanel,
               dst + c / kPanel * panel_stride);
  }
}

template <class T>
void pack_da(const PixelSource& s, int64_t c0, int64_t rows, int64_t t0, int64_t t1, float* dst) {
  for (int64_t t = t0; t < t1; ++t, dst += rows) channels(s, pixel<T>(s, t), c0, rows, rows, dst);
}

// kRows output rows x kPanels panels in registers over every pixel of the pass, then onto acc.
template <int kRows, int kPanels>
void multiply_block(const FmaPass& p, const float* a, const float* b, float* acc) {
  constexpr int kVecs = kPanels * kPanel / kWidth, kPerPanel = kPanel / kWidth;
  Vec sum[kRows][kVecs] = {};
  for (int64_t r = 0; r < p.pixel_rows; ++r) {
    const float* x = b + p.row_offset[r];
    for (int64_t q = 0; q < p.length; ++q, a += p.rows, x += kPanel) {
      Vec column[kVecs];
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j)
        column[j] = *reinterpret_cast<const LooseVec*>(
            x + j / kPerPanel * p.panel_stride + j % kPerPanel * kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) sum[i][j] += a[i] * column[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      float* at = acc + (j / kPerPanel * p.rows + i) * kPanel + j % kPerPanel * kWidth;
      *reinterpret_cast<LooseVec*>(at) += sum[i][j];
    }
}

using Block = void (*)(const FmaPass&, const float*, const float*, float*);

template <int kPanels>
Block block_of(int64_t rows) {
  switch (rows) {
    case 1: return multiply_block<1, kPanels>;
    case 2: return multiply_block<2, kPanels>;
    case 3: return multiply_block<3, kPanels>;
#if defined(__AVX2__)
    case 4: return multiply_block<4, kPanels>;
    case 5: return multiply_block<5, kPanels>;
    case 6: return multiply_block<6, kPanels>;
#endif
#if defined(__AVX512F__)
    case 7: return multiply_block<7, kPanels>;
    case 8: return multiply_block<8, kPanels>;
    case 9: return multiply_block<9, kPanels>;
    case 10: return multiply_block<10, kPanels>;
    case 11: return multiply_block<11, kPanels>;
    case 12: return multiply_block<12, kPanels>;
    case 13: return multiply_block<13, kPanels>;
    case 14: return multiply_block<14, kPanels>;
#endif
  }
  return nullptr;
}

}  // namespace

void fma_rows(int64_t* rows) { *rows = kMostRows * (kMostRows < 14 ? 4 : 2); }

void fma_pack_x(const PixelSource& s, int64_t c0, int64_t count, int64_t t0, int64_t t1,
                int64_t panel_stride, float* dst) {
  if (s.dtype == DType::f32) pack_x<float>(s, c0, count, t0, t1, panel_stride, dst);
  else if (s.dtype == DType::bf16) pack_x<Brain>(s, c0, count, t0, t1, panel_stride, dst);
  else pack_x<Half>(s, c0, count, t0, t1, panel_stride, dst);
}

void fma_pack_da(const PixelSource& s, int64_t c0, int64_t rows, int64_t t0, int64_t t1,
                 float* dst) {
  if (s.dtype == DType::f32) pack_da<float>(s, c0, rows, t0, t1, dst);
  else if (s.dtype == DType::bf16) pack_da<Brain>(s, c0, rows, t0, t1, dst);
  else pack_da<Half>(s, c0, rows, t0, t1, dst);
}

void fma_multiply(const FmaPass& p) {
  const int64_t blocks = (p.rows + kMostRows - 1) / kMostRows;
  for (int64_t j = 0; j < p.panels; j += kPairs)
    for (int64_t tap = 0; tap < p.taps; ++tap) {
      const float* b = p.b + p.tap_offset[tap] + j * p.panel_stride;
      float* acc = p.acc + (tap * p.panels + j) * p.rows * kPanel;
      const bool two = kPairs == 2 && j + 1 < p.panels;
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t row = i * p.rows / blocks, count = (i + 1) * p.rows / blocks - row;
        (two ? block_of<kPairs>(count) : block_of<1>(count))(p, p.a + row, b, acc + row * kPanel);
      }
    }
}

}  // namespace ff::FF_ISA
