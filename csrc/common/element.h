// The formulas of local_pass on one element, one group and one sample; no memory access.
#pragma once
#include <math.h>

#include "../params.h"
#include "macros.h"
#include "moments.h"

namespace ff {

// relu, then dropout; a NaN stays a NaN, also when dropped, as in torch.
FF_HD float activation(const LocalPassParams& p, float x, bool keep) {
  const float h = x < 0.f ? 0.f : x;
  return keep || h != h ? h * p.dropout.keep_scale : 0.f;
}

// Is d activation / d x not 0? It is keep_scale then.
FF_HD bool passes(const LocalPassParams& p, float x, bool keep) {
  return keep && (p.straight_through || x > 0.f);
}

FF_HD float blended(const LocalPassParams& p, float h, float previous) {
  return p.blend * h + (1.f - p.blend) * previous;
}

// What the second sweep needs of an element's group.
struct GroupScale {
  float mean, rstd, coef;  // coef: times everything that d(goodness)/dh does not take from h
};

FF_HD GroupScale group_scale(const LocalPassParams& p, float mean, float rstd, float coef) {
  const float two = p.goodness == Goodness::mean ? 1.f : 2.f;
  return {mean, rstd, coef * (p.da_scale * p.blend * two)};
}

FF_HD float normalised(const GroupScale& s, float h) { return (h - s.mean) * s.rstd; }

// A product, not a choice: a NaN in coef must reach da wherever the reference has it.
FF_HD float gradient(const LocalPassParams& p, const GroupScale& s, float h, bool passing) {
  return (p.goodness == Goodness::mean ? s.coef : s.coef * h) *
         (passing ? p.dropout.keep_scale : 0.f);
}

FF_HD float sum_of_squares(const Moments& m) { return m.m2 + m.count * m.mean * m.mean; }

FF_HD float goodness_of(Goodness kind, const Moments& m) {
  if (kind == Goodness::mean) return m.mean;
  return kind == Goodness::sum_sq ? sum_of_squares(m) : sum_of_squares(m) / m.count;
}

FF_HD bool norm_spans_sample(const LocalPassParams& p) {
  return p.norm == NormKind::layer || (p.norm == NormKind::length && !p.norm_per_group);
}

// (mean, rstd) of z = (h - mean) * rstd, from the moments of what the norm spans.
FF_HD void norm_stats(const LocalPassParams& p, const Moments& m, float* stats) {
  stats[0] = 0.f, stats[1] = 1.f;
  if (p.norm == NormKind::group || p.norm == NormKind::layer) {
    stats[0] = m.mean;
    stats[1] = 1.f / sqrtf(m.m2 / m.count + p.norm_eps);
  } else if (p.norm == NormKind::length) {
    const float square = sum_of_squares(m);
    stats[1] = 1.f / (sqrtf(p.norm_rms ? square / m.count : square) + p.norm_eps);
  }
}

// 2x2 max-pool, first in row-major order on ties and the last NaN if there is one, as in torch.
struct Winner {
  float h = -INFINITY;
  int index = 0;
  FF_HD void offer(float value, int i) {
    if (value > h || value != value) h = value, index = i;
  }
};

}  // namespace ff
