// The optimizer step on CUDA: one read of the gradient, one read and write of weight and states.
// (The weight gradient itself is a library convolution or the Triton kernel on this back-end.)
#include "../ops.h"
#include "chunk.cuh"
#include "optimizer.cuh"
#include "runtime.h"

namespace ff {
namespace {

// V weights a thread; m and v are null where the optimizer has none.
template <int V>
__global__ void __launch_bounds__(kThreads)
    optimizer_step(const __grid_constant__ StepCoefficients k, int64_t n, float inv_scale,
                   const float* grad, float* weight, float* first, float* second) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (i + V > n) return;
  using Vector = Pack<float, V>;
  const Vector g = *reinterpret_cast<const Vector*>(grad + i);
  Vector w = *reinterpret_cast<const Vector*>(weight + i), m{}, v{};
  if (first != nullptr) m = *reinterpret_cast<const Vector*>(first + i);
  if (second != nullptr) v = *reinterpret_cast<const Vector*>(second + i);
#pragma unroll
  for (int j = 0; j < V; ++j) step_weight(k, g.v[j] * inv_scale, w.v[j], m.v[j], v.v[j]);
  *reinterpret_cast<Vector*>(weight + i) = w;
  if (first != nullptr) *reinterpret_cast<Vector*>(first + i) = m;
  if (second != nullptr) *reinterpret_cast<Vector*>(second + i) = v;
}

template <int V>
void launch(const StepCoefficients& k, int64_t n, float inv_scale, const float* grad, float* weight,
            float* m, float* v, cudaStream_t stream) {
  const int64_t blocks = (n / V + kThreads - 1) / kThreads;
  if (blocks == 0) return;
  optimizer_step<V><<<unsigned(blocks), kThreads, 0, stream>>>(k, n, inv_scale, grad, weight, m, v);
  FF_CUDA(cudaGetLastError());
}

}  // namespace

void optimizer_step_cuda(float* weight, float* m, float* v, const float* grad, int64_t n,
                         float inv_scale, const OptimParams& optim, void* stream) {
  if (n == 0) return;
  FF_CHECK(optim.kind == Optim::sgd || (m != nullptr && v != nullptr),
           "[optimizer] adam and adamw expected states m and v, got none");
  const DeviceOf current(weight);
  const auto queue = static_cast<cudaStream_t>(stream);
  const StepCoefficients k = step_coefficients(optim, m != nullptr);
  const auto bits = reinterpret_cast<uintptr_t>(weight) | reinterpret_cast<uintptr_t>(grad) |
                    reinterpret_cast<uintptr_t>(m) | reinterpret_cast<uintptr_t>(v);
  const int64_t whole = bits % 16 == 0 ? n / 4 * 4 : 0;
  launch<4>(k, whole, inv_scale, grad, weight, m, v, queue);
  launch<1>(k, n - whole, inv_scale, grad + whole, weight + whole, m ? m + whole : nullptr,
            v ? v + whole : nullptr, queue);
}

}  // namespace ff
