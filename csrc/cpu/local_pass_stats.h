// local_pass, second part: per group mean, centred M2 and sum of squares of the features of one
// sample. Blocks that fit L1 are centred about their own mean and merged by Chan's formula; the
// second sweep of a block also sums h - mean, which takes the rounding of that mean back out.
#pragma once
#include "local_pass_kernel.h"
#include "local_pass_prepare.h"
#include "sums.h"

namespace ff {
namespace FF_ISA {

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
