// The local losses on one sample's goodness row, once for C++ and CUDA.
//
// `Lanes` is who computes the row together: lanes.rank(), lanes.size(), lanes.sum(x), lanes.max(x)
// (one thread on the CPU, a warp or block on the GPU; sum and max return the same value to every
// lane). g has K entries visible to every lane; each lane fills its own entries of dg, with
// dg[k] = d loss / d g[k], unscaled. Every lane returns the row's loss.
// Sources and formulas in ffengine/ops/config.py's docstrings.
#pragma once
#include <math.h>

#include "../params.h"
#include "macros.h"

namespace ff {

struct OneLane {
  FF_HD int rank() const { return 0; }
  FF_HD int size() const { return 1; }
  FF_HD float sum(float x) const { return x; }
  FF_HD float max(float x) const { return x; }
};

// log(1 + e^x) without overflow, and its derivative.
FF_HD float softplus(float x) { return fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))); }
FF_HD float sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return (x >= 0.f ? 1.f : e) / (1.f + e);
}

template <class Lanes>
FF_HD float ce_row(int K, const float* g, int y, float* dg, float weight, const Lanes& lanes) {
  float top = -INFINITY, total = 0.f;
  for (int k = lanes.rank(); k < K; k += lanes.size()) top = fmaxf(top, g[k]);
  top = lanes.max(top);
  for (int k = lanes.rank(); k < K; k += lanes.size()) total += expf(g[k] - top);
  total = lanes.sum(total);
  for (int k = lanes.rank(); k < K; k += lanes.size())
    dg[k] = weight * (expf(g[k] - top) / total - (k == y ? 1.f : 0.f));
  // A NaN goodness must reach the loss: fmaxf drops it, the sum does not.
  return weight * (logf(total) + (top - g[y]));
}

FF_HD float clip(float x, float c) { return x < -c ? -c : (x > c ? c : x); }

template <class Lanes>
FF_HD float cwc_row(const LossParams& p, int K, const float* g, int y, float* dg, const Lanes& lanes) {
  const float c = p.p0, eps = p.p1;
  float total = 0.f;
  for (int k = lanes.rank(); k < K; k += lanes.size()) total += expf(clip(g[k], c));
  total = lanes.sum(total) + eps;
  const float own = expf(clip(g[y], c)) + eps;
  for (int k = lanes.rank(); k < K; k += lanes.size()) {
    const float e = expf(clip(g[k], c));
    const bool live = g[k] >= -c && g[k] <= c;
    dg[k] = live ? e / total - (k == y ? e / own : 0.f) : 0.f;
  }
  return logf(total) - logf(own);
}

// adds to dg when `add`, so that CWG can stack it on CE
template <class Lanes>
FF_HD float pvn_row(float theta, float weight, int K, const float* g, int y, float* dg, bool add,
                    const Lanes& lanes) {
  float others = 0.f;
  for (int k = lanes.rank(); k < K; k += lanes.size()) others += k == y ? 0.f : g[k];
  others = lanes.sum(others) / float(K - 1);
  const float d_own = -weight * sigmoid(theta - g[y]);
  const float d_other = weight * sigmoid(others - theta) / float(K - 1);
  for (int k = lanes.rank(); k < K; k += lanes.size())
    dg[k] = (add ? dg[k] : 0.f) + (k == y ? d_own : d_other);
  return weight * (softplus(theta - g[y]) + softplus(others - theta));
}

// The threshold tau of sparsemax by Michelot's finite iteration: no sort, same on every back-end.
template <class Lanes>
FF_HD float sparsemax_row(int K, const float* g, int y, float* dg, const Lanes& lanes) {
  float top = -INFINITY;
  for (int k = lanes.rank(); k < K; k += lanes.size()) top = fmaxf(top, g[k]);
  top = lanes.max(top);
  float tau = -INFINITY, count = -1.f;
  for (int round = 0; round <= K; ++round) {
    float n = 0.f, total = 0.f;
    for (int k = lanes.rank(); k < K; k += lanes.size())
      if (g[k] - top > tau) n += 1.f, total += g[k] - top;
    n = lanes.sum(n);
    total = lanes.sum(total);
    if (n == count || !(n > 0.f)) break;
    count = n;
    tau = (total - 1.f) / n;
  }
  float squares = 0.f;
  for (int k = lanes.rank(); k < K; k += lanes.size()) {
    const float v = g[k] - top;
    const float p = v > tau ? v - tau : 0.f;
    squares += v > tau ? v * v - tau * tau : 0.f;
    dg[k] = p - (k == y ? 1.f : 0.f);
  }
  // 1/2 sum_S (v^2 - tau^2) + 1/2 - v_y; shifting every g by top leaves the loss as it is. A NaN
  // anywhere in the row must reach the loss, and fmaxf and the comparisons drop it.
  float all = 0.f;
  for (int k = lanes.rank(); k < K; k += lanes.size()) all += 0.f * g[k];
  return 0.5f * lanes.sum(squares) + 0.5f + (top - g[y]) + lanes.sum(all);
}

// +1 for a positive row, -1 for a negative one.
FF_HD float side(int y) { return y > 0 ? 1.f : -1.f; }

FF_HD float threshold_value(const LossParams& p, float g, int y, float* dg) {
  const float s = side(y) * p.p1;
  *dg = -s * sigmoid(-s * (g - p.p0));
  return softplus(-s * (g - p.p0));
}

// One (positive, negative) pair; d/dg_pos, d/dg_neg = -d/dg_pos.
FF_HD float symba_pair(const LossParams& p, float g_pos, float g_neg, float* dg_pos) {
  const float x = -p.p0 * (g_pos - g_neg);
  *dg_pos = -p.p0 * sigmoid(x);
  return softplus(x);
}

// Every loss of one row but symba, which needs its partner.
template <class Lanes>
FF_HD float loss_row(const LossParams& p, int K, const float* g, int y, float* dg, const Lanes& lanes) {
  switch (p.kind) {
    case Loss::ce: return ce_row(K, g, y, dg, 1.f, lanes);
    case Loss::cwc: return cwc_row(p, K, g, y, dg, lanes);
    case Loss::pvn: return pvn_row(p.p0, p.p1, K, g, y, dg, false, lanes);
    case Loss::sparsemax: return sparsemax_row(K, g, y, dg, lanes);
    case Loss::cwg: {
      const float first = ce_row(K, g, y, dg, p.p0, lanes);
      return first + pvn_row(p.p1, (1.f - p.p0) * p.p2, K, g, y, dg, true, lanes);
    }
    case Loss::threshold: {
      float d;
      const float value = threshold_value(p, g[0], y, &d);
      if (lanes.rank() == 0) dg[0] = d;
      return value;
    }
    case Loss::margin: {
      const int k0 = int(p.p0);
      for (int k = lanes.rank(); k < K; k += lanes.size()) dg[k] = k == k0 ? -side(y) : 0.f;
      return -side(y) * g[k0];
    }
    default: return 0.f;
  }
}

}  // namespace ff
