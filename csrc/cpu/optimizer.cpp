#include <algorithm>
#include <cmath>

#include "../common/state_formats.h"
#include "../ops.h"
#include "optimizer_kernel.h"

namespace ff {

StepCoefficients step_coefficients(const OptimParams& o, bool has_m) {
  StepCoefficients k{};
  k.kind = o.kind;
  k.nesterov = o.nesterov;
  k.has_m = has_m;
  k.lr = float(o.lr);
  k.decay = o.kind == Optim::adamw ? float(1.0 - o.lr * o.weight_decay) : 1.f;
  k.l2 = o.kind == Optim::adamw ? 0.f : float(o.weight_decay);
  k.momentum = float(o.momentum);
  k.one_minus_beta1 = float(1.0 - o.beta1);
  k.beta2 = float(o.beta2);
  k.one_minus_beta2 = float(1.0 - o.beta2);
  k.step_size = float(o.lr / (1.0 - std::pow(o.beta1, double(o.step))));
  k.inv_root = float(1.0 / std::sqrt(1.0 - std::pow(o.beta2, double(o.step))));
  k.eps = float(o.eps);
  return k;
}

void optimizer_step_cpu(float* weight, float* m, float* v, const float* grad, int64_t n,
                        float inv_scale, const OptimParams& optim) {
  const StepCoefficients k = step_coefficients(optim, m != nullptr);
  constexpr int64_t kRun = 16384;  // weights a task: 256 KB of four arrays
  const int64_t runs = (n + kRun - 1) / kRun;
#pragma omp parallel for num_threads(num_threads()) schedule(static) if (runs > 1)
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t i = r * kRun, count = std::min(kRun, n - i);
    FF_ISA_CALL(optimizer_run(k, count, grad + i, inv_scale, weight + i, m ? m + i : nullptr,
                              v ? v + i : nullptr))
  }
}

void compressed_step_cpu(const CompressedStepParams& p) {
  const StepCoefficients k = step_coefficients(p.optim, p.m != nullptr);
  const int64_t run = kStateRun * kStateBlock, runs = (p.n + run - 1) / run;
#pragma omp parallel for num_threads(num_threads()) schedule(static) if (runs > 1)
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t first = r * run, count = std::min(run, p.n - first);
    FF_ISA_CALL(compressed_run(p, k, first, count))
  }
}

}  // namespace ff
