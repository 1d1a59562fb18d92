// linear_step on CUDA, what is neither a product (the library's) nor local_pass: a row's scale, the
// bias and the column sums; see LinearStepParams in csrc/params.h. No atomics; every sum's order is
// fixed.
#include "../ops.h"
#include "chunk.cuh"
#include "runtime.h"

namespace ff {
namespace {

constexpr int kRows = kThreads / 32;  // rows of a block: a warp each

// scale[n] = 1 / (||x[n]|| + eps), a[n] = scale[n] * from[n] + bias. Vectors of VX and VA elements.
template <class T, int VX, int VA>
__global__ void __launch_bounds__(kThreads)
    linear_prepare(const __grid_constant__ LinearStepParams p) {
  const int64_t n = int64_t(blockIdx.x) * kRows + threadIdx.x / 32;
  const int lane = int(threadIdx.x) % 32;
  if (n >= p.N) return;
  const T* x = static_cast<const T*>(p.x) + n * p.in;
  float sum = 0.f;
  for (int64_t i = lane * VX; i < p.in; i += 32 * VX) {
    const Pack<T, VX> raw = *reinterpret_cast<const Pack<T, VX>*>(x + i);
#pragma unroll
    for (int v = 0; v < VX; ++v) sum += to_float(raw.v[v]) * to_float(raw.v[v]);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  const float scale = 1.f / (sqrtf(p.rms ? sum / float(p.in) : sum) + p.eps);
  if (lane == 0 && p.scale != nullptr) p.scale[n] = scale;
  const T* from = static_cast<const T*>(p.from) + n * p.out;
  T* a = static_cast<T*>(p.a) + n * p.out;
  for (int64_t i = lane * VA; i < p.out; i += 32 * VA) {
    Pack<T, VA> raw = *reinterpret_cast<const Pack<T, VA>*>(from + i);
#pragma unroll
    for (int v = 0; v < VA; ++v)
      raw.v[v] = from_float<T>(to_float(raw.v[v]) * scale + (p.bias ? p.bias[i + v] : 0.f));
    *reinterpret_cast<Pack<T, VA>*>(a + i) = raw;
  }
}

// sums[chunk, c] = sum of da[n, c] over the chunk's rows, then da[n] *= scale[n]. A thread owns V
// columns of a chunk; `parts` blocks share its columns.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    linear_finish(const __grid_constant__ LinearStepParams p, unsigned parts) {
  const int64_t c = (int64_t(blockIdx.x % parts) * blockDim.x + threadIdx.x) * V;
  if (c >= p.out) return;
  const int64_t chunk = blockIdx.x / parts;
  const int64_t first = chunk * p.chunk, last = min(first + p.chunk, p.N);
  float sums[V] = {};
#pragma unroll 4
  for (int64_t n = first; n < last; ++n) {
    T* at = static_cast<T*>(p.a) + n * p.out + c;
    Pack<T, V> raw = *reinterpret_cast<const Pack<T, V>*>(at);
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] += to_float(raw.v[v]);
    if (p.scale == nullptr) continue;
    const float scale = p.scale[n];
#pragma unroll
    for (int v = 0; v < V; ++v) raw.v[v] = from_float<T>(to_float(raw.v[v]) * scale);
    *reinterpret_cast<Pack<T, V>*>(at) = raw;
  }
  if (p.sums == nullptr) return;
#pragma unroll
  for (int v = 0; v < V; ++v) p.sums[chunk * p.out + c + v] = sums[v];
}

bool whole_vectors(const void* base, int64_t row, int V, int bytes) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && row % V == 0 && V * bytes == 16;
}

template <class T>
void prepare(const LinearStepParams& p, cudaStream_t stream) {
  constexpr int V = kVector<T>;
  const bool wide_x = whole_vectors(p.x, p.in, V, sizeof(T));
  const bool wide_a = whole_vectors(p.a, p.out, V, sizeof(T)) &&
                      whole_vectors(p.from, p.out, V, sizeof(T));
  const unsigned blocks = blocks_for(p.N, kRows);
  if (wide_x && wide_a) {
    linear_prepare<T, V, V><<<blocks, kThreads, 0, stream>>>(p);
  } else if (wide_x) {
    linear_prepare<T, V, 1><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    linear_prepare<T, 1, 1><<<blocks, kThreads, 0, stream>>>(p);
  }
}

template <class T, int V>
void launch_finish(const LinearStepParams& p, cudaStream_t stream) {
  const int64_t vectors = p.out / V;
  const int threads = int(std::min<int64_t>(kThreads, (vectors + 31) / 32 * 32));
  const unsigned parts = blocks_for(vectors, threads), chunks = blocks_for(p.N, p.chunk);
  linear_finish<T, V><<<grid_of(int64_t(parts) * chunks), threads, 0, stream>>>(p, parts);
}

template <class T>
void finish(const LinearStepParams& p, cudaStream_t stream) {
  constexpr int V = kVector<T>;
  if (whole_vectors(p.a, p.out, V, sizeof(T))) {
    launch_finish<T, V>(p, stream);
  } else {
    launch_finish<T, 1>(p, stream);
  }
}

}  // namespace

void linear_prepare_cuda(const LinearStepParams& p, void* stream) {
  if (p.N == 0) return;
  const DeviceOf current(p.a);
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f32: prepare<float>(p, queue); break;
    case DType::bf16: prepare<__nv_bfloat16>(p, queue); break;
    case DType::f16: prepare<__half>(p, queue); break;
  }
  FF_CUDA(cudaGetLastError());
}

void linear_finish_cuda(const LinearStepParams& p, void* stream) {
  if (p.N == 0 || p.out == 0) return;
  const DeviceOf current(p.a);
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f32: finish<float>(p, queue); break;
    case DType::bf16: finish<__nv_bfloat16>(p, queue); break;
    case DType::f16: finish<__half>(p, queue); break;
  }
  FF_CUDA(cudaGetLastError());
}

}  // namespace ff
