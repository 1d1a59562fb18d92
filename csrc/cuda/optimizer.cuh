// The arithmetic of an optimizer step on one weight, for every form that weights and states take.
#pragma once
#include "../cpu/optimizer_kernel.h"

namespace ff {

// The coefficients with what changes from step to step read from `row`, where there is one.
__device__ __forceinline__ StepCoefficients coefficients_of(const StepCoefficients& given,
                                                            const float* row) {
  StepCoefficients k = given;
  if (row == nullptr) return k;
  if (k.kind == Optim::adamw) k.decay = 1.f - row[0];
  else k.l2 = row[0];
  k.lr = k.step_size = row[1];
  k.inv_root = 1.f / row[2];
  return k;
}

// The same operations in the same order as csrc/cpu/optimizer_kernel.cpp.
__device__ __forceinline__ void step_weight(const StepCoefficients& k, float g, float& w, float& m,
                                            float& v) {
  if (k.kind == Optim::sgd) {
    const float grad = g + k.l2 * w;
    m = k.momentum * m + grad;
    w -= k.lr * (!k.has_m ? grad : (k.nesterov ? grad + k.momentum * m : m));
    return;
  }
  const float weight = w * k.decay, grad = g + k.l2 * weight;
  m += k.one_minus_beta1 * (grad - m);
  v = v * k.beta2 + k.one_minus_beta2 * (grad * grad);
  w = weight - k.step_size * (m / (sqrtf(v) * k.inv_root + k.eps));
}

}  // namespace ff
