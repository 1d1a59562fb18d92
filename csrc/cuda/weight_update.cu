// The optimizer step on CUDA: one read of the gradient, one read and write of weight and states.
// (The weight gradient itself is a library convolution or the Triton kernel on this back-end.)
#include <type_traits>

#include "../ops.h"
#include "chunk.cuh"
#include "optimizer.cuh"
#include "runtime.h"

namespace ff {
namespace {

// V numbers of `dtype` at element i.
template <class T, int V>
__device__ __forceinline__ void load_numbers(const void* from, int64_t i, float* x) {
  const Pack<T, V> raw = *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(from) + i);
#pragma unroll
  for (int j = 0; j < V; ++j) x[j] = to_float(raw.v[j]);
}
template <int V>
__device__ __forceinline__ void load_gradient(const OptimizerStepParams& p, int64_t i, float* x) {
  switch (p.grad_dtype) {
    case DType::f32: return load_numbers<float, V>(p.grad, i, x);
    case DType::bf16: return load_numbers<__nv_bfloat16, V>(p.grad, i, x);
    case DType::f16: return load_numbers<__half, V>(p.grad, i, x);
  }
}

template <class T, int V>
__device__ __forceinline__ void store_numbers(void* to, int64_t i, const float* x) {
  Pack<T, V> out;
#pragma unroll
  for (int j = 0; j < V; ++j) out.v[j] = from_float<T>(x[j]);
  *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(to) + i) = out;
}

// V weights a thread. (An index with an offset added made the compiler store element by element.)
template <int V>
__global__ void __launch_bounds__(kThreads)
    optimizer_step(const __grid_constant__ OptimizerStepParams p,
                   const __grid_constant__ StepCoefficients given) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (i + V > p.n) return;
  float g[V], w[V], m[V] = {}, v[V] = {};
  load_gradient<V>(p, i, g);
  load_numbers<float, V>(p.weight, i, w);
  if (p.m != nullptr) load_numbers<float, V>(p.m, i, m);
  if (p.v != nullptr) load_numbers<float, V>(p.v, i, v);
  const StepCoefficients k = coefficients_of(given, p.optim.row);
#pragma unroll
  for (int j = 0; j < V; ++j) step_weight(k, g[j] * p.inv_scale, w[j], m[j], v[j]);
  store_numbers<float, V>(p.weight, i, w);
  if (p.m != nullptr) store_numbers<float, V>(p.m, i, m);
  if (p.v != nullptr) store_numbers<float, V>(p.v, i, v);
  if (p.half == nullptr) return;
  if (p.half_dtype == DType::bf16) store_numbers<__nv_bfloat16, V>(p.half, i, w);
  else store_numbers<__half, V>(p.half, i, w);
}

template <int V>
void launch(const OptimizerStepParams& p, const StepCoefficients& k, cudaStream_t stream) {
  if (p.n == 0) return;
  optimizer_step<V><<<blocks_for(p.n, kThreads * V), kThreads, 0, stream>>>(p, k);
  FF_CUDA(cudaGetLastError());
}

// The weights from `first` on.
OptimizerStepParams rest_of(OptimizerStepParams p, int64_t first) {
  const auto skip = [first](auto*& t, DType dtype) {
    if (t == nullptr) return;
    using Pointer = std::remove_reference_t<decltype(t)>;
    t = reinterpret_cast<Pointer>(reinterpret_cast<uintptr_t>(t) + first * item_size(dtype));
  };
  skip(p.weight, DType::f32), skip(p.m, DType::f32), skip(p.v, DType::f32);
  skip(p.grad, p.grad_dtype), skip(p.half, p.half_dtype);
  p.n -= first;
  return p;
}

// Does every tensor begin on a whole vector of four of its numbers?
bool quads_aligned(const OptimizerStepParams& p) {
  const auto off = [](const void* t, DType dtype) {
    return reinterpret_cast<uintptr_t>(t) % (4 * item_size(dtype));
  };
  return off(p.weight, DType::f32) + off(p.m, DType::f32) + off(p.v, DType::f32) +
             off(p.grad, p.grad_dtype) + off(p.half, p.half_dtype) == 0;
}

}  // namespace

void optimizer_step_cuda(const OptimizerStepParams& p, void* stream) {
  if (p.n == 0) return;
  FF_CHECK(p.optim.kind == Optim::sgd || (p.m != nullptr && p.v != nullptr),
           "[optimizer] adam and adamw expected states m and v, got none");
  const DeviceOf current(p.weight);
  const auto queue = static_cast<cudaStream_t>(stream);
  const StepCoefficients k = step_coefficients(p.optim, p.m != nullptr);
  const int64_t whole = quads_aligned(p) ? p.n / 4 * 4 : 0;
  OptimizerStepParams quads = p;
  quads.n = whole;
  launch<4>(quads, k, queue);
  launch<1>(rest_of(p, whole), k, queue);
}

}  // namespace ff
