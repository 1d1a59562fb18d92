// The emulated optimizer steps behind C functions. Their coefficients are formed by the CPU's own
// sources, whose kernels come along.
#include "compressed_step.cu.cpp"
#include "entry.h"
#include "weight_update.cu.cpp"

#define FF_ISA baseline
#include "cpu/compressed_kernel.cpp"
#include "cpu/isa.cpp"
#include "cpu/optimizer.cpp"
#include "cpu/optimizer_kernel.cpp"

// kind, nesterov, step; lr, weight_decay, beta1, beta2, eps, momentum.
static ff::OptimParams optim_of(const int64_t* ints, const double* reals) {
  ff::OptimParams o{};
  o.kind = ff::Optim(ints[0]), o.nesterov = ints[1] != 0, o.step = ints[2];
  o.lr = reals[0], o.weight_decay = reals[1];
  o.beta1 = reals[2], o.beta2 = reals[3], o.eps = reals[4], o.momentum = reals[5];
  return o;
}

// Of both steps. tensors: weight, m, v, gradient, 16-bit copy, row; numbers: n, the dtypes of gradient
// and copy.
template <class Params>
static void fill(Params& p, void* const* tensors, const int64_t* numbers, double inv_scale,
                 const int64_t* ints, const double* reals) {
  using Weight = decltype(p.weight);
  using State = decltype(p.m);
  p.weight = static_cast<Weight>(tensors[0]);
  p.m = static_cast<State>(tensors[1]), p.v = static_cast<State>(tensors[2]);
  p.grad = tensors[3], p.half = tensors[4];
  p.n = numbers[0];
  p.grad_dtype = ff::DType(numbers[1]), p.half_dtype = ff::DType(numbers[2]);
  p.inv_scale = float(inv_scale);
  p.optim = optim_of(ints, reals);
  p.optim.row = static_cast<const float*>(tensors[5]);
}

extern "C" int emulate_optimizer_step(void* const* tensors, const int64_t* numbers,
                                      double inv_scale, const int64_t* ints, const double* reals) {
  ff::OptimizerStepParams p{};
  fill(p, tensors, numbers, inv_scale, ints, reals);
  return emulator::guarded([&] { ff::optimizer_step_cuda(p, nullptr); });
}

// And the scales of m and v; numbers: and format, bf16_weight, seed, stream.
extern "C" int emulate_compressed_step(void* const* tensors, const int64_t* numbers,
                                       double inv_scale, const int64_t* ints,
                                       const double* reals) {
  ff::CompressedStepParams p{};
  fill(p, tensors, numbers, inv_scale, ints, reals);
  p.m_scale = static_cast<float*>(tensors[6]), p.v_scale = static_cast<float*>(tensors[7]);
  p.format = ff::StateFormat(numbers[3]), p.bf16_weight = numbers[4] != 0;
  p.seed = uint64_t(numbers[5]), p.stream = uint32_t(numbers[6]);
  return emulator::guarded([&] { ff::compressed_step_cuda(p, nullptr); });
}
