// The fma unit: fp32 products, 16-bit numbers widened while they are packed. See gemm.h.
#include "gemm_cursor.h"
#include "gemm_steps.h"
#include "lanes.h"

namespace ff::FF_ISA {
namespace {

struct Fma {
  static constexpr int kWidth = FF_ISA::kWidth;
  // registers: accumulators, a step's columns and a spread word
#if defined(__AVX512F__)
  static constexpr int kMostRows = 14, kMostPanels = 2;
#elif defined(__AVX2__)
  static constexpr int kMostRows = 6, kMostPanels = 1;
#else
  static constexpr int kMostRows = 3, kMostPanels = 1;
#endif
  typedef Floats Vec;
  typedef Floats Words;
  static Words load(const uint32_t* p) { return load_lanes(reinterpret_cast<const float*>(p)); }
  static Words spread(const uint32_t* p) { return splat(*reinterpret_cast<const float*>(p)); }
  static Vec add(Vec sum, Words a, Words b) { return sum + a * b; }
};

// `count` channels of one pixel from `at` on, `stride` apart, and zeros up to `width`.
template <class T>
FF_HD void channels(const T* at, int64_t stride, int64_t count, int64_t width, float* dst) {
  const int64_t valid = at == nullptr ? 0 : count;
  int64_t i = 0;
  if (stride == 1)
    for (; i + kWidth <= valid; i += kWidth) store_lanes(dst + i, load_lanes(at + i));
  for (; i < valid; ++i) dst[i] = load(at + i * stride);
  for (; i < width; ++i) dst[i] = 0.f;
}

template <class T>
void pack_x(const PixelSource& s, int64_t c0, int64_t count, int64_t t0, int64_t t1,
            int64_t panel_stride, float* dst) {
  Cursor<T> cursor(s, t0);
  const int64_t stride = s.channels_last ? 1 : s.pixels;
  for (int64_t t = t0; t < t1; ++t, dst += kPanel) {
    const T* at = cursor.next();
    for (int64_t c = 0; c < count; c += kPanel)
      channels(at == nullptr ? at : at + (c0 + c) * stride, stride,
               count - c < kPanel ? count - c : kPanel, kPanel, dst + c / kPanel * panel_stride);
  }
}

template <class T>
void pack_da(const PixelSource& s, int64_t c0, int64_t rows, int64_t t0, int64_t t1, float* dst) {
  Cursor<T> cursor(s, t0);
  const int64_t stride = s.channels_last ? 1 : s.pixels;
  for (int64_t t = t0; t < t1; ++t, dst += rows) {
    const T* at = cursor.next();
    channels(at == nullptr ? at : at + c0 * stride, stride, rows, rows, dst);
  }
}

}  // namespace

void fma_rows(int64_t* rows) { *rows = Fma::kMostRows * (Fma::kMostRows < 14 ? 4 : 2); }

void fma_pack_x(const PixelSource& s, int64_t c0, int64_t count, int64_t t0, int64_t t1,
                int64_t panel_stride, float* dst) {
  if (s.dtype == DType::f32) pack_x<float>(s, c0, count, t0, t1, panel_stride, dst);
  else if (s.dtype == DType::bf16) pack_x<bf16>(s, c0, count, t0, t1, panel_stride, dst);
  else pack_x<f16>(s, c0, count, t0, t1, panel_stride, dst);
}

void fma_pack_da(const PixelSource& s, int64_t c0, int64_t rows, int64_t t0, int64_t t1,
                 float* dst) {
  if (s.dtype == DType::f32) pack_da<float>(s, c0, rows, t0, t1, dst);
  else if (s.dtype == DType::bf16) pack_da<bf16>(s, c0, rows, t0, t1, dst);
  else pack_da<f16>(s, c0, rows, t0, t1, dst);
}

void fma_multiply(const StepPass& pass) { multiply_steps<Fma>(pass); }

}  // namespace ff::FF_ISA
