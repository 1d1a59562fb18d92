// linear_step's two passes over a tile; see csrc/params.h. Compiled once per instruction set.
#include "linear_step_kernel.h"

#include <math.h>

#include "convert.h"
#include "lanes.h"

namespace ff {
namespace FF_ISA {
namespace {

// Sum of squares of n elements: 64 lanes of fp32 over blocks of 4096, the blocks in double.
template <class T>
double squares(const T* x, int64_t n) {
  constexpr int64_t kBlock = 4096;
  constexpr int kVectors = 64 / kWidth;
  double total = 0.;
  for (int64_t b = 0; b < n; b += kBlock) {
    const int64_t end = b + kBlock < n ? b + kBlock : n;
    Floats sum[kVectors] = {};
    int64_t i = b;
    for (; i + kVectors * kWidth <= end; i += kVectors * kWidth)
#pragma GCC unroll 16
      for (int u = 0; u < kVectors; ++u) {
        const Floats v = load_lanes(x + i + u * kWidth);
        sum[u] += v * v;
      }
    float rest = 0.f;
    for (; i < end; ++i) rest += load(x + i) * load(x + i);
#pragma GCC unroll 16
    for (int u = 1; u < kVectors; ++u) sum[0] += sum[u];
    total += double(sum_lanes(sum[0]) + rest);
  }
  return total;
}

template <class T>
void prepare(const LinearStepParams& p, int64_t n) {
  const double total = squares(static_cast<const T*>(p.x) + n * p.in, p.in);
  const float scale = float(1. / (sqrt(p.rms ? total / double(p.in) : total) + double(p.eps)));
  if (p.scale != nullptr) p.scale[n] = scale;
  const T* from = static_cast<const T*>(p.from) + n * p.out;
  T* a = static_cast<T*>(p.a) + n * p.out;
  int64_t j = 0;
  for (; j + kWidth <= p.out; j += kWidth) {
    const Floats bias = p.bias == nullptr ? Floats{} : load_lanes(p.bias + j);
    store_lanes(a + j, load_lanes(from + j) * scale + bias);
  }
  for (; j < p.out; ++j) store(a + j, load(from + j) * scale + (p.bias ? p.bias[j] : 0.f));
}

// One vector of columns after the other in registers would read each cache line again and again:
// all of a strip's vectors go down the rows together.
template <class T>
void finish(const LinearStepParams& p, int64_t begin, int64_t end) {
  alignas(64) float sums[kStrip] = {};
  const int64_t width = end - begin;
  for (int64_t n = 0; n < p.N; ++n) {
    T* da = static_cast<T*>(p.a) + n * p.out + begin;
    const float scale = p.scale == nullptr ? 1.f : p.scale[n];
    int64_t j = 0;
    for (; j + kWidth <= width; j += kWidth) {
      const Floats v = load_lanes(da + j);
      store_lanes(sums + j, load_lanes(sums + j) + v);
      if (p.scale != nullptr) store_lanes(da + j, v * scale);
    }
    for (; j < width; ++j) {
      const float v = load(da + j);
      sums[j] += v;
      if (p.scale != nullptr) store(da + j, v * scale);
    }
  }
  if (p.sums == nullptr) return;
  for (int64_t j = 0; j < width; ++j) p.sums[begin + j] += p.inv_scale * sums[j];
}

}  // namespace

void linear_prepare_rows(const LinearStepParams& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    switch (p.dtype) {
      case DType::f32: prepare<float>(p, n); break;
      case DType::bf16: prepare<bf16>(p, n); break;
      case DType::f16: prepare<f16>(p, n); break;
    }
  }
}

void linear_finish_strip(const LinearStepParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::f32: return finish<float>(p, begin, end);
    case DType::bf16: return finish<bf16>(p, begin, end);
    case DType::f16: return finish<f16>(p, begin, end);
  }
}

}  // namespace FF_ISA
}  // namespace ff
