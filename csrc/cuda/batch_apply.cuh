// Sweep 2 of BatchNorm: z and da from a, in one read and one write of each; z may lie over a where
// nothing pools.
#pragma once
#include <type_traits>

#include "batch_sweep.cuh"

namespace ff {

// The numbers of V channels from c on, modulo C, four at a time where they lie aligned.
template <int V>
__device__ __forceinline__ void load_channels(const float* from, int c, int C, float* x) {
  if (V % 4 == 0 && C % 4 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll
    for (int v = 0; v < V; v += 4) {
      const Pack<float, 4> four = load_pack<float, 4>(from + (c + v) % C);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[v + i] = four.v[i];
    }
    return;
  }
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] = from[(c + v) % C];
}

template <int V>
__device__ __forceinline__ void numbers_of(const BatchPassParams& p, int64_t n, int c,
                                           ChannelNumbers* t) {
#pragma unroll
  for (int i = 0; i <= kWeight; ++i) {
    float x[V] = {};
    if (i < kWeight) load_channels<V>(p.table + i * p.C, c, int(p.C), x);
    else if (p.weight != nullptr) load_channels<V>(p.weight + n * p.C, c, int(p.C), x);
#pragma unroll
    for (int v = 0; v < V; ++v) t[v].of[i] = x[v];
  }
}

__device__ __forceinline__ float element_gradient(const BatchPassParams& p, const ChannelNumbers& t,
                                                  float h, float u) {
  return (asked(t, u, p.squares) - answered(t, h)) * passing(h, p.straight_through);
}

// A sample's tensors; null where they are not wanted.
template <class T> struct SampleOf {
  const T* a;
  T *z, *da;

  __device__ __forceinline__ SampleOf(const BatchPassParams& p, int64_t n) {
    const int64_t pixels = p.pool ? (p.H / 2) * (p.W / 2) : p.H * p.W;
    a = static_cast<const T*>(p.a) + n * p.C * p.H * p.W;
    z = p.z != nullptr ? static_cast<T*>(p.z) + n * p.C * pixels : nullptr;
    da = p.da != nullptr ? static_cast<T*>(p.da) + n * p.C * p.H * p.W : nullptr;
  }
};

// NHWC: rows [first, last) of V columns by one thread, from `lane` on.
template <class T, int V>
__device__ __forceinline__ void apply_column_rows(const BatchPassParams& p, const SampleOf<T>& s,
                                                  const ChannelNumbers* t, int x, int width,
                                                  int first, int last, int lane, int lanes) {
  for (int row = first + lane * kUnroll; row < last; row += lanes * kUnroll) {
    Pack<T, V> raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (row + u < last) raw[u] = load_pack<T, V>(s.a + ((row + u) * width + x));
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (row + u >= last) break;
      const int at = (row + u) * width + x;
      Pack<T, V> z, da;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float h = h_of(raw[u], v), normal = normalised(t[v], h);
        z.v[v] = from_float<T>(normal);
        da.v[v] = from_float<T>(element_gradient(p, t[v], h, normal));
      }
      if (s.z != nullptr) store_pack(s.z + at, z);
      if (s.da != nullptr) store_pack(s.da + at, da);
    }
  }
}

// One window of V channels side by side, or of one; whole, or cut by the map's edge. at_z: of its
// place in z.
template <class T, int V>
__device__ __forceinline__ void apply_window(const BatchPassParams& p, const SampleOf<T>& s,
                                             const ChannelNumbers* t, int at, int at_z, bool right,
                                             bool below) {
  const Steps steps = steps_of(p);
  if (right && below) {
    const Corners<T, V> corners(s.a + at, steps);
    Pack<T, V> z;
    uint32_t winners = 0;  // two bits a channel
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Choice best = corners.best(v, p.norm_first ? sign(t[v].of[kScale]) : 1.f);
      winners |= uint32_t(best.at) << (2 * v);
      z.v[v] = from_float<T>(normalised(t[v], best.h));
    }
    if (s.z != nullptr) store_pack(s.z + at_z, z);
    if (s.da == nullptr) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Pack<T, V> da;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float h = h_of(corners.raw[i], v), own = asked(t[v], normalised(t[v], h), p.squares);
        const bool wins = int(winners >> (2 * v) & 3) == i;
        da.v[v] = from_float<T>(
            window_gradient(t[v], h, wins, own, p.norm_first, p.straight_through));
      }
      store_pack(s.da + (at + (i / 2) * steps.down + (i % 2) * steps.right), da);
    }
    return;
  }
  if (s.da == nullptr) return;
  for (int i = 0; i < 4; ++i) {
    if ((i / 2 && !below) || (i % 2 && !right)) continue;
    const int pixel = at + (i / 2) * steps.down + (i % 2) * steps.right;
    const Pack<T, V> raw = load_pack<T, V>(s.a + pixel);
    Pack<T, V> da;
#pragma unroll
    for (int v = 0; v < V; ++v)
      da.v[v] = from_float<T>(
          margin_gradient(t[v], h_of(raw, v), p.norm_first, p.straight_through));
    store_pack(s.da + pixel, da);
  }
}

// NHWC: `parts` blocks a sample own `each` of its rows, or of its windows.
template <class T, int V, bool pool>
__global__ void __launch_bounds__(kColumnThreads, 1)
    batch_apply_nhwc(const __grid_constant__ BatchPassParams p, Columns columns, int parts,
                     int each) {
  const int C = int(p.C), wide = int(p.W + 1) / 2, tall = int(p.H + 1) / 2;
  const Rows rows = pool ? Rows{1, C, tall * wide} : rows_of(C, int(p.H * p.W), V);
  const int64_t n = blockIdx.x / unsigned(parts);
  const int first = int(blockIdx.x % unsigned(parts)) * each, last = min(first + each, rows.count);
  const int lane = int(threadIdx.x) / columns.width, column = int(threadIdx.x) % columns.width;
  if (lane >= columns.lanes) return;
  const SampleOf<T> s(p, n);
  for (int x = column * V; x < rows.width; x += columns.width * V) {
    ChannelNumbers t[V];
    numbers_of<V>(p, n, x % C, t);
    if constexpr (!pool) {
      apply_column_rows<T, V>(p, s, t, x, rows.width, first, last, lane, columns.lanes);
    } else {
      Walk w(first + lane, columns.lanes, wide);
      for (int q = first + lane; q < last; q += columns.lanes, w.next())
        apply_window<T, V>(p, s, t, window_at(p, x, w.row, w.column),
                           (w.row * int(p.W / 2) + w.column) * C + x, 2 * w.column + 1 < int(p.W),
                           2 * w.row + 1 < int(p.H));
    }
  }
}

// NCHW: one thread's share of channel c's run.
template <class T, int V>
__device__ __forceinline__ void apply_channel(const BatchPassParams& p, const SampleOf<T>& s,
                                              const ChannelNumbers& t, int c, int lane, int team) {
  const int Q = int(p.H * p.W);
  for_chunks<T, V>(s.a, c * Q, (c + 1) * Q, lane, team, [&](const Span& span) {
    const auto write = [&](auto whole, int at, const float* x) {
      constexpr bool all = decltype(whole)::value;
      float z[V], da[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float h = rectified(x[v]);
        z[v] = normalised(t, h);
        da[v] = element_gradient(p, t, h, z[v]);
      }
      if (s.z != nullptr) store_vector<T, V, all>(s.z, at, span.low, span.high, z);
      if (s.da != nullptr) store_vector<T, V, all>(s.da, at, span.low, span.high, da);
    };
    float x[V];
    if (span.full<V>()) {
      Pack<T, V> raw[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        raw[u] = load_pack<T, V>(s.a + (span.start + u * span.step));
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int v = 0; v < V; ++v) x[v] = to_float(raw[u].v[v]);
        write(std::true_type(), span.start + u * span.step, x);
      }
      return;
    }
#pragma unroll 1
    for (int u = 0; u < kUnroll; ++u) {
      const int at = span.start + u * span.step;
      load_vector<T, V>(s.a, at, span.low, span.high, x);
      write(std::false_type(), at, x);
    }
  });
}

// V pixels side by side of the two rows of V / 2 windows; or, below the last whole window, of one row.
template <class T, int V>
__device__ __forceinline__ void apply_pairs(const BatchPassParams& p, const SampleOf<T>& s,
                                            const ChannelNumbers& t, int at, int at_z, bool below) {
  const Pack<T, V> up = load_pack<T, V>(s.a + at);
  Pack<T, V> da_up, da_down;
  if (!below) {
    if (s.da == nullptr) return;
#pragma unroll
    for (int v = 0; v < V; ++v)
      da_up.v[v] = from_float<T>(margin_gradient(t, h_of(up, v), p.norm_first, p.straight_through));
    return store_pack(s.da + at, da_up);
  }
  const Pack<T, V> down = load_pack<T, V>(s.a + (at + int(p.W)));
  const float direction = p.norm_first ? sign(t.of[kScale]) : 1.f;
  Pack<T, V / 2> z;
#pragma unroll
  for (int i = 0; i < V / 2; ++i) {
    const float h[4] = {h_of(up, 2 * i), h_of(up, 2 * i + 1), h_of(down, 2 * i),
                        h_of(down, 2 * i + 1)};
    const Choice best = choose(h[0], h[1], h[2], h[3], direction);
    const float normal = normalised(t, best.h), own = asked(t, normal, p.squares);
    z.v[i] = from_float<T>(normal);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const T d = from_float<T>(
          window_gradient(t, h[j], best.at == j, own, p.norm_first, p.straight_through));
      if (j < 2) da_up.v[2 * i + j] = d;
      else da_down.v[2 * i + j - 2] = d;
    }
  }
  if (s.z != nullptr) store_pack(s.z + at_z, z);
  if (s.da == nullptr) return;
  store_pack(s.da + at, da_up);
  store_pack(s.da + (at + int(p.W)), da_down);
}

// NCHW: a team of threads a channel of a sample. A pool in vectors has rows of whole vectors, so no
// window is cut on the right.
template <class T, int V, bool pool>
__global__ void __launch_bounds__(kThreads, 2)
    batch_apply_nchw(const __grid_constant__ BatchPassParams p, int team) {
  const int64_t run = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / team;
  const int lane = int(threadIdx.x) % team, W = int(p.W), H = int(p.H);
  if (run >= p.N * p.C) return;
  const int c = int(run % p.C);
  const SampleOf<T> s(p, run / p.C);
  ChannelNumbers t;
  numbers_of<1>(p, run / p.C, c, &t);
  if constexpr (!pool) {
    apply_channel<T, V>(p, s, t, c, lane, team);
  } else {
    constexpr int pairs = V > 1 ? V / 2 : 1;
    const int base_z = c * (H / 2) * (W / 2);
    for (Walk w(lane, team, (W + 2 * pairs - 1) / (2 * pairs)); w.row < (H + 1) / 2; w.next()) {
      const int at = window_at(p, c, w.row, w.column * pairs);
      const int at_z = base_z + w.row * (W / 2) + w.column * pairs;
      const bool below = 2 * w.row + 1 < H;
      if constexpr (V > 1) apply_pairs<T, V>(p, s, t, at, at_z, below);
      else apply_window<T, 1>(p, s, &t, at, at_z, 2 * w.column + 1 < W, below);
    }
  }
}

}  // namespace ff
