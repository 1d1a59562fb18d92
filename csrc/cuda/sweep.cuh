// The two sweeps over one sample's elements, shared by the two-sweep and the cluster kernels. `src`
// is indexed by the element's place in its sample, wherever it points (device or shared memory).
#pragma once
#include "chunk.cuh"
#include "finalise.cuh"

namespace ff {

template <class T>
__device__ __forceinline__ const T* previous_of(const LocalPassParams& p, int64_t base) {
  return p.h_prev == nullptr ? nullptr : static_cast<const T*>(p.h_prev) + base;
}

template <class T, int V>
__device__ __forceinline__ void activate_chunk(const LocalPassParams& p, const Sample& s,
                                               const Span& span, float* x, uint32_t kept) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
    activate_vector<T, V>(p, previous_of<T>(p, s.base), span.start + u * span.step, span.low,
                          span.high, x + u * V, kept >> (u * V));
}

// How many elements further on in z than in a a vector lies, where z is a slice of a wider map: the
// first of a chunk, and how many more each next one.
struct Apart {
  int first = 0, step = 0;
};

// z and da of one vector of raw x; scale(v) is element v's, `beside` the shortcut's vector.
template <class T, int V, bool whole, class Scale>
__device__ __forceinline__ void apply_vector(const LocalPassParams& p, const Sample& s, int at,
                                             int low, int high, float* x, const float* beside,
                                             int apart, uint32_t kept, Scale scale) {
  const uint32_t passing =
      activate_vector<T, V, whole>(p, previous_of<T>(p, s.base), at, low, high, x, kept);
  float out[V];
  if (p.z != nullptr) {
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = normalised(scale(v), x[v]) + beside[v];
    store_vector<T, V, whole>(static_cast<T*>(p.z) + (s.z_base + apart), at, low, high, out);
  }
  if (p.da != nullptr) {
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = gradient(p, scale(v), x[v], passing >> v & 1);
    store_vector<T, V, whole>(static_cast<T*>(p.da) + s.base, at, low, high, out);
  }
}

// z and da of a chunk. Only raw vectors wait for one another, and of those that are `held` on chip
// none does; floats live one vector at a time.
template <class T, int V, bool held, class Scale>
__device__ __forceinline__ void apply_chunk(const LocalPassParams& p, const Sample& s, const T* src,
                                            const Span& span, const Apart& apart, uint32_t kept,
                                            Scale scale) {
  const T* shortcut =
      p.shortcut != nullptr ? static_cast<const T*>(p.shortcut) + s.base : nullptr;
  float x[V], beside[V] = {};
  if (span.full<V>()) {
    Pack<T, V> raw[kUnroll], more[kUnroll];
    const auto load = [&](int u) {
      raw[u] = *reinterpret_cast<const Pack<T, V>*>(src + (span.start + u * span.step));
    };
    if (!held) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) load(u);
    }
    if (shortcut != nullptr) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        more[u] = *reinterpret_cast<const Pack<T, V>*>(shortcut + (span.start + u * span.step));
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (held) load(u);
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] = to_float(raw[u].v[v]);
      if (shortcut != nullptr) {
#pragma unroll
        for (int v = 0; v < V; ++v) beside[v] = to_float(more[u].v[v]);
      }
      apply_vector<T, V, true>(p, s, span.start + u * span.step, span.low, span.high, x, beside,
                               apart.first + u * apart.step, kept >> (u * V), scale);
    }
    return;
  }
#pragma unroll 1
  for (int u = 0; u < kUnroll; ++u) {
    const int at = span.start + u * span.step;
    load_vector<T, V>(src, at, span.low, span.high, x);
    if (shortcut != nullptr) load_vector<T, V>(shortcut, at, span.low, span.high, beside);
    apply_vector<T, V, false>(p, s, at, span.low, span.high, x, beside,
                              apart.first + u * apart.step, kept >> (u * V), scale);
  }
}

// NCHW: thread `lane` of `team` sweeps the run [low, high) of a sample, chunk by chunk. The first
// vector starts at or before low, on a 16-byte boundary of src.
template <class T, int V, class Body>
__device__ __forceinline__ void for_chunks(const T* src, int low, int high, int lane, int team,
                                           Body body) {
  const int skew = int((reinterpret_cast<uintptr_t>(src + low) / sizeof(T)) % V);
  for (int start = low - skew + lane * V; start < high; start += kUnroll * team * V)
    body(Span{start, team * V, low, high});
}

// Dropout of an NCHW chunk; all kept when there is none. Drawn before the chunk is loaded: Philox's
// registers and the chunk's need not live together.
template <int V>
__device__ __forceinline__ uint32_t run_bits(const LocalPassParams& p, const Sample& s,
                                             const Span& span) {
  if (p.dropout.threshold == 0) return ~0u;
  return chunk_bits_nchw<V>(p.dropout, s.step, s.index + uint64_t(int64_t(span.start)), span.step);
}

// h[u] = value without an indexed register array, which would live in local memory.
__device__ __forceinline__ void set_element(float* h, int u, float value) {
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) h[i] = i == u ? value : h[i];
}

// h of four pooled elements of an NCHW run (V = 1); the bits say which exist.
template <class T>
__device__ __forceinline__ uint32_t pooled_run(const LocalPassParams& p, const Sample& s,
                                               const T* src, const Span& span, float* h) {
  const int Q = pixels_out(p), W = int(p.W / 2);
  uint32_t valid = 0;
#pragma unroll 1
  for (int u = 0; u < kUnroll; ++u) {
    const int e = span.start + u * span.step;
    float value = 0.f;
    if (e < span.high) {
      value = pool_window(p, s, src, e / Q, e % Q / W, e % Q % W).winner.h;
      if (p.h_prev != nullptr)
        value = blended(p, value, to_float(previous_of<T>(p, s.n * p.C * Q)[e]));
      valid |= 1u << u;
    }
    set_element(h, u, value);
  }
  return valid;
}

// Sweep 1 of a run: this thread's share of its moments. `mark` as in gather_columns.
template <class T, int V, class Mark>
__device__ __forceinline__ Moments gather_run(const LocalPassParams& p, const Sample& s,
                                              const T* src, int low, int high, int lane, int team,
                                              Mark mark) {
  Moments total{};
  for_chunks<T, V>(src, low, high, lane, team, [&](const Span& span) {
    float h[kUnroll * V] = {};
    uint32_t valid;
    if (V == 1 && p.pool) {
      valid = pooled_run(p, s, src, span, h);
    } else {
      const uint32_t kept = run_bits<V>(p, s, span);
      valid = load_chunk<T, V>(src, span, h);
      if (p.dropout.threshold != 0) mark(span, h, kept);
      activate_chunk<T, V>(p, s, span, h, kept);
    }
    total = merge(total, moments_of<kUnroll * V>(h, valid));
  });
  return total;
}

// `held`: src is on chip, and its dropped elements are 0 already.
template <class T, int V, bool held>
__device__ __forceinline__ void apply_run(const LocalPassParams& p, const Sample& s, const T* src,
                                          int low, int high, int lane, int team,
                                          const GroupScale& scale) {
  for_chunks<T, V>(src, low, high, lane, team, [&](const Span& span) {
    const uint32_t kept = held ? ~0u : run_bits<V>(p, s, span);
    apply_chunk<T, V, held>(p, s, src, span, Apart(), kept, [&](int) { return scale; });
  });
}

// NHWC geometry of a sweep: rows [first, last) and the vectors [begin, end) of each; a thread owns
// vector begin + thread % width of every lanes-th chunk of four rows.
struct Grid {
  Rows rows;
  int first, last, begin, end, width, lanes;
};

template <class T, int V>
__device__ __forceinline__ Span row_span(const Grid& grid, int row, int vector) {
  return {row * grid.rows.width + vector * V, grid.rows.width, 0, grid.last * grid.rows.width};
}

// Dropout of an NHWC chunk.
template <int V>
__device__ __forceinline__ uint32_t column_bits(const LocalPassParams& p, const Sample& s,
                                                const Rows& rows, int row, int column) {
  if (p.dropout.threshold == 0) return ~0u;
  return chunk_bits_nhwc<V>(p, s.step, s.index, rows, row, column);
}

// Moments of V channels seen by one thread, all of `count` elements.
template <int V> struct ColumnMoments {
  float count = 0.f, mean[V] = {}, m2[V] = {};

  // Adds the first `rows` of n values of each channel, h[u * V + v].
  template <int n> __device__ __forceinline__ void add(const float* h, int rows) {
    const float more = float(rows), total = count + more, share = more / total;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float sum = 0.f, square = 0.f;
#pragma unroll
      for (int u = 0; u < n; ++u) sum += u < rows ? h[u * V + v] : 0.f;
      const float centre = sum / more;
#pragma unroll
      for (int u = 0; u < n; ++u)
        square += u < rows ? (h[u * V + v] - centre) * (h[u * V + v] - centre) : 0.f;
      const float delta = centre - mean[v];
      mean[v] += delta * share;
      m2[v] += square + delta * delta * count * share;
    }
    count = total;
  }
};

// Merges one pass of column moments into the groups: group k of [k0, k1) gathers its channels from
// the pass's elements [low, low + width) of a row. A warp a group; the order is fixed.
__device__ inline void merge_columns(const LocalPassParams& p, const Rows& rows, int low, int width,
                                     int lanes, const float2* partial, const float* counts, int k0,
                                     int k1, Moments* groups) {
  const int lane = int(threadIdx.x & 31), warps = int(blockDim.x / 32);
  for (int k = k0 + int(threadIdx.x / 32); k < k1; k += warps) {
    Moments m{};
    for (int pixel = 0; pixel < rows.pixels; ++pixel) {
      const int begin = max(group_begin(p, k) + pixel * int(p.C), low);
      const int end = min(group_begin(p, k + 1) + pixel * int(p.C), low + width);
      for (int i = lane; i < (end - begin) * lanes; i += 32) {
        const int row = i / (end - begin), x = begin + i % (end - begin) - low;
        const float2 part = partial[row * width + x];
        Moments other{};
        other.count = counts[row], other.mean = part.x, other.m2 = part.y;
        m = merge(m, other);
      }
    }
    m = merge_lanes(m, 32);
    if (lane == 0) groups[k - k0] = merge(groups[k - k0], m);
  }
}

// h of four pooled elements of an NHWC column (V = 1): channel c of pixels row … row + 3.
template <class T>
__device__ __forceinline__ void pooled_column(const LocalPassParams& p, const Sample& s,
                                              const T* src, const Span& span, int row, int c,
                                              float* h) {
  const int W = int(p.W / 2);
#pragma unroll 1
  for (int u = 0; u < kUnroll; ++u) {
    const int q = row + u, e = span.start + u * span.step;
    if (e >= span.high) break;
    float value = pool_window(p, s, src, c, q / W, q % W).winner.h;
    if (p.h_prev != nullptr)
      value = blended(p, value, to_float(previous_of<T>(p, s.n * p.C * pixels_out(p))[e]));
    set_element(h, u, value);
  }
}

// Sweep 1 of NHWC rows: the moments of groups [k0, k1) into `groups`, by the whole block. `mark`
// is called with each chunk's dropout (the cluster kernel zeroes dropped elements with it).
template <class T, int V, class Mark>
__device__ __forceinline__ void gather_columns(const LocalPassParams& p, const Sample& s,
                                               const T* src, const Grid& grid, int k0, int k1,
                                               Moments* groups, float2* partial, float* counts,
                                               Mark mark) {
  for (int k = k0 + int(threadIdx.x); k < k1; k += int(blockDim.x)) groups[k - k0] = Moments{};
  const int row_lane = int(threadIdx.x) / grid.width, column = int(threadIdx.x) % grid.width;
  for (int pass = grid.begin; pass < grid.end; pass += grid.width) {
    const int width = min(grid.width, grid.end - pass);
    ColumnMoments<V> sums;
    if (row_lane < grid.lanes && column < width) {
      const int step = grid.lanes * kUnroll;
      for (int row = grid.first + row_lane * kUnroll; row < grid.last; row += step) {
        const Span span = row_span<T, V>(grid, row, pass + column);
        float h[kUnroll * V] = {};
        if (V == 1 && p.pool) {
          pooled_column(p, s, src, span, row, pass + column, h);
        } else {
          const uint32_t kept = column_bits<V>(p, s, grid.rows, row, (pass + column) * V);
          load_chunk<T, V>(src, span, h);
          if (p.dropout.threshold != 0) mark(span, h, kept);
          activate_chunk<T, V>(p, s, span, h, kept);
        }
        sums.template add<kUnroll>(h, min(kUnroll, grid.last - row));
      }
#pragma unroll
      for (int v = 0; v < V; ++v)
        partial[(row_lane * width + column) * V + v] = make_float2(sums.mean[v], sums.m2[v]);
      if (column == 0) counts[row_lane] = sums.count;
    }
    __syncthreads();
    merge_columns(p, grid.rows, pass * V, width * V, grid.lanes, partial, counts, k0, k1, groups);
    __syncthreads();
  }
}

// Sweep 2 of NHWC rows.
template <class T, int V, bool held>
__device__ __forceinline__ void apply_columns(const LocalPassParams& p, const Sample& s,
                                              const T* src, const Grid& grid, const float* stats,
                                              const float* coef) {
  const int row_lane = int(threadIdx.x) / grid.width, column = int(threadIdx.x) % grid.width;
  if (row_lane >= grid.lanes) return;
  const int apart = int(p.z_channels - p.C);  // rows of a slice are single pixels
  for (int vector = grid.begin + column; vector < grid.end; vector += grid.width) {
    GroupScale scale[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int k = group_of(p, (vector * V + v) % int(p.C));
      scale[v] = group_scale(p, stats[2 * k], stats[2 * k + 1], coef ? coef[k] : 0.f);
    }
    for (int row = grid.first + row_lane * kUnroll; row < grid.last; row += grid.lanes * kUnroll) {
      const Span span = row_span<T, V>(grid, row, vector);
      const uint32_t kept = held ? ~0u : column_bits<V>(p, s, grid.rows, row, vector * V);
      apply_chunk<T, V, held>(p, s, src, span, {row * apart, apart}, kept,
                              [&](int v) { return scale[v]; });
    }
  }
}

}  // namespace ff
