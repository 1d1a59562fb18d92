// One warp turns a sample's group moments into goodness, norm statistics, loss and coef.
#pragma once
#include <cuda_runtime.h>

#include "../common/element.h"
#include "../common/layout.h"
#include "../common/losses.h"
#include "plan.h"

namespace ff {

constexpr unsigned kWarp = 0xffffffffu;

struct WarpLanes {
  __device__ int rank() const { return int(threadIdx.x & 31); }
  __device__ int size() const { return 32; }
  // A butterfly: every lane adds the same pairs, so every lane gets the same bits.
  __device__ float sum(float x) const {
    for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(kWarp, x, o);
    return x;
  }
  __device__ float max(float x) const {
    for (int o = 16; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(kWarp, x, o));
    return x;
  }
};

// Merges the lanes of aligned runs of `width` lanes into the first of each.
__device__ __forceinline__ Moments merge_lanes(Moments m, int width) {
  for (int o = width / 2; o > 0; o /= 2) {
    Moments other{};
    other.count = __shfl_down_sync(kWarp, m.count, o, width);
    other.mean = __shfl_down_sync(kWarp, m.mean, o, width);
    other.m2 = __shfl_down_sync(kWarp, m.m2, o, width);
    m = merge(m, other);
  }
  return m;
}

// Merges the moments of teams of threads, a power of two each, for the first thread of each team; by
// the whole block of at most kThreads.
__device__ __forceinline__ Moments merge_team(Moments m, int team) {
  __shared__ Moments warps[kThreads / 32];
  m = merge_lanes(m, min(team, 32));
  if (team <= 32) return m;
  const int warp = int(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) warps[warp] = m;
  __syncthreads();
  if (int(threadIdx.x) % team == 0)
    for (int w = 1; w < team / 32; ++w) m = merge(m, warps[warp + w]);
  return m;
}

__device__ __forceinline__ float group_count(const LocalPassParams& p, int k) {
  return float(group_begin(p, k + 1) - group_begin(p, k)) * float(pixels_out(p));
}

// `stats` holds (mean, M2) of each group and gets (mean, rstd); g gets the goodness, g0 included.
__device__ inline void finalise_groups(const LocalPassParams& p, int64_t n, float* stats,
                                       float* g) {
  const int lane = WarpLanes().rank(), K = int(p.K);
  Moments whole{};
  if (norm_spans_sample(p)) {
    for (int k = lane; k < K; k += 32) {
      Moments m{};
      m.count = group_count(p, k), m.mean = stats[2 * k], m.m2 = stats[2 * k + 1];
      whole = merge(whole, m);
    }
    whole = merge_lanes(whole, 32);
    whole.count = __shfl_sync(kWarp, whole.count, 0);
    whole.mean = __shfl_sync(kWarp, whole.mean, 0);
    whole.m2 = __shfl_sync(kWarp, whole.m2, 0);
  }
  for (int k = lane; k < K; k += 32) {
    Moments m{};
    m.count = group_count(p, k), m.mean = stats[2 * k], m.m2 = stats[2 * k + 1];
    g[k] = goodness_of(p.goodness, m) + (p.g0 ? p.g0[n * p.K + k] : 0.f);
    if (norm_spans_sample(p)) m = whole;
    norm_stats(p, m, stats + 2 * k);
  }
  __syncwarp();
}

// Objective weight over group size: dL/dg -> coef.
__device__ __forceinline__ float coef_scale(const LocalPassParams& p, int k) {
  return p.loss_params.scale / (p.goodness == Goodness::sum_sq ? 1.f : group_count(p, k));
}

// Every loss but symba. A label that names no group gives NaN, not a read out of bounds: labels on
// a device are not checked in Python, where that would cost a synchronisation.
__device__ inline void finalise_loss(const LocalPassParams& p, int64_t n, const float* g,
                                     float* coef, float* loss) {
  const WarpLanes lanes;
  const int64_t y = p.y[n];
  const bool binary =
      p.loss_params.kind == Loss::threshold || p.loss_params.kind == Loss::margin;
  const bool known = binary || (y >= 0 && y < p.K);
  const float value =
      loss_row(p.loss_params, int(p.K), g, known ? int(y) : 0, coef, lanes);
  for (int k = lanes.rank(); k < int(p.K); k += 32)
    coef[k] = known ? coef[k] * coef_scale(p, k) : nanf("");
  if (lanes.rank() == 0) *loss = known ? value : nanf("");
}

// Rows n and n + N/2 are one (positive, negative) pair; K = 1.
__device__ inline void finalise_pair(const LocalPassParams& p, int64_t n) {
  if (WarpLanes().rank() != 0) return;
  const int64_t other = n + p.N / 2;
  float slope;
  p.loss[n] = symba_pair(p.loss_params, p.g[n], p.g[other], &slope);
  p.coef[n] = slope * coef_scale(p, 0);
  p.coef[other] = -slope * coef_scale(p, 0);
}

}  // namespace ff
