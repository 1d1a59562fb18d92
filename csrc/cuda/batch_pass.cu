// batch_pass on CUDA: the two sweeps of BatchNorm and those of peer normalisation; reference
// ffengine/reference/batch_pass.py, public op ffengine/ops/batch_pass.py, the arithmetic between
// the sweeps ffengine/ops/batch_stats.py.
//
// A block of sweep 1 holds 32 lanes along the innermost dimension and 8 along the other, so that a
// warp reads 32 neighbours; lanes of a channel are merged in a fixed order by Chan's formula.
#include "../common/batch_norm.h"
#include "../common/moments.h"
#include "../ops.h"
#include "chunk.cuh"
#include "runtime.h"

namespace ff {
namespace {

constexpr int kBatchThreads = 256, kInner = 32, kOuter = kBatchThreads / kInner;
constexpr int kAtOnce = 4;  // positions a thread has in flight

// Positions of a map: pixels, or its 2x2 windows.
struct Grid {
  int columns, count;
};

__device__ __forceinline__ Grid windows_of(const BatchPassParams& p) {
  return {int(p.W) / 2, (int(p.H) / 2) * (int(p.W) / 2)};
}

// Offset in a sample of channel c, pixel (y, x) of a map `width` wide with `pixels` pixels.
__device__ __forceinline__ int64_t offset_of(const BatchPassParams& p, int c, int y, int x,
                                             int width, int64_t pixels) {
  const int64_t pixel = int64_t(y) * width + x;
  return p.channels_last ? pixel * p.C + c : c * pixels + pixel;
}

// The four h of window (row, column) of channel c.
template <class T>
__device__ __forceinline__ void load_window(const BatchPassParams& p, const T* sample, int c,
                                            int row, int column, float* h) {
  const int64_t at = offset_of(p, c, 2 * row, 2 * column, int(p.W), p.H * p.W);
  const int64_t step = p.channels_last ? p.C : 1, line = p.W * step;
  h[0] = rectified(to_float(sample[at]));
  h[1] = rectified(to_float(sample[at + step]));
  h[2] = rectified(to_float(sample[at + line]));
  h[3] = rectified(to_float(sample[at + line + step]));
}

template <class T>
__device__ __forceinline__ float position_h(const BatchPassParams& p, const T* sample, int c,
                                            int q, bool window, float direction) {
  if (!window)
    return rectified(to_float(sample[p.channels_last ? int64_t(q) * p.C + c : c * p.H * p.W + q]));
  const int columns = int(p.W) / 2;
  float h[4];
  load_window(p, sample, c, q / columns, q % columns, h);
  return choose(h[0], h[1], h[2], h[3], direction).h;
}

// Positions lane, lane + lanes, ... of one channel.
template <class T>
__device__ Moments lane_moments(const BatchPassParams& p, const T* sample, int c, int lane,
                                int lanes, bool window, float direction) {
  const float pivot = p.table[c];
  const int count = window ? windows_of(p).count : int(p.H * p.W);
  Moments total{0.f, 0.f, 0.f};
  for (int q = lane; q < count; q += lanes * kAtOnce) {
    float x[kAtOnce];
    uint32_t valid = 0;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const bool there = q + u * lanes < count;
      x[u] = there ? position_h(p, sample, c, q + u * lanes, window, direction) - pivot : 0.f;
      valid |= uint32_t(there) << u;
    }
    total = merge(total, moments_of<kAtOnce>(x, valid));
  }
  return total;
}

// Mean and centred M2 of h (window: of its windows' winners) of the block's channels of row n.
template <class T>
__device__ void block_moments(const BatchPassParams& p, bool window, const float* gamma,
                              float* out) {
  __shared__ Moments lanes[kBatchThreads];
  const int inner = int(threadIdx.x) % kInner, outer = int(threadIdx.x) / kInner;
  const int width = p.channels_last ? kInner : kOuter, height = kBatchThreads / width;
  const int channel = p.channels_last ? inner : outer, lane = p.channels_last ? outer : inner;
  const int c = int(blockIdx.y) * width + channel;
  const int64_t n = blockIdx.x;
  Moments own{0.f, 0.f, 0.f};
  if (c < p.C) {
    const T* sample = static_cast<const T*>(p.a) + n * p.C * p.H * p.W;
    own = lane_moments(p, sample, c, lane, height, window, gamma ? sign(gamma[c]) : 1.f);
  }
  lanes[channel * height + lane] = own;
  __syncthreads();
  if (int(threadIdx.x) < width && int(blockIdx.y) * width + int(threadIdx.x) < p.C) {
    Moments total = lanes[threadIdx.x * height];
    for (int i = 1; i < height; ++i) total = merge(total, lanes[threadIdx.x * height + i]);
    const int64_t at = n * p.C + int(blockIdx.y) * width + int(threadIdx.x);
    out[at] = total.mean;
    out[p.N * p.C + at] = total.m2;
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kBatchThreads)
    batch_stats(const __grid_constant__ BatchPassParams p) {
  if (!p.pool || p.norm_first) block_moments<T>(p, false, nullptr, p.moments);
  if (!p.pool) return;
  block_moments<T>(p, true, p.norm_first ? p.gamma : nullptr, p.norm_first ? p.extrema : p.moments);
}

__device__ __forceinline__ ChannelNumbers numbers_of(const BatchPassParams& p, int64_t n, int c) {
  ChannelNumbers t;
#pragma unroll
  for (int i = 0; i < kWeight; ++i) t.of[i] = p.table[i * p.C + c];
  t.of[kWeight] = p.weight != nullptr ? p.weight[n * p.C + c] : 0.f;
  return t;
}

// One window, whole or cut by the map's edge.
template <class T>
__device__ void apply_window(const BatchPassParams& p, int64_t n, int c, int row, int column) {
  const int H = int(p.H), W = int(p.W);
  const int64_t base = n * p.C * p.H * p.W;
  const T* sample = static_cast<const T*>(p.a) + base;
  T* da = p.da != nullptr ? static_cast<T*>(p.da) + base : nullptr;
  const ChannelNumbers t = numbers_of(p, n, c);
  if (row < H / 2 && column < W / 2) {
    float h[4];
    load_window(p, sample, c, row, column, h);
    const Choice best =
        choose(h[0], h[1], h[2], h[3], p.norm_first ? sign(t.of[kScale]) : 1.f);
    const float u = normalised(t, best.h), own = asked(t, u, p.squares);
    if (p.z != nullptr) {
      const int64_t pixels = int64_t(H / 2) * (W / 2);
      static_cast<T*>(p.z)[n * p.C * pixels + offset_of(p, c, row, column, W / 2, pixels)] =
          from_float<T>(u);
    }
    if (da == nullptr) return;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      da[offset_of(p, c, 2 * row + i / 2, 2 * column + i % 2, W, p.H * p.W)] = from_float<T>(
          window_gradient(t, h[i], best.at == i, own, p.norm_first, p.straight_through));
    return;
  }
  if (da == nullptr) return;
  for (int i = 0; i < 4; ++i) {
    const int y = 2 * row + i / 2, x = 2 * column + i % 2;
    if (y >= H || x >= W) continue;
    const int64_t at = offset_of(p, c, y, x, W, p.H * p.W);
    const float h = rectified(to_float(sample[at]));
    da[at] = from_float<T>(margin_gradient(t, h, p.norm_first, p.straight_through));
  }
}

// Elements (or windows) first, first + threads, ... of row n, in memory order; z may lie over a.
template <class T>
__global__ void __launch_bounds__(kBatchThreads)
    batch_apply(const __grid_constant__ BatchPassParams p) {
  const int64_t n = blockIdx.x;
  const int columns = int(p.W + 1) / 2, C = int(p.C);
  const int count = p.pool ? int(p.H + 1) / 2 * columns : int(p.H * p.W);
  const int64_t first = int64_t(blockIdx.y) * kBatchThreads * kAtOnce + threadIdx.x;
  const int64_t total = int64_t(count) * C, row = n * p.C * p.H * p.W;
  const T* a = static_cast<const T*>(p.a) + row;
  float x[kAtOnce];
  if (!p.pool) {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      x[u] = first + u * kBatchThreads < total ? to_float(a[first + u * kBatchThreads]) : 0.f;
  }
#pragma unroll 1
  for (int u = 0; u < kAtOnce; ++u) {
    const int64_t i = first + u * kBatchThreads;
    if (i >= total) return;
    const int c = int(p.channels_last ? i % C : i / count);
    if (p.pool) {
      const int q = int(p.channels_last ? i / C : i % count);
      apply_window<T>(p, n, c, q / columns, q % columns);
      continue;
    }
    const ChannelNumbers t = numbers_of(p, n, c);
    const float h = rectified(u == 0 ? x[0] : u == 1 ? x[1] : u == 2 ? x[2] : x[3]);
    const float v = normalised(t, h);
    if (p.da != nullptr)
      static_cast<T*>(p.da)[row + i] = from_float<T>(
          (asked(t, v, p.squares) - answered(t, h)) * passing(h, p.straight_through));
    if (p.z != nullptr) static_cast<T*>(p.z)[row + i] = from_float<T>(v);
  }
}

// Mean of h over the positive rows of 32 channels.
template <class T>
__global__ void __launch_bounds__(kBatchThreads)
    peer_stats(const __grid_constant__ BatchPassParams p) {
  __shared__ float sums[kBatchThreads], counts[kOuter];
  const int inner = int(threadIdx.x) % kInner, outer = int(threadIdx.x) / kInner;
  const int64_t c = int64_t(blockIdx.x) * kInner + inner;
  float sum = 0.f, rows = 0.f;
  for (int64_t n = outer; n < p.N; n += kOuter) {
    if (p.y[n] != 1) continue;
    rows += 1.f;
    if (c < p.C) sum += rectified(to_float(static_cast<const T*>(p.a)[n * p.C + c]));
  }
  sums[threadIdx.x] = sum;
  if (inner == 0) counts[outer] = rows;
  __syncthreads();
  if (outer != 0 || c >= p.C) return;
  for (int i = 1; i < kOuter; ++i) sum += sums[i * kInner + inner], rows += counts[i];
  p.moments[c] = sum / rows;
}

template <class T>
__global__ void __launch_bounds__(kBatchThreads)
    peer_apply(const __grid_constant__ BatchPassParams p) {
  const int64_t n = blockIdx.x, c = int64_t(blockIdx.y) * kBatchThreads + threadIdx.x;
  if (c >= p.C || p.y[n] != 1) return;
  const float h = rectified(to_float(static_cast<const T*>(p.a)[n * p.C + c]));
  T* da = static_cast<T*>(p.da) + n * p.C + c;
  *da = from_float<T>(to_float(*da) + p.table[c] * passing(h, p.straight_through));
}

unsigned blocks_of(int64_t count, int64_t each) { return unsigned((count + each - 1) / each); }

// Rows along x, of which a grid has 2^31 - 1.
template <class T>
void launch(const BatchPassParams& p, cudaStream_t stream) {
  const int channels = p.channels_last ? kInner : kOuter;
  if (p.phase == BatchPhase::stats) {
    const dim3 grid(unsigned(p.N), blocks_of(p.C, channels));
    batch_stats<T><<<grid, kBatchThreads, 0, stream>>>(p);
  } else if (p.phase == BatchPhase::apply) {
    const int64_t positions = p.pool ? ((p.H + 1) / 2) * ((p.W + 1) / 2) : p.H * p.W;
    const dim3 grid(unsigned(p.N), blocks_of(p.C * positions, kBatchThreads * kAtOnce));
    batch_apply<T><<<grid, kBatchThreads, 0, stream>>>(p);
  } else if (p.phase == BatchPhase::peer_stats) {
    const dim3 grid(blocks_of(p.C, kInner));
    peer_stats<T><<<grid, kBatchThreads, 0, stream>>>(p);
  } else {
    const dim3 grid(unsigned(p.N), blocks_of(p.C, kBatchThreads));
    peer_apply<T><<<grid, kBatchThreads, 0, stream>>>(p);
  }
  FF_CUDA(cudaGetLastError());
}

}  // namespace

void batch_pass_cuda(const BatchPassParams& given, void* stream) {
  if (given.N == 0) return;
  BatchPassParams p = given;
  p.channels_last = p.channels_last || p.H * p.W == 1;
  const DeviceOf current(p.a);
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f32: return launch<float>(p, queue);
    case DType::bf16: return launch<__nv_bfloat16>(p, queue);
    case DType::f16: return launch<__half>(p, queue);
  }
}

}  // namespace ff
