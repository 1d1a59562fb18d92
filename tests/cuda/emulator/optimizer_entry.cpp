// The emulated optimizer steps behind C functions. Their coefficients are formed by the CPU's own
// sources, whose kernels come along.
#include "compressed_step.cu.cpp"
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

// pointers: weight, m, v, gradient.
extern "C" void emulate_step(void* const* pointers, int64_t n, double inv_scale,
                             const int64_t* ints, const double* reals) {
  float* const* p = reinterpret_cast<float* const*>(pointers);
  ff::optimizer_step_cuda(p[0], p[1], p[2], p[3], n, float(inv_scale), optim_of(ints, reals),
                          nullptr);
}

// pointers: weight, grad, m, v, m_scale, v_scale; numbers: n, format, bf16_weight, seed, stream.
extern "C" void emulate_compressed(void* const* pointers, const int64_t* numbers, double inv_scale,
                                   const int64_t* ints, const double* reals) {
  ff::CompressedStepParams p{};
  p.weight = pointers[0], p.grad = static_cast<const float*>(pointers[1]);
  p.m = pointers[2], p.v = pointers[3];
  p.m_scale = static_cast<float*>(pointers[4]), p.v_scale = static_cast<float*>(pointers[5]);
  p.n = numbers[0], p.format = ff::StateFormat(numbers[1]), p.bf16_weight = numbers[2] != 0;
  p.seed = uint64_t(numbers[3]), p.stream = uint32_t(numbers[4]);
  p.inv_scale = float(inv_scale);
  p.optim = optim_of(ints, reals);
  ff::compressed_step_cuda(p, nullptr);
}
