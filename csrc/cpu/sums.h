// Where features are read from, and their sums over contiguous runs and over rows of channels, about
// a centre or not; a sum is the same whatever the thread count.
#pragma once
#include <cstdint>

#include "convert.h"
#include "lanes.h"

namespace ff {
namespace FF_ISA {

// max(0, x) that lets a NaN through and never returns -0.
FF_HD float relu(float x) { return (x < 0.f ? 0.f : x) + 0.f; }

// Features read from where they are: relu of the input, or scratch. kLeast: the least bits, read as
// int32, of an element that a straight-through gradient passes; every one, but for the dropped.
template <class T>
struct FromInput {
  static constexpr int32_t kLeast = INT32_MIN;
  const T* a;
  FF_HD float value(int64_t i) const { return relu(load(a + i)); }
  FF_HD Floats lanes(int64_t i) const { return relu_lanes(load_lanes(a + i)); }
  FF_HD float alive(int64_t, float value) const { return value; }
  FF_HD Floats alive_lanes(int64_t, Floats lanes) const { return lanes; }
};
template <class T>
struct FromScratch {
  static constexpr int32_t kLeast = 0;
  const float* features;
  const float* full;  // where the mask is read: the same, but for blended features
  FF_HD float value(int64_t i) const { return features[i]; }
  FF_HD Floats lanes(int64_t i) const { return load_lanes(features + i); }
  FF_HD float alive(int64_t i, float) const { return full[i]; }
  FF_HD Floats alive_lanes(int64_t i, Floats) const { return load_lanes(full + i); }
};

// Features as they are, squared, or less a centre; lanes of the j-th element of a period.
template <class Source>
struct Plain {
  Source f;
  FF_HD float value(int64_t i) const { return f.value(i); }
  FF_HD Floats lanes(int64_t i) const { return f.lanes(i); }
};
template <class Source>
struct Squared {
  Source f;
  FF_HD float value(int64_t i) const { return f.value(i) * f.value(i); }
  FF_HD Floats lanes(int64_t i) const { return f.lanes(i) * f.lanes(i); }
};

// A contiguous run is summed in kRun lanes, whatever the instruction set.
constexpr int kRun = 64, kVectors = kRun / kWidth;

FF_HD float tree(Floats* v) {
#pragma GCC unroll 4
  for (int w = kVectors / 2; w > 0; w /= 2)
#pragma GCC unroll 8
    for (int u = 0; u < w; ++u) v[u] += v[u + w];
  return sum_lanes(v[0]);
}

// Up to kWidth elements, zeros after the last.
template <class F>
FF_HD Floats tail(const F& value, int64_t n) {
  alignas(64) float lanes[kWidth] = {};
  for (int64_t l = 0; l < n; ++l) lanes[l] = value(l);
  return load_lanes(lanes);
}

template <class X>
FF_HD float run_sum(const X x, int64_t begin, int64_t end) {
  Floats acc[kVectors] = {};
  int64_t i = begin;
  for (; i + kRun <= end; i += kRun)
#pragma GCC unroll 16
    for (int u = 0; u < kVectors; ++u) acc[u] += x.lanes(i + u * kWidth);
#pragma GCC unroll 16
  for (int u = 0; u < kVectors; ++u, i += kWidth) {
    if (i >= end) break;
    acc[u] += i + kWidth <= end ? x.lanes(i)
                                : tail([&](int64_t l) { return x.value(i + l); }, end - i);
  }
  return tree(acc);
}

// sum[0], sum[1] = sums of h - centre and of its square.
template <class Source>
FF_HD void run_centred(const Source f, float centre, int64_t begin, int64_t end, float* sum) {
  Floats acc[kVectors] = {}, acc2[kVectors] = {};
  const Floats mean = splat(centre);
  int64_t i = begin;
  for (; i + kRun <= end; i += kRun)
#pragma GCC unroll 16
    for (int u = 0; u < kVectors; ++u) {
      const Floats d = f.lanes(i + u * kWidth) - mean;
      acc[u] += d;
      acc2[u] += d * d;
    }
#pragma GCC unroll 16
  for (int u = 0; u < kVectors; ++u, i += kWidth) {
    if (i >= end) break;
    const Floats d = i + kWidth <= end
                         ? f.lanes(i) - mean
                         : tail([&](int64_t l) { return f.value(i + l) - centre; }, end - i);
    acc[u] += d;
    acc2[u] += d * d;
  }
  sum[0] = tree(acc);
  sum[1] = tree(acc2);
}

// acc[j] = sum of x over the j-th elements of the rows of `period` elements in [begin, end); the
// last row may be shorter. Four rows at a time, to spare acc's traffic.
template <class X>
FF_HD void add_rows(const X x, int64_t begin, int64_t end, int64_t period, float* acc) {
  for (int64_t j = 0; j < period; ++j) acc[j] = 0.f;
  int64_t i = begin;
  for (; i + 4 * period <= end; i += 4 * period) {
    int64_t j = 0;
    for (; j + kWidth <= period; j += kWidth) {
      const Floats lower = x.lanes(i + j) + x.lanes(i + period + j);
      const Floats upper = x.lanes(i + 2 * period + j) + x.lanes(i + 3 * period + j);
      store_lanes(acc + j, load_lanes(acc + j) + (lower + upper));
    }
    for (; j < period; ++j)
      acc[j] += (x.value(i + j) + x.value(i + period + j)) +
                (x.value(i + 2 * period + j) + x.value(i + 3 * period + j));
  }
  for (; i < end; i += period) {
    const int64_t width = end - i < period ? end - i : period;
    int64_t j = 0;
    for (; j + kWidth <= width; j += kWidth)
      store_lanes(acc + j, load_lanes(acc + j) + x.lanes(i + j));
    for (; j < width; ++j) acc[j] += x.value(i + j);
  }
}

// Sums over the rows of h - centre[j] (acc) and of its square (acc2), a strip of columns at a time:
// the block lies in L1 by now.
template <class Source>
FF_HD void add_centred_rows(const Source f, const float* centre, int64_t begin, int64_t end,
                            int64_t period, float* acc, float* acc2) {
  constexpr int kStrip = 4;
  const int64_t whole = begin + (end - begin) / period * period;
  int64_t j = 0;
  for (; j + kStrip * kWidth <= period; j += kStrip * kWidth) {
    Floats mean[kStrip], sum[kStrip] = {}, sum2[kStrip] = {};
    for (int u = 0; u < kStrip; ++u) mean[u] = load_lanes(centre + j + u * kWidth);
    for (int64_t i = begin + j; i < whole; i += period)
      for (int u = 0; u < kStrip; ++u) {
        const Floats d = f.lanes(i + u * kWidth) - mean[u];
        sum[u] += d;
        sum2[u] += d * d;
      }
    for (int u = 0; u < kStrip; ++u) {
      store_lanes(acc + j + u * kWidth, sum[u]);
      store_lanes(acc2 + j + u * kWidth, sum2[u]);
    }
  }
  for (; j + kWidth <= period; j += kWidth) {
    const Floats mean = load_lanes(centre + j);
    Floats sum = {}, sum2 = {};
    for (int64_t i = begin + j; i < whole; i += period) {
      const Floats d = f.lanes(i) - mean;
      sum += d;
      sum2 += d * d;
    }
    store_lanes(acc + j, sum);
    store_lanes(acc2 + j, sum2);
  }
  for (; j < period; ++j) {
    acc[j] = acc2[j] = 0.f;
    for (int64_t i = begin + j; i < whole; i += period) {
      const float d = f.value(i) - centre[j];
      acc[j] += d;
      acc2[j] += d * d;
    }
  }
  for (int64_t i = whole; i < end; ++i) {
    const float d = f.value(i) - centre[i - whole];
    acc[i - whole] += d;
    acc2[i - whole] += d * d;
  }
}

FF_HD void fold(float* acc, int64_t C, int64_t period) {
  for (int64_t at = C; at < period; at += C)
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) acc[c] += acc[at + c];
}

}  // namespace FF_ISA
}  // namespace ff
