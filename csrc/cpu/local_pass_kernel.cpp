// local_pass on one sample: prepare (dropout, pool, blend) -> group statistics -> goodness, loss,
// coef, norm -> z and da. Compiled once per instruction set; see csrc/cpu/isa.h.
#include "local_pass_kernel.h"

#include <math.h>

#include <type_traits>

#include "../common/losses.h"
#include "local_pass_apply.h"
#include "local_pass_prepare.h"
#include "local_pass_stats.h"

namespace ff {
namespace FF_ISA {
namespace {

double length_factor(const LocalPassParams& p, double squares, double m) {
  return 1. / (sqrt(p.norm_rms ? squares / m : squares) + p.norm_eps);
}

// (mean, rstd) of every group from the sample's moments, in p.stats.
void write_norms(const LocalPassParams& p, const LocalPassPlan& plan, int64_t row,
                 const double* groups) {
  const auto size = [&](int64_t k) {
    return double((p.offsets[k + 1] - p.offsets[k]) * plan.pixels_z);
  };
  double whole[3] = {0., 0., 0.}, count = 0.;
  for (int64_t k = 0; k < p.K; ++k) {
    merge(whole, count, size(k), groups[3 * k], groups[3 * k + 1]);
    whole[2] += groups[3 * k + 2];
    count += size(k);
  }
  for (int64_t k = 0; k < p.K; ++k) {
    const bool by_sample =
        p.norm == NormKind::layer || (p.norm == NormKind::length && !p.norm_per_group);
    const double* of = by_sample ? whole : groups + 3 * k;
    const double m = by_sample ? count : size(k);
    double mean = 0., rstd = 1.;
    if (p.norm == NormKind::length) {
      rstd = length_factor(p, of[2], m);
    } else if (p.norm != NormKind::none) {
      mean = of[0];
      rstd = 1. / sqrt(of[1] / m + double(p.norm_eps));
    }
    p.stats[2 * (row * p.K + k)] = float(mean);
    p.stats[2 * (row * p.K + k) + 1] = float(rstd);
  }
}

void write_goodness(const LocalPassParams& p, const LocalPassPlan& plan, int64_t row,
                    const double* groups) {
  for (int64_t k = 0; k < p.K; ++k) {
    const double m = double((p.offsets[k + 1] - p.offsets[k]) * plan.pixels_z);
    const double* of = groups + 3 * k;
    const double g = p.goodness == Goodness::mean     ? of[0]
                     : p.goodness == Goodness::sum_sq ? of[2]
                                                      : of[2] / m;
    const int64_t at = row * p.K + k;
    p.g[at] = float(g) + (p.g0 == nullptr ? 0.f : p.g0[at]);
  }
}

// dL/dg, in p.coef, becomes coef = scale * dL/dg / m.
void scale_coef(const LocalPassParams& p, const LocalPassPlan& plan, int64_t row) {
  for (int64_t k = 0; k < p.K; ++k) {
    const float m = float((p.offsets[k + 1] - p.offsets[k]) * plan.pixels_z);
    p.coef[row * p.K + k] *= p.loss_params.scale / (p.goodness == Goodness::sum_sq ? 1.f : m);
  }
}

void write_loss(const LocalPassParams& p, const LocalPassPlan& plan, int64_t item) {
  const LossParams& loss = p.loss_params;
  if (loss.kind == Loss::none) return;
  if (loss.kind == Loss::symba) {
    const int64_t partner = item + p.N / 2;
    float slope;
    p.loss[item] = symba_pair(loss, p.g[item], p.g[partner], &slope);
    p.coef[item] = slope;
    p.coef[partner] = -slope;
    scale_coef(p, plan, partner);
  } else {
    p.loss[item] = loss_row(loss, int(p.K), p.g + item * p.K, int(p.y[item]),
                            p.coef + item * p.K, OneLane{});
  }
  scale_coef(p, plan, item);
}

// f(row, slot, source) with the features of a row, wherever they lie.
template <class T, class F>
void with_source(const LocalPassParams& p, const LocalPassPlan& plan, int64_t row, int slot,
                 const LocalPassScratch& s, const F& f) {
  if (plan.keeps_full) {
    const float* full = full_of(p, plan, row, slot, s);
    f(FromScratch<T>{plan.keeps_features ? s.features[slot] : full, full});
  } else {
    f(FromInput<T>{static_cast<const T*>(p.a) + row * p.C * plan.pixels});
  }
}

template <class T>
void item_of(const LocalPassParams& p, const LocalPassPlan& plan, int64_t item,
             const LocalPassScratch& s) {
  const int samples = p.loss_params.kind == Loss::symba ? 2 : 1;
  for (int slot = 0; slot < samples; ++slot) {
    const int64_t row = item + slot * (p.N / 2);
    if (plan.keeps_full) prepare<T>(p, plan, row, slot, s);
    if (p.phase == Phase::apply) continue;
    with_source<T>(p, plan, row, slot, s, [&](const auto& f) { sample_stats(p, plan, f, s); });
    write_goodness(p, plan, row, s.groups);
    write_norms(p, plan, row, s.groups);
  }
  if (p.phase == Phase::fused) write_loss(p, plan, item);
  if (p.phase == Phase::stats) return;
  for (int slot = 0; slot < samples; ++slot) {
    const int64_t row = item + slot * (p.N / 2);
    with_source<T>(p, plan, row, slot, s, [&](const auto& f) {
      apply<std::decay_t<decltype(f)>, T>(p, plan, row, slot, f, s);
    });
  }
}

}  // namespace

void local_pass_item(const LocalPassParams& p, const LocalPassPlan& plan, int64_t item,
                     const LocalPassScratch& scratch) {
  switch (p.dtype) {
    case DType::f32: return item_of<float>(p, plan, item, scratch);
    case DType::bf16: return item_of<bf16>(p, plan, item, scratch);
    case DType::f16: return item_of<f16>(p, plan, item, scratch);
  }
}

}  // namespace FF_ISA
}  // namespace ff
