// batch_pass on CUDA: the two sweeps of BatchNorm and those of peer normalisation; reference
// ffengine/reference/batch_pass.py, public op ffengine/ops/batch_pass.py, the arithmetic between
// the sweeps ffengine/ops/batch_stats.py.
//
// NHWC: a thread owns V channels side by side and walks down rows or windows, so that a channel's
// numbers stay in its registers. NCHW: a team of threads owns a channel of a sample. Vectors are of
// 16 bytes where alignment allows; lanes of a channel are merged in a fixed order by Chan's formula.
#include "../ops.h"
#include "batch_apply.cuh"
#include "batch_stats.cuh"
#include "runtime.h"

namespace ff {
namespace {

constexpr int kPeerThreads = 256, kPeerWidth = 8;  // vectors a block of peer_stats owns

// Mean of h over the positive rows: columns of V channels, lanes over rows.
template <class T, int V>
__global__ void __launch_bounds__(kPeerThreads)
    peer_stats(const __grid_constant__ BatchPassParams p, int width) {
  __shared__ float sums[kPeerThreads * V], counts[kPeerThreads];
  const int lanes = kPeerThreads / width, lane = int(threadIdx.x) / width;
  const int column = int(threadIdx.x) % width;
  const int64_t c = (int64_t(blockIdx.x) * width + column) * V;
  float sum[V] = {}, rows = 0.f;
  for (int64_t n = lane; n < p.N && c < p.C && lane < lanes; n += lanes) {
    if (p.y[n] != 1) continue;
    rows += 1.f;
    const Pack<T, V> raw = load_pack<T, V>(static_cast<const T*>(p.a) + n * p.C + c);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += h_of(raw, v);
  }
#pragma unroll
  for (int v = 0; v < V; ++v) sums[threadIdx.x * V + v] = sum[v];
  counts[threadIdx.x] = rows;
  __syncthreads();
  if (lane != 0 || c >= p.C) return;
  for (int i = 1; i < lanes; ++i) {
    const int other = i * width + column;
    rows += counts[other];
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += sums[other * V + v];
  }
#pragma unroll
  for (int v = 0; v < V; ++v) p.moments[c + v] = sum[v] / rows;
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    peer_apply(const __grid_constant__ BatchPassParams p, unsigned parts) {
  const int64_t n = blockIdx.x / parts;
  const int64_t c = (int64_t(blockIdx.x % parts) * kThreads + threadIdx.x) * V;
  if (c >= p.C || p.y[n] != 1) return;
  T* at = static_cast<T*>(p.da) + n * p.C + c;
  const Pack<T, V> raw = load_pack<T, V>(static_cast<const T*>(p.a) + n * p.C + c);
  Pack<T, V> da = load_pack<T, V>(at);
#pragma unroll
  for (int v = 0; v < V; ++v)
    da.v[v] = from_float<T>(to_float(da.v[v]) +
                            p.table[c + v] * passing(h_of(raw, v), p.straight_through));
  store_pack(at, da);
}

// Elements of a vector: 16 bytes, where every large tensor is aligned alike and, in NHWC and among
// windows, rows are whole vectors; else one.
int vector_of(const BatchPassParams& p, bool windows) {
  const int V = 16 / item_size(p.dtype), C = int(p.C), pixels = int(p.H * p.W);
  if (!lies_alike(p.z, p.a, 16) || !lies_alike(p.da, p.a, 16)) return 1;
  const bool aligned = reinterpret_cast<uintptr_t>(p.a) % 16 == 0;
  if (!p.channels_last) return windows && !(aligned && p.W % V == 0) ? 1 : V;
  if (!aligned) return 1;
  if (windows) return C % V == 0 ? V : 1;
  // channels of rows of several pixels are merged by one block
  const Rows rows = rows_of(C, pixels, V);
  return pixels % rows.pixels == 0 && (rows.pixels == 1 || rows.width / V <= kColumnThreads) ? V : 1;
}

// Threads a channel of a sample of NCHW.
int team_of(const BatchPassParams& p, int V, bool windows, bool cut) {
  const int64_t rows = cut ? (p.H + 1) / 2 : p.H / 2, across = std::max(2, V);
  const int64_t positions = windows ? rows * ((p.W + across - 1) / across) * 2
                                    : (p.H * p.W + V - 1) / V;
  return power_of_two_up_to((positions + kUnroll - 1) / kUnroll, kThreads);
}

template <class T, int V, bool windows>
void launch_stats(const BatchPassParams& p, const StatsOut& out, int multiprocessors,
                  cudaStream_t stream) {
  if (!p.channels_last) {
    const int team = team_of(p, V, windows, false);
    batch_stats_nchw<T, V, windows>
        <<<blocks_for(p.N * p.C, kThreads / team), kThreads, 0, stream>>>(p, out, team);
    return;
  }
  const int Q = int(p.H * p.W);
  const Rows rows = windows ? Rows{1, int(p.C), int((p.H / 2) * (p.W / 2)) * kUnroll}
                            : rows_of(int(p.C), Q, V);
  const int vectors = rows.width / V;
  // enough blocks for two a multiprocessor, if their part of a pixel stays 128 bytes wide
  const int64_t wanted = (2 * multiprocessors + p.N - 1) / p.N;
  const int64_t most = rows.pixels > 1 ? 1 : std::max(1, vectors * V * int(sizeof(T)) / 128);
  const int64_t least = (vectors + kColumnThreads - 1) / kColumnThreads;
  const int64_t cut = std::max(least, std::min(wanted, most));
  const Columns columns = columns_of(int((vectors + cut - 1) / cut), rows.count, kColumnThreads);
  const int parts = (vectors + columns.width - 1) / columns.width;
  const int team = power_of_two_up_to(rows.pixels * columns.lanes, 32);
  const size_t shared = size_t(columns.threads) * V * 8 + columns.lanes * 4;
  batch_stats_nhwc<T, V, windows><<<grid_of(p.N * parts), columns.threads, shared, stream>>>(
      p, out, columns, parts, team);
}

template <class T, bool windows>
void stats(const BatchPassParams& p, const StatsOut& out, int multiprocessors,
           cudaStream_t stream) {
  if (vector_of(p, windows) > 1)
    launch_stats<T, kVector<T>, windows>(p, out, multiprocessors, stream);
  else launch_stats<T, 1, windows>(p, out, multiprocessors, stream);
}

template <class T, int V, bool pool>
void launch_apply(const BatchPassParams& p, int multiprocessors, cudaStream_t stream) {
  if (!p.channels_last) {
    const int team = team_of(p, V, pool, true);
    batch_apply_nchw<T, V, pool>
        <<<blocks_for(p.N * p.C, kThreads / team), kThreads, 0, stream>>>(p, team);
    return;
  }
  const Rows rows = pool ? Rows{1, int(p.C), int(((p.H + 1) / 2) * ((p.W + 1) / 2))}
                         : rows_of(int(p.C), int(p.H * p.W), V);
  const int unit = pool ? 1 : kUnroll;  // positions a thread takes at a time
  const Columns columns = columns_of(rows.width / V, pool ? rows.count * kUnroll : rows.count,
                                     kColumnThreads);
  // two blocks a multiprocessor, as far as there are rows for them: each reads its channels' numbers
  const int64_t wanted = std::max<int64_t>(1, 2 * multiprocessors / p.N);
  const int chunk = columns.lanes * unit, most = std::max(1, (rows.count + chunk - 1) / chunk);
  const int cut = int(std::min<int64_t>(wanted, most)), each = (most + cut - 1) / cut * chunk;
  const int parts = std::max(1, (rows.count + each - 1) / each);
  batch_apply_nhwc<T, V, pool><<<grid_of(p.N * parts), columns.threads, 0, stream>>>(
      p, columns, parts, each);
}

template <class T, bool pool>
void apply(const BatchPassParams& p, int multiprocessors, cudaStream_t stream) {
  if (vector_of(p, pool) > 1) launch_apply<T, kVector<T>, pool>(p, multiprocessors, stream);
  else launch_apply<T, 1, pool>(p, multiprocessors, stream);
}

template <class T, int V> void peers(const BatchPassParams& p, cudaStream_t stream) {
  const int64_t vectors = p.C / V;
  if (p.phase == BatchPhase::peer_stats) {
    const int width = int(std::min<int64_t>(V > 1 ? kPeerWidth : 32, vectors));
    peer_stats<T, V><<<blocks_for(vectors, width), kPeerThreads, 0, stream>>>(p, width);
    return;
  }
  const unsigned parts = blocks_for(vectors, kThreads);
  peer_apply<T, V><<<grid_of(p.N * int64_t(parts)), kThreads, 0, stream>>>(p, parts);
}

template <class T>
void launch(const BatchPassParams& p, int multiprocessors, cudaStream_t stream) {
  if (p.phase == BatchPhase::stats) {
    if (!p.pool || p.norm_first)
      stats<T, false>(p, {nullptr, p.moments}, multiprocessors, stream);
    if (p.pool && p.norm_first) stats<T, true>(p, {p.gamma, p.extrema}, multiprocessors, stream);
    if (p.pool && !p.norm_first) stats<T, true>(p, {nullptr, p.moments}, multiprocessors, stream);
  } else if (p.phase == BatchPhase::apply) {
    if (p.pool) apply<T, true>(p, multiprocessors, stream);
    else apply<T, false>(p, multiprocessors, stream);
  } else if (vector_of(p, false) > 1 && p.C % kVector<T> == 0) {
    peers<T, kVector<T>>(p, stream);
  } else {
    peers<T, 1>(p, stream);
  }
  FF_CUDA(cudaGetLastError());
}

}  // namespace

void batch_pass_cuda(const BatchPassParams& given, void* stream) {
  if (given.N == 0) return;
  check_sample("batch_pass", given.C * given.H * given.W);
  BatchPassParams p = given;
  p.channels_last = p.channels_last || p.H * p.W == 1;
  const DeviceOf current(p.a);
  const int multiprocessors = device_caps(current.device()).multiprocessors;
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f32: return launch<float>(p, multiprocessors, queue);
    case DType::bf16: return launch<__nv_bfloat16>(p, multiprocessors, queue);
    case DType::f16: return launch<__half>(p, multiprocessors, queue);
  }
}

}  // namespace ff
