// Sweep 1 of BatchNorm: mean (counted from the channel's pivot) and centred M2, per row and channel, of
// h or of the winners of its 2x2 windows.
#pragma once
#include "batch_sweep.cuh"

namespace ff {

// Where a sweep's moments (2, N, C) go; gamma, or null: the sign by which windows choose.
struct StatsOut {
  const float* gamma;
  float* moments;
};

__device__ __forceinline__ float direction_of(const StatsOut& out, int c) {
  return out.gamma != nullptr ? sign(out.gamma[c]) : 1.f;
}

// NHWC: one thread's rows of its V columns.
template <class T, int V>
__device__ __forceinline__ void column_rows(const T* at, const Rows& rows, int lane, int lanes,
                                            const float* pivot, ColumnMoments<V>& sums) {
  for (int row = lane * kUnroll; row < rows.count; row += lanes * kUnroll) {
    Pack<T, V> raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (row + u < rows.count) raw[u] = load_pack<T, V>(at + (row + u) * rows.width);
    float h[kUnroll * V];
#pragma unroll
    for (int i = 0; i < kUnroll * V; ++i) h[i] = h_of(raw[i / V], i % V) - pivot[i % V];
    sums.template add<kUnroll>(h, min(kUnroll, rows.count - row));
  }
}

// And its windows.
template <class T, int V>
__device__ __forceinline__ void column_windows(const BatchPassParams& p, const T* sample, int c,
                                               const StatsOut& out, int lane, int lanes,
                                               const float* pivot, ColumnMoments<V>& sums) {
  const Steps steps = steps_of(p);
  float direction[V];
#pragma unroll
  for (int v = 0; v < V; ++v) direction[v] = direction_of(out, c + v);
#pragma unroll 2
  for (Walk w(lane, lanes, int(p.W / 2)); w.row < int(p.H / 2); w.next()) {
    const Corners<T, V> corners(sample + window_at(p, c, w.row, w.column), steps);
    float h[V];
#pragma unroll
    for (int v = 0; v < V; ++v) h[v] = corners.best(v, direction[v]).h - pivot[v];
    sums.template add<1>(h, 1);
  }
}

// The block's channels from its threads' columns: x-th element of a row is channel x % C of the row's
// pixel x / C. `team` lanes a channel, a power of two, merge in a fixed order.
__device__ __forceinline__ void merge_channels(const BatchPassParams& p, const Rows& rows,
                                               const float2* partial, const float* counts,
                                               int width, int lanes, int team, int64_t at,
                                               float* moments) {
  const int channels = width / rows.pixels, lane = int(threadIdx.x) % team;
  const int terms = rows.pixels * lanes;
  for (int first = 0; first < channels; first += int(blockDim.x) / team) {
    const int c = first + int(threadIdx.x) / team;
    Moments m{};
    for (int i = lane; i < terms && c < channels; i += team) {
      const float2 part = partial[i % lanes * width + i / lanes * channels + c];
      Moments other{};
      other.count = counts[i % lanes], other.mean = part.x, other.m2 = part.y;
      m = merge(m, other);
    }
    m = merge_lanes(m, team);
    if (c >= channels || lane != 0) continue;
    moments[at + c] = m.mean;
    moments[p.N * p.C + at + c] = m.m2;
  }
}

// NHWC: `parts` blocks a sample own part of its columns each.
template <class T, int V, bool windows>
__global__ void __launch_bounds__(kColumnThreads, 1)
    batch_stats_nhwc(const __grid_constant__ BatchPassParams p, StatsOut out, Columns columns,
                     int parts, int team) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int C = int(p.C), Q = int(p.H * p.W);
  const Rows rows = windows ? Rows{1, C, Q} : rows_of(C, Q, V);
  const int64_t n = blockIdx.x / unsigned(parts);
  const int begin = int(blockIdx.x % unsigned(parts)) * columns.width;
  const int width = min(columns.width, rows.width / V - begin);
  const int lane = int(threadIdx.x) / columns.width, column = int(threadIdx.x) % columns.width;
  float2* partial = reinterpret_cast<float2*>(shared);
  float* counts = reinterpret_cast<float*>(partial + blockDim.x * V);
  if (lane < columns.lanes && column < width) {
    const T* sample = static_cast<const T*>(p.a) + n * C * Q;
    const int x = (begin + column) * V;
    float pivot[V];
#pragma unroll
    for (int v = 0; v < V; ++v) pivot[v] = p.table[(x + v) % C];
    ColumnMoments<V> sums;
    if (windows) column_windows<T, V>(p, sample, x, out, lane, columns.lanes, pivot, sums);
    else column_rows<T, V>(sample + x, rows, lane, columns.lanes, pivot, sums);
#pragma unroll
    for (int v = 0; v < V; ++v)
      partial[(lane * width + column) * V + v] = make_float2(sums.mean[v], sums.m2[v]);
    if (column == 0) counts[lane] = sums.count;
  }
  __syncthreads();
  merge_channels(p, rows, partial, counts, width * V, columns.lanes, team, n * C + begin * V,
                 out.moments);
}

// NCHW: this thread's share of channel c's run.
template <class T, int V>
__device__ __forceinline__ Moments run_moments(const BatchPassParams& p, const T* sample, int c,
                                               int lane, int team) {
  const int Q = int(p.H * p.W);
  const float pivot = p.table[c];
  Moments total{};
  for_chunks<T, V>(sample, c * Q, (c + 1) * Q, lane, team, [&](const Span& span) {
    float h[kUnroll * V];
    const uint32_t valid = load_chunk<T, V>(sample, span, h);
#pragma unroll
    for (int i = 0; i < kUnroll * V; ++i) h[i] = rectified(h[i]) - pivot;
    total = merge(total, moments_of<kUnroll * V>(h, valid));
  });
  return total;
}

// And of its windows: V / 2 side by side, or one.
template <class T, int V>
__device__ __forceinline__ Moments run_windows(const BatchPassParams& p, const T* sample, int c,
                                               const StatsOut& out, int lane, int team) {
  constexpr int pairs = V > 1 ? V / 2 : 1;
  const Steps steps = steps_of(p);
  const float pivot = p.table[c], direction = direction_of(out, c);
  Moments total{};
#pragma unroll 2
  for (Walk w(lane, team, int(p.W) / (2 * pairs)); w.row < int(p.H / 2); w.next()) {
    const T* at = sample + window_at(p, c, w.row, w.column * pairs);
    float h[pairs];
    if constexpr (V == 1) {
      h[0] = Corners<T, 1>(at, steps).best(0, direction).h - pivot;
    } else {
      const Pack<T, V> up = load_pack<T, V>(at), down = load_pack<T, V>(at + steps.down);
#pragma unroll
      for (int i = 0; i < pairs; ++i)
        h[i] = choose(h_of(up, 2 * i), h_of(up, 2 * i + 1), h_of(down, 2 * i),
                      h_of(down, 2 * i + 1), direction).h - pivot;
    }
    total = merge(total, moments_of<pairs>(h, (1u << pairs) - 1));
  }
  return total;
}

// NCHW: a team of threads a channel of a sample.
template <class T, int V, bool windows>
__global__ void __launch_bounds__(kThreads, 2)
    batch_stats_nchw(const __grid_constant__ BatchPassParams p, StatsOut out, int team) {
  const int64_t run = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / team;
  const int lane = int(threadIdx.x) % team;
  Moments m{};
  if (run < p.N * p.C) {
    const int c = int(run % p.C);
    const T* sample = static_cast<const T*>(p.a) + (run - c) * p.H * p.W;
    m = windows ? run_windows<T, V>(p, sample, c, out, lane, team)
                : run_moments<T, V>(p, sample, c, lane, team);
  }
  m = merge_team(m, team);
  if (run >= p.N * p.C || lane != 0) return;
  out.moments[run] = m.mean;
  out.moments[p.N * p.C + run] = m.m2;
}

}  // namespace ff
