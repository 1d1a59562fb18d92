// Four vectors of V elements in a thread's registers: loading, activation, storing.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/element.h"
#include "../common/layout.h"

namespace ff {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ __half from_float(float x) { return __float2half_rn(x); }

template <class T, int V> struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <class T> constexpr int kVector = 16 / int(sizeof(T));

// Which elements a chunk has: vectors at start + u * step, of which those in [low, high) exist.
struct Span {
  int start, step, low, high;
  template <int V> __device__ __forceinline__ bool full() const {
    return start >= low && start + (kUnroll - 1) * step + V <= high;
  }
};

// The vector at `at`, elements outside [low, high) as 0; bit v says whether element v exists. `whole`:
// all are known to.
template <class T, int V, bool whole = false>
__device__ __forceinline__ uint32_t load_vector(const T* base, int at, int low, int high,
                                                float* x) {
  if (whole || (at >= low && at + V <= high)) {
    const Pack<T, V> raw = *reinterpret_cast<const Pack<T, V>*>(base + at);
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = to_float(raw.v[v]);
    return (1u << V) - 1;
  }
  uint32_t valid = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const bool exists = at + v >= low && at + v < high;
    x[v] = exists ? to_float(base[at + v]) : 0.f;
    valid |= uint32_t(exists) << v;
  }
  return valid;
}

// x[u * V + v] = base[start + u * step + v]; the result's bits say which exist, the others are 0.
// `base` must be aligned to V elements at every vector, or V = 1.
template <class T, int V>
__device__ __forceinline__ uint32_t load_chunk(const T* base, const Span& s, float* x) {
  if (s.full<V>()) {
    Pack<T, V> raw[kUnroll];  // all four loads before the first use
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      raw[u] = *reinterpret_cast<const Pack<T, V>*>(base + (s.start + u * s.step));
#pragma unroll
    for (int i = 0; i < kUnroll * V; ++i) x[i] = to_float(raw[i / V].v[i % V]);
    return kUnroll * V == 32 ? ~0u : (1u << (kUnroll * V & 31)) - 1;
  }
  uint32_t valid = 0;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
    valid |= load_vector<T, V>(base, s.start + u * s.step, s.low, s.high, x + u * V) << (u * V);
  return valid;
}

// Elements outside [low, high) are left alone.
template <class T, int V, bool whole = false>
__device__ __forceinline__ void store_vector(T* base, int at, int low, int high, const float* x) {
  Pack<T, V> out;
#pragma unroll
  for (int v = 0; v < V; ++v) out.v[v] = from_float<T>(x[v]);
  if (whole || (at >= low && at + V <= high)) {
    *reinterpret_cast<Pack<T, V>*>(base + at) = out;
    return;
  }
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (at + v >= low && at + v < high) base[at + v] = out.v[v];
}

// Turns a vector's raw x into h (blended where there is a previous state), in place; bit v of
// `kept` is its dropout. Bit v of the result: does the gradient pass element v?
template <class T, int V, bool whole = false>
__device__ __forceinline__ uint32_t activate_vector(const LocalPassParams& p, const T* previous,
                                                    int at, int low, int high, float* x,
                                                    uint32_t kept) {
  uint32_t passing = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const bool keep = kept >> v & 1;
    passing |= uint32_t(passes(p, x[v], keep)) << v;
    x[v] = activation(p, x[v], keep);
  }
  if (previous != nullptr) {
    float old[V];
    load_vector<T, V, whole>(previous, at, low, high, old);
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = blended(p, x[v], old[v]);
  }
  return passing;
}

// One sample: where it lies, and what its dropout counts from.
struct Sample {
  int64_t n, base, z_base;  // first element in a and da; in z
  uint64_t index;
  uint32_t step;
};

__device__ __forceinline__ Sample sample_of(const LocalPassParams& p, int64_t n) {
  const DropoutParams& d = p.dropout;
  return {n, n * p.C * p.H * p.W, n * p.z_channels * pixels_out(p), row_index(p, n),
          d.clock != nullptr ? *d.clock : d.step};
}

// Memory offset in a sample of channel c, pixel (y, x) of an H x W map of C channels.
__device__ __forceinline__ int offset_in_sample(const LocalPassParams& p, int c, int y, int x,
                                                int H, int W, int64_t C) {
  return p.channels_last ? (y * W + x) * int(C) + c : (c * H + y) * W + x;
}

// One 2x2 window of one channel: its winner, and the winner's raw value and mask bit.
struct Window {
  Winner winner;
  float x = 0.f;
  bool keep = true;
};

template <class T>
__device__ __forceinline__ Window pool_window(const LocalPassParams& p, const Sample& s,
                                              const T* sample, int c, int y, int x) {
  const int H = int(p.H), W = int(p.W);
  Window out;
#pragma unroll 1
  for (int row = 0; row < 2; ++row) {
    const uint64_t i = s.index + uint64_t((c * H + 2 * y + row) * W + 2 * x);
    const uint32_t bits = p.dropout.threshold ? keep_bits(p.dropout, s.step, i, 1) : ~0u;
    for (int column = 0; column < 2; ++column) {
      const float value =
          to_float(sample[offset_in_sample(p, c, 2 * y + row, 2 * x + column, H, W, p.C)]);
      const bool keep = bits >> column & 1;
      const int before = out.winner.index;
      const bool first = row == 0 && column == 0;
      out.winner.offer(activation(p, value, keep), row * 2 + column);
      if (first || out.winner.index != before) out.x = value, out.keep = keep;
    }
  }
  return out;
}

}  // namespace ff
