// Optimizer steps on contiguous runs of weights, one copy per instruction set.
#pragma once
#include <cstdint>

#include "../params.h"
#include "isa.h"

namespace ff {

// OptimParams as the fp32 numbers the loops use, every difference and power taken in double.
struct StepCoefficients {
  Optim kind;
  bool nesterov;
  bool has_m;            // sgd: momentum is not 0
  float lr;              // sgd
  float decay;           // adamw: 1 - lr weight_decay, else 1
  float l2;              // sgd, adam: weight_decay, else 0
  float momentum;
  float one_minus_beta1, beta2, one_minus_beta2;
  float step_size;       // lr / (1 - beta1^step)
  float inv_root;         // 1 / sqrt(1 - beta2^step)
  float eps;
};

StepCoefficients step_coefficients(const OptimParams& optim, bool has_m);

constexpr int64_t kStateRun = 64;  // blocks of kStateBlock a task: 96 KB in 8 bits

}  // namespace ff

// optimizer_run: one step on n weights with gradient g * inv_scale.
// compressed_run: one step on the elements first… first + n of p, `first` a multiple of kStateBlock.
// gradient_run: g *= inv_scale; with `sum`, g and sum become sum + g (`add`) or sum becomes g; with
// `out`, out becomes g.
FF_ISA_DECLARE(
    void optimizer_run(const StepCoefficients& k, int64_t n, const float* g, float inv_scale,
                       float* w, float* m, float* v);
    void compressed_run(const CompressedStepParams& p, const StepCoefficients& k, int64_t first,
                        int64_t n);
    void gradient_run(int64_t n, float* g, float inv_scale, float* sum, bool add, float* out))
