// local_pass, second part: per group mean, centred M2 and sum of squares of the features of one
// sample. Blocks that fit L1 are centred about their own mean and merged by Chan's formula; the
// second sweep of a block also sums h - mean, which takes the rounding of that mean back out.
#pragma once
#include "convert.h"
#include "lanes.h"
#include "local_pass_kernel.h"
#include "local_pass_prepare.h"

namespace ff {
namespace FF_ISA {

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

struct Needs {
  bool sum, centred, squares;
};

FF_HD Needs needs_of(const LocalPassParams& p) {
  const bool centred = p.norm == NormKind::group || p.norm == NormKind::layer;
  const bool squares = p.goodness != Goodness::mean || p.norm == NormKind::length;
  return {centred || p.goodness == Goodness::mean, centred, squares && !centred};
}

// A group's running moments, in double: (mean, M2, sum of squares) after `count` elements.
FF_HD void merge(double* group, double count, double n, double mean, double m2) {
  if (count == 0.) {
    group[0] = mean;
    group[1] = m2;
    return;
  }
  const double delta = mean - group[0], total = count + n;
  group[0] += delta * (n / total);
  group[1] += m2 + delta * delta * (count * n / total);
}

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

// One group whose elements [begin, end) are contiguous.
template <class Source>
static void run_stats(const Source& f, int64_t begin, int64_t end, const Needs& needs,
                      double* group) {
  constexpr int64_t kBlock = 4096;
  for (int64_t b = begin; b < end; b += kBlock) {
    const int64_t last = b + kBlock < end ? b + kBlock : end;
    const double n = double(last - b);
    if (needs.squares) group[2] += run_sum(Squared<Source>{f}, b, last);
    if (!needs.sum) continue;
    const float mean = run_sum(Plain<Source>{f}, b, last) / float(n);
    float rest[2] = {0.f, 0.f};
    if (needs.centred) run_centred(f, mean, b, last, rest);
    merge(group, double(b - begin), n, mean + rest[0] / n,
          rest[1] - double(rest[0]) * rest[0] / n);
  }
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

FF_HD double group_sum(const float* acc, int64_t begin, int64_t end) {
  Floats lanes = {};
  int64_t c = begin;
  for (; c + kWidth <= end; c += kWidth) lanes += load_lanes(acc + c);
  float sum = end - begin < kWidth ? 0.f : sum_lanes(lanes);
  for (; c < end; ++c) sum += acc[c];
  return sum;
}

// One block of a sample whose channels are innermost: elements [begin, end), whole pixels.
template <class Source>
static void block_stats(const LocalPassParams& p, const Source& f, int64_t begin, int64_t end,
                        int64_t period, const Needs& needs, const LocalPassScratch& s) {
  const double pixels = double((end - begin) / p.C), before = double(begin / p.C);
  float *centre = s.table[0], *acc = s.table[3], *acc2 = s.table[4];
  if (needs.squares) {
    add_rows(Squared<Source>{f}, begin, end, period, acc);
    fold(acc, p.C, period);
    for (int64_t k = 0; k < p.K; ++k)
      s.groups[3 * k + 2] += group_sum(acc, p.offsets[k], p.offsets[k + 1]);
  }
  if (!needs.sum) return;
  add_rows(Plain<Source>{f}, begin, end, period, acc);
  fold(acc, p.C, period);
  for (int64_t k = 0; k < p.K; ++k) {
    const double n = pixels * double(p.offsets[k + 1] - p.offsets[k]);
    const float mean = float(group_sum(acc, p.offsets[k], p.offsets[k + 1]) / n);
    for (int64_t c = p.offsets[k]; c < p.offsets[k + 1]; ++c) centre[c] = mean;
    if (!needs.centred) merge(s.groups + 3 * k, before * (n / pixels), n, mean, 0.);
  }
  if (!needs.centred) return;
  for (int64_t j = p.C; j < period; ++j) centre[j] = centre[j - p.C];
  add_centred_rows(f, centre, begin, end, period, acc, acc2);
  fold(acc, p.C, period);
  fold(acc2, p.C, period);
  for (int64_t k = 0; k < p.K; ++k) {
    const double n = pixels * double(p.offsets[k + 1] - p.offsets[k]);
    const double rest = group_sum(acc, p.offsets[k], p.offsets[k + 1]);
    const double m2 = group_sum(acc2, p.offsets[k], p.offsets[k + 1]);
    merge(s.groups + 3 * k, before * (n / pixels), n, centre[p.offsets[k]] + rest / n,
          m2 - rest * rest / n);
  }
}

template <class Source>
static void sample_stats(const LocalPassParams& p, const LocalPassPlan& plan, const Source& f,
                         const LocalPassScratch& s) {
  constexpr int64_t kBlock = 8192;
  const Needs needs = needs_of(p);
  for (int64_t j = 0; j < 3 * p.K; ++j) s.groups[j] = 0.;
  if (plan.channels_inner) {
    const int64_t size = p.C * plan.pixels_z;
    const int64_t rows = kBlock / plan.period, block = (rows > 1 ? rows : 1) * plan.period;
    for (int64_t b = 0; b < size; b += block)
      block_stats(p, f, b, b + block < size ? b + block : size, plan.period, needs, s);
  } else {
    for (int64_t k = 0; k < p.K; ++k)
      run_stats(f, p.offsets[k] * plan.pixels_z, p.offsets[k + 1] * plan.pixels_z, needs,
                s.groups + 3 * k);
  }
  if (needs.centred)
    for (int64_t k = 0; k < p.K; ++k) {
      const double m = double((p.offsets[k + 1] - p.offsets[k]) * plan.pixels_z);
      double* group = s.groups + 3 * k;
      group[2] = group[1] + m * group[0] * group[0];
    }
}

}  // namespace FF_ISA
}  // namespace ff
