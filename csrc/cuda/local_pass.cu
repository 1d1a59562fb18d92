// local_pass on CUDA: two sweeps over `a`, the second of which finds it in L2.
//
//   sweep 1    (mean, M2) of h per (sample, group), into `stats`
//   finalise   g, loss, coef = dL/dg / m, and (mean, rstd) in place, a warp a sample
//   sweep 2    z = (h - mean) * rstd and da = coef * (1 | 2h) * slope
//
// Formulas: csrc/common/element.h and losses.h; reference: ffengine/reference/local_pass.py.
// NCHW: a (sample, group) is one run of memory, swept by a team of threads. NHWC: a thread owns a
// column of channels, groups are gathered from columns in shared memory. No atomics; the order of
// every sum is fixed.
#include "../ops.h"
#include "runtime.h"
#include "sweep.cuh"

namespace ff {
namespace {

struct NoMark {
  template <class... A> __device__ void operator()(A&&...) const {}
};

// Samples [first, first + count) of the call.
struct Samples {
  int64_t first, count;
};

// Sweep 1, NCHW: team t of the grid gathers run t = sample * K + group; team is a power of two.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    gather_nchw(const __grid_constant__ LocalPassParams p, Samples samples, int team) {
  const int64_t run = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / team;
  const int lane = int(threadIdx.x) % team;
  const bool exists = run < samples.count * p.K;
  const int64_t n = samples.first + run / p.K;
  const int k = int(run % p.K), Q = pixels_out(p);
  Moments m{};
  if (exists) {
    const Sample s = sample_of(p, n);
    m = gather_run<T, V>(p, s, static_cast<const T*>(p.a) + s.base, group_begin(p, k) * Q,
                         group_begin(p, k + 1) * Q, lane, team, NoMark());
  }
  m = merge_team(m, team);
  if (exists && lane == 0) {
    p.stats[2 * (n * p.K + k)] = m.mean;
    p.stats[2 * (n * p.K + k) + 1] = m.m2;
  }
}

// Sweep 1, NHWC: `parts` blocks a sample gather a part of its groups each.
template <class T, int V>
__global__ void __launch_bounds__(kColumnThreads, 1)
    gather_nhwc(const __grid_constant__ LocalPassParams p, Samples samples, int lanes,
                int groups_a_block, int parts) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int k0 = int(blockIdx.x % unsigned(parts)) * groups_a_block;
  const int k1 = min(k0 + groups_a_block, int(p.K));
  const int width = int(blockDim.x) / lanes;
  float2* partial = reinterpret_cast<float2*>(shared);
  float* counts = reinterpret_cast<float*>(partial + blockDim.x * V);
  Moments* groups = reinterpret_cast<Moments*>(counts + lanes);
  Grid grid{rows_of(int(p.C), pixels_out(p), V), 0, 0, 0, 0, width, lanes};
  grid.last = grid.rows.count;
  grid.end = grid.rows.width / V;
  if (parts > 1) {  // rows are single pixels then
    grid.begin = group_begin(p, k0) / V;
    grid.end = (group_begin(p, k1) + V - 1) / V;
  }
  grid.width = min(grid.width, grid.end - grid.begin);
  const Sample s = sample_of(p, samples.first + blockIdx.x / unsigned(parts));
  gather_columns<T, V>(p, s, static_cast<const T*>(p.a) + s.base, grid, k0, k1, groups, partial,
                       counts, NoMark());
  for (int k = k0 + int(threadIdx.x); k < k1; k += int(blockDim.x)) {
    p.stats[2 * (s.n * p.K + k)] = groups[k - k0].mean;
    p.stats[2 * (s.n * p.K + k) + 1] = groups[k - k0].m2;
  }
}

__global__ void __launch_bounds__(128)
    finalise(const __grid_constant__ LocalPassParams p, Samples samples) {
  const int64_t n = samples.first + (int64_t(blockIdx.x) * 128 + threadIdx.x) / 32;
  const bool pairs = p.loss_params.kind == Loss::symba;
  if (n >= samples.first + (pairs ? samples.count / 2 : samples.count)) return;
  finalise_groups(p, n, p.stats + 2 * n * p.K, p.g + n * p.K);
  if (pairs) {
    const int64_t other = n + p.N / 2;
    finalise_groups(p, other, p.stats + 2 * other * p.K, p.g + other * p.K);
    finalise_pair(p, n);
  } else if (p.loss_params.kind != Loss::none) {
    finalise_loss(p, n, p.g + n * p.K, p.coef + n * p.K, p.loss + n);
  }
}

__device__ __forceinline__ GroupScale scale_of(const LocalPassParams& p, int64_t n, int k) {
  const int64_t i = n * p.K + k;
  return group_scale(p, p.stats[2 * i], p.stats[2 * i + 1], p.coef ? p.coef[i] : 0.f);
}

// Sweep 2, NCHW: teams as in sweep 1.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    apply_nchw(const __grid_constant__ LocalPassParams p, Samples samples, int team) {
  const int64_t run = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / team;
  if (run >= samples.count * p.K) return;
  // last first: what sweep 1 read last is the likeliest to be in L2 still
  const int64_t n = samples.first + samples.count - 1 - run / p.K;
  const int k = int(run % p.K), Q = pixels_out(p);
  const Sample s = sample_of(p, n);
  apply_run<T, V, false>(p, s, static_cast<const T*>(p.a) + s.base, group_begin(p, k) * Q,
                         group_begin(p, k + 1) * Q, int(threadIdx.x) % team, team,
                         scale_of(p, n, k));
}

// Sweep 2, NHWC: `parts` blocks a sample write a part of its rows each.
template <class T, int V>
__global__ void __launch_bounds__(kColumnThreads, 1)
    apply_nhwc(const __grid_constant__ LocalPassParams p, Samples samples, int width, int lanes,
               int rows_a_block, int parts) {
  const Sample s =
      sample_of(p, samples.first + samples.count - 1 - blockIdx.x / unsigned(parts));
  Grid grid{rows_of(int(p.C), pixels_out(p), V), 0, 0, 0, 0, width, lanes};
  grid.first = int(blockIdx.x % unsigned(parts)) * rows_a_block;
  grid.last = min(grid.first + rows_a_block, grid.rows.count);
  grid.end = grid.rows.width / V;
  apply_columns<T, V, false>(p, s, static_cast<const T*>(p.a) + s.base, grid,
                             p.stats + 2 * s.n * p.K, p.coef ? p.coef + s.n * p.K : nullptr);
}

// Sweep 2 with a pool, both layouts: a thread a window; windows cut off by floor mode get da = 0.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    apply_pool(const __grid_constant__ LocalPassParams p, Samples samples) {
  const int H = int(p.H), W = int(p.W), C = int(p.C), tall = (H + 1) / 2, wide = (W + 1) / 2;
  const int windows = tall * wide;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t n = samples.first + i / (int64_t(C) * windows);
  if (n >= samples.first + samples.count) return;
  const int e = int(i % (int64_t(C) * windows));
  const int c = p.channels_last ? e % C : e / windows;
  const int q = p.channels_last ? e / C : e % windows, y = q / wide, x = q % wide;
  const Sample s = sample_of(p, n);
  const bool whole = 2 * y + 1 < H && 2 * x + 1 < W;
  float winner_da = 0.f;
  int winner = -1;
  if (whole) {
    const Window window =
        pool_window(p, s, static_cast<const T*>(p.a) + s.base, c, y, x);
    const int64_t at = n * C * pixels_out(p) + offset_in_sample(p, c, y, x, H / 2, W / 2, C);
    float h = window.winner.h;
    if (p.h_prev != nullptr) h = blended(p, h, to_float(static_cast<const T*>(p.h_prev)[at]));
    const GroupScale scale = scale_of(p, n, group_of(p, c));
    if (p.z != nullptr) {
      const float beside =
          p.shortcut != nullptr ? to_float(static_cast<const T*>(p.shortcut)[at]) : 0.f;
      static_cast<T*>(p.z)[s.z_base + offset_in_sample(p, c, y, x, H / 2, W / 2, p.z_channels)] =
          from_float<T>(normalised(scale, h) + beside);
    }
    winner = window.winner.index;
    winner_da = gradient(p, scale, h, passes(p, window.x, window.keep));
  }
  if (p.da == nullptr) return;
  for (int corner = 0; corner < 4; ++corner) {
    const int row = 2 * y + corner / 2, column = 2 * x + corner % 2;
    if (row < H && column < W)
      static_cast<T*>(p.da)[s.base + offset_in_sample(p, c, row, column, H, W, C)] =
          from_float<T>(corner == winner ? winner_da : 0.f);
  }
}

template <class T, int V>
void gather(const LocalPassParams& p, Samples samples, const DeviceCaps& caps,
            cudaStream_t stream) {
  if (!p.channels_last) {
    const int team = team_size(p, V);
    gather_nchw<T, V><<<blocks_for(samples.count * p.K, kThreads / team), kThreads, 0, stream>>>(
        p, samples, team);
    return;
  }
  const int wanted = group_blocks(p, V, samples.count, caps);
  const int groups = int((p.K + wanted - 1) / wanted), parts = int((p.K + groups - 1) / groups);
  const Rows rows = rows_of(int(p.C), pixels_out(p), V);
  const Columns columns = columns_of((rows.width / V + parts - 1) / parts + (parts > 1), rows.count,
                                     kColumnThreads);
  const size_t shared = size_t(columns.threads) * V * 8 + columns.lanes * 4 + groups * 12;
  gather_nhwc<T, V><<<grid_of(samples.count * parts), columns.threads, shared, stream>>>(
      p, samples, columns.lanes, groups, parts);
}

template <class T, int V>
void apply_runs(const LocalPassParams& p, Samples samples, cudaStream_t stream) {
  const int team = team_size(p, V);
  apply_nchw<T, V><<<blocks_for(samples.count * p.K, kThreads / team), kThreads, 0, stream>>>(
      p, samples, team);
}

template <class T, int V>
void apply_rows(const LocalPassParams& p, Samples samples, const DeviceCaps& caps,
                cudaStream_t stream) {
  const Rows rows = rows_of(int(p.C), pixels_out(p), V);
  const Columns columns = columns_of(rows.width / V, rows.count, kColumnThreads);
  // eight blocks a multiprocessor or more where there are that many rows, two sweeps of them each
  const int64_t wanted = std::max<int64_t>(1, 8 * caps.multiprocessors / samples.count);
  const int chunk = columns.lanes * kUnroll;
  const int most = std::max(1, (rows.count + chunk - 1) / chunk);
  const int each = std::max(1, most / int(std::min<int64_t>(wanted, most))) * chunk;
  const int parts = std::max(1, (rows.count + each - 1) / each);
  apply_nhwc<T, V><<<grid_of(samples.count * parts), columns.threads, 0, stream>>>(
      p, samples, columns.width, columns.lanes, each, parts);
}

template <class T>
void gather_samples(const LocalPassParams& p, Samples samples, const DeviceCaps& caps,
                    cudaStream_t stream) {
  if (read_width(p) > 1) gather<T, kVector<T>>(p, samples, caps, stream);
  else gather<T, 1>(p, samples, caps, stream);
  finalise<<<blocks_for(samples.count, 4), 128, 0, stream>>>(p, samples);
}

template <class T>
void apply_samples(const LocalPassParams& p, Samples samples, const DeviceCaps& caps,
                   cudaStream_t stream) {
  if (p.pool) {
    const int64_t windows = p.C * ((p.H + 1) / 2) * ((p.W + 1) / 2);
    apply_pool<T><<<blocks_for(samples.count * windows, kThreads), kThreads, 0, stream>>>(
        p, samples);
    return;
  }
  const int V = write_width(p);
  if (!p.channels_last) {
    if (V > 1) return apply_runs<T, kVector<T>>(p, samples, stream);
    return apply_runs<T, 1>(p, samples, stream);
  }
  if (V == kVector<T>) return apply_rows<T, kVector<T>>(p, samples, caps, stream);
  if constexpr (kVector<T> == 8) {
    if (V == 4) return apply_rows<T, 4>(p, samples, caps, stream);
  }
  apply_rows<T, 1>(p, samples, caps, stream);
}

template <class T>
void two_sweeps(const LocalPassParams& p, const DeviceCaps& caps, cudaStream_t stream) {
  const int64_t step = samples_at_once(p, caps);
  for (int64_t first = 0; first < p.N; first += step) {
    const Samples samples{first, std::min(step, p.N - first)};
    if (p.phase != Phase::apply) gather_samples<T>(p, samples, caps, stream);
    if (p.phase != Phase::stats && (p.z || p.da)) apply_samples<T>(p, samples, caps, stream);
  }
  FF_CUDA(cudaGetLastError());
}

}  // namespace

void local_pass_two_sweeps(const LocalPassParams& p, const DeviceCaps& caps, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::f32: return two_sweeps<float>(p, caps, stream);
    case DType::bf16: return two_sweeps<__nv_bfloat16>(p, caps, stream);
    case DType::f16: return two_sweeps<__half>(p, caps, stream);
  }
}

void local_pass_cuda(const LocalPassParams& p, void* stream) {
  if (p.N == 0 || p.C * p.H * p.W == 0) return;
  check_sample("local_pass", std::max(p.C, p.z_channels) * p.H * p.W);
  const DeviceOf current(p.a);
  const DeviceCaps& caps = device_caps(current.device());
  const auto queue = static_cast<cudaStream_t>(stream);
  const ClusterPlan plan = use_cluster(p, caps);
  if (plan.blocks > 0 && cluster_kernels_built(caps.device))
    local_pass_cluster(p, plan, caps, queue);
  else local_pass_two_sweeps(p, caps, queue);
}

}  // namespace ff
