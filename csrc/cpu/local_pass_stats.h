// local_pass, second part: per group mean, centred M2 and sum of squares of the features of one
// sample. Blocks that fit L1 are centred about their own mean and merged by Chan's formula; the
// second sweep of a block also sums h - mean, which takes the rounding of that mean back out.
#pragma once
#include "convert.h"
#include "local_pass_kernel.h"
#include "local_pass_prepare.h"

namespace ff {
namespace FF_ISA {

// Features read from where they are: relu of the input, or scratch.
template <class T>
struct FromInput {
  const T* a;
  FF_HD float value(int64_t i) const { return relu(load(a + i)); }
  FF_HD float alive(int64_t, float value) const { return value; }
};
template <class T>
struct FromScratch {
  const float* features;
  const float* full;  // where the mask is read: the same, but for blended features
  FF_HD float value(int64_t i) const { return features[i]; }
  FF_HD float alive(int64_t i, float) const { return full[i]; }
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
  const double delta = mean - group[0], total = count + n;
  group[0] += delta * (n / total);
  group[1] += m2 + delta * delta * (count * n / total);
}

// acc[j] += x(j-th element of every row), rows two by two to halve the traffic on acc.
template <class F>
FF_HD void add_rows(const F& x, int64_t begin, int64_t end, int64_t period, float* acc) {
#pragma omp simd
  for (int64_t j = 0; j < period; ++j) acc[j] = 0.f;
  int64_t i = begin;
  for (; i + 2 * period <= end; i += 2 * period)
#pragma omp simd
    for (int64_t j = 0; j < period; ++j) acc[j] += x(i + j, j) + x(i + period + j, j);
  for (; i < end; i += period) {
    const int64_t width = end - i < period ? end - i : period;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) acc[j] += x(i + j, j);
  }
}

// The same for h - centre(j) and its square.
template <class Source, class Centre>
FF_HD void add_centred_rows(const Source& f, const Centre& centre, int64_t begin, int64_t end,
                            int64_t period, float* acc, float* acc2) {
#pragma omp simd
  for (int64_t j = 0; j < period; ++j) acc[j] = acc2[j] = 0.f;
  for (int64_t i = begin; i < end; i += period) {
    const int64_t width = end - i < period ? end - i : period;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const float d = f.value(i + j) - centre(j);
      acc[j] += d;
      acc2[j] += d * d;
    }
  }
}

// Lanes of a contiguous run. Explicit ones: gcc 12 leaves `omp simd reduction` over these sources
// scalar, and the order of a sum is the same for every instruction set this way.
constexpr int64_t kRun = 128;

FF_HD float tree(float* acc) {
  for (int64_t w = kRun / 2; w > 0; w /= 2)
#pragma omp simd
    for (int64_t j = 0; j < w; ++j) acc[j] += acc[j + w];
  return acc[0];
}

// One group whose elements [begin, end) are contiguous.
template <class Source>
static void run_stats(const Source& f, int64_t begin, int64_t end, const Needs& needs,
                      double* group) {
  constexpr int64_t kBlock = 4096;
  alignas(64) float acc[kRun], acc2[kRun];
  for (int64_t b = begin; b < end; b += kBlock) {
    const int64_t last = b + kBlock < end ? b + kBlock : end;
    const double n = double(last - b);
    if (needs.squares) {
      add_rows([&](int64_t i, int64_t) { return f.value(i) * f.value(i); }, b, last, kRun, acc);
      group[2] += tree(acc);
    }
    if (!needs.sum) continue;
    add_rows([&](int64_t i, int64_t) { return f.value(i); }, b, last, kRun, acc);
    const float mean = tree(acc) / float(n);
    double rest = 0., m2 = 0.;
    if (needs.centred) {
      add_centred_rows(f, [=](int64_t) { return mean; }, b, last, kRun, acc, acc2);
      rest = tree(acc);
      m2 = tree(acc2);
    }
    merge(group, double(b - begin), n, mean + rest / n, m2 - rest * rest / n);
  }
}

FF_HD void fold(float* acc, int64_t C, int64_t period) {
  for (int64_t at = C; at < period; at += C)
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) acc[c] += acc[at + c];
}

FF_HD double group_sum(const float* acc, int64_t begin, int64_t end) {
  float sum = 0.f;
  for (int64_t c = begin; c < end; ++c) sum += acc[c];
  return sum;
}

// One block of a sample whose channels are innermost: elements [begin, end), whole pixels.
template <class Source>
static void block_stats(const LocalPassParams& p, const Source& f, int64_t begin, int64_t end,
                        int64_t period, const Needs& needs, const LocalPassScratch& s) {
  const double pixels = double((end - begin) / p.C), before = double(begin / p.C);
  float *centre = s.table[0], *acc = s.table[3], *acc2 = s.table[4];
  if (needs.squares) {
    add_rows([&](int64_t i, int64_t) { return f.value(i) * f.value(i); }, begin, end, period, acc);
    fold(acc, p.C, period);
    for (int64_t k = 0; k < p.K; ++k)
      s.groups[3 * k + 2] += group_sum(acc, p.offsets[k], p.offsets[k + 1]);
  }
  if (!needs.sum) return;
  add_rows([&](int64_t i, int64_t) { return f.value(i); }, begin, end, period, acc);
  fold(acc, p.C, period);
  for (int64_t k = 0; k < p.K; ++k) {
    const double n = pixels * double(p.offsets[k + 1] - p.offsets[k]);
    const float mean = float(group_sum(acc, p.offsets[k], p.offsets[k + 1]) / n);
    for (int64_t c = p.offsets[k]; c < p.offsets[k + 1]; ++c) centre[c] = mean;
    if (!needs.centred) merge(s.groups + 3 * k, before * (n / pixels), n, mean, 0.);
  }
  if (!needs.centred) return;
  for (int64_t j = p.C; j < period; ++j) centre[j] = centre[j - p.C];
  add_centred_rows(f, [=](int64_t j) { return centre[j]; }, begin, end, period, acc, acc2);
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
