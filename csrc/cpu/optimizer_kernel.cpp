#include "optimizer_kernel.h"

#include <cmath>

namespace ff::FF_ISA {
namespace {

template <bool kDecoupled>
void adam(const StepCoefficients& k, int64_t n, const float* __restrict g, float inv_scale,
          float* __restrict w, float* __restrict m, float* __restrict v) {
  const StepCoefficients c = k;
  for (int64_t i = 0; i < n; ++i) {
    const float weight = kDecoupled ? w[i] * c.decay : w[i];
    const float grad = kDecoupled ? g[i] * inv_scale : g[i] * inv_scale + c.l2 * weight;
    const float m1 = m[i] + c.one_minus_beta1 * (grad - m[i]);
    const float v1 = v[i] * c.beta2 + c.one_minus_beta2 * (grad * grad);
    m[i] = m1;
    v[i] = v1;
    w[i] = weight - c.step_size * (m1 / (std::sqrt(v1) * c.inv_root + c.eps));
  }
}

void sgd(const StepCoefficients& k, int64_t n, const float* __restrict g, float inv_scale,
         float* __restrict w) {
  const float lr = k.lr, l2 = k.l2;
  for (int64_t i = 0; i < n; ++i) w[i] -= lr * (g[i] * inv_scale + l2 * w[i]);
}

template <bool kNesterov>
void sgd_momentum(const StepCoefficients& k, int64_t n, const float* __restrict g, float inv_scale,
                  float* __restrict w, float* __restrict m) {
  const StepCoefficients c = k;
  for (int64_t i = 0; i < n; ++i) {
    const float grad = g[i] * inv_scale + c.l2 * w[i];
    const float m1 = c.momentum * m[i] + grad;
    m[i] = m1;
    w[i] -= c.lr * (kNesterov ? grad + c.momentum * m1 : m1);
  }
}

}  // namespace

void optimizer_run(const StepCoefficients& k, int64_t n, const float* g, float inv_scale, float* w,
                   float* m, float* v) {
  switch (k.kind) {
    case Optim::adam: return adam<false>(k, n, g, inv_scale, w, m, v);
    case Optim::adamw: return adam<true>(k, n, g, inv_scale, w, m, v);
    default:
      if (!k.has_m) return sgd(k, n, g, inv_scale, w);
      return k.nesterov ? sgd_momentum<true>(k, n, g, inv_scale, w, m)
                        : sgd_momentum<false>(k, n, g, inv_scale, w, m);
  }
}

void gradient_run(int64_t n, float* __restrict g, float inv_scale, float* __restrict sum, bool add,
                  float* __restrict out) {
  if (sum && add)
    for (int64_t i = 0; i < n; ++i) sum[i] = g[i] = sum[i] + g[i] * inv_scale;
  else if (sum)
    for (int64_t i = 0; i < n; ++i) sum[i] = g[i] = g[i] * inv_scale;
  else if (inv_scale != 1.f)
    for (int64_t i = 0; i < n; ++i) g[i] *= inv_scale;
  if (out)
    for (int64_t i = 0; i < n; ++i) out[i] = g[i];
}

}  // namespace ff::FF_ISA
