// What lies between the sweeps of batch_pass under BatchNorm (ffengine/ops/batch_stats.py defines it),
// a launch a stage:
//
//   channels  every channel's moments merged over the batch; what z is normalised by; running
//             statistics
//   rows      goodness, loss, coef and the (N, C) weights of da, a block a row (symba: a pair)
//   answers   dgamma, dbeta and, with them, what the gradient through the batch statistics subtracts
//
// In fp64, as there: these are few numbers, and dgamma reaches every element of da. Sums over the
// batch go in a fixed order. Predicted 10 us a layer of CwComp's at batch 128, where some thirty small
// launches would be 120; one block for all stages would go through 480 channels 32 at a time, 30 us.
#include "../ops.h"
#include "finalise.cuh"
#include "runtime.h"

namespace ff {
namespace {

// Threads of a row; of 32 channels, with lanes over the rows.
constexpr int kRowThreads = 256, kAcross = 32, kRowLanes = 16;
constexpr int kChannelThreads = kAcross * kRowLanes;

// What the kernels read; rows is how local_pass would describe the rows of z, for its losses.
struct Middle {
  BatchPassParams p;
  BatchMiddleParams m;
  LocalPassParams rows;
  float *table, *weight;  // of p, to be written
};

// A column's total over the block's row lanes, the same for all of them.
__device__ __forceinline__ double column_sum(double x) {
  __shared__ double parts[kChannelThreads];
  __syncthreads();
  parts[threadIdx.x] = x;
  __syncthreads();
  double total = 0.0;
  for (int i = 0; i < kRowLanes; ++i) total += parts[i * kAcross + int(threadIdx.x) % kAcross];
  return total;
}

// Table rows 0 to 2 of 32 channels, 3 and 4 as 0; work; the running statistics.
__device__ __forceinline__ void channel_stage(const Middle& x, int64_t first) {
  const BatchPassParams& p = x.p;
  const BatchMiddleParams& m = x.m;
  const int64_t c = first + int(threadIdx.x) % kAcross, plane = p.N * p.C;
  const int lane = int(threadIdx.x) / kAcross;
  const bool there = c < p.C;
  const double pixels = double(m.pixels), count = double(p.N) * pixels;
  double centre = 0.0, var = 0.0;
  if (m.training) {
    double total = 0.0, squares = 0.0;
#pragma unroll 4
    for (int64_t n = lane; n < p.N && there; n += kRowLanes)
      total += double(p.moments[n * p.C + c]);
    centre = column_sum(total) / double(p.N);
#pragma unroll 4
    for (int64_t n = lane; n < p.N && there; n += kRowLanes) {
      const double gap = double(p.moments[n * p.C + c]) - centre;
      squares += double(p.moments[plane + n * p.C + c]) + gap * gap * pixels;
    }
    var = column_sum(squares) / count;
  }
  if (lane != 0 || !there) return;
  const double pivot = double(m.pivot[c]);
  double mean = centre + pivot;
  if (m.running_mean != nullptr) {
    const double old_mean = double(m.running_mean[c]), old_var = double(m.running_var[c]);
    if (m.training) {
      m.running_mean[c] = float((1.0 - m.momentum) * old_mean + m.momentum * mean);
      m.running_var[c] =
          float((1.0 - m.momentum) * old_var + m.momentum * (var * (count / (count - 1.0))));
    }
    if (m.use_running || !m.training) mean = old_mean, var = old_var;
  }
  const double rstd = 1.0 / sqrt(var + m.eps);
  const double scale = p.gamma != nullptr ? rstd * double(p.gamma[c]) : rstd;
  // the centre in fp32 and what its rounding lost, in the shift
  const float rounded = float(mean);
  const double lost = mean - double(rounded);
  x.table[c] = rounded;
  x.table[p.C + c] = float(scale);
  x.table[2 * p.C + c] = float((m.beta != nullptr ? double(m.beta[c]) : 0.0) - scale * lost);
  x.table[3 * p.C + c] = x.table[4 * p.C + c] = 0.f;
  m.work[c] = mean - pivot;
  m.work[p.C + c] = rstd;
  m.work[2 * p.C + c] = lost;
}

// Of a sample's channel: its mean less the normaliser's, M2, scale, and the mean of z.
struct ChannelOfRow {
  double centred, m2, scale, z_mean;
};

__device__ __forceinline__ double scale_of(const Middle& x, int64_t c) {
  const double rstd = x.m.work[x.p.C + c];
  return x.p.gamma != nullptr ? rstd * double(x.p.gamma[c]) : rstd;
}

__device__ __forceinline__ ChannelOfRow channel_of(const Middle& x, int64_t n, int64_t c) {
  const float* of_z = x.p.extrema != nullptr ? x.p.extrema : x.p.moments;
  const int64_t at = n * x.p.C + c;
  ChannelOfRow out;
  out.centred = double(of_z[at]) - x.m.work[c];
  out.m2 = double(of_z[x.p.N * x.p.C + at]);
  out.scale = scale_of(x, c);
  out.z_mean = out.centred * out.scale + (x.m.beta != nullptr ? double(x.m.beta[c]) : 0.0);
  return out;
}

// g of row n, by the whole block: `team` lanes a group, a power of two.
__device__ __forceinline__ void goodness_row(const Middle& x, int64_t n, int team) {
  const BatchMiddleParams& m = x.m;
  const int K = int(m.K), lane = int(threadIdx.x) % team;
  const double pixels = double(m.pixels_z);
  for (int first = 0; first < K; first += kRowThreads / team) {
    const int k = first + int(threadIdx.x) / team;
    const int begin = k < K ? group_begin(x.rows, k) : 0;
    const int end = k < K ? group_begin(x.rows, k + 1) : 0;
    double sum = 0.0;
    for (int c = begin + lane; c < end; c += team) {
      const ChannelOfRow of = channel_of(x, n, c);
      sum += m.goodness == Goodness::mean
                 ? of.z_mean * pixels
                 : of.m2 * of.scale * of.scale + of.z_mean * of.z_mean * pixels;
    }
    for (int o = team / 2; o > 0; o /= 2) sum += __shfl_xor_sync(kWarp, sum, o);
    if (k >= K || lane != 0) continue;
    const double size = m.goodness == Goodness::sum_sq ? 1.0 : double(end - begin) * pixels;
    m.g[n * K + k] = float(sum / size);
  }
}

// weight (N, C) of da in row n.
__device__ __forceinline__ void weigh_row(const Middle& x, int64_t n) {
  const double factor = double(x.m.da_scale) * (x.m.goodness == Goodness::mean ? 1.0 : 2.0);
  for (int c = int(threadIdx.x); c < int(x.p.C); c += kRowThreads) {
    const double coef = double(x.m.coef[n * x.m.K + group_of(x.rows, c)]);
    x.weight[n * x.p.C + c] = float(coef * (scale_of(x, c) * factor));
  }
}

// g, loss, coef and weights of row n; of rows n and n + N / 2 where they are pairs.
__device__ __forceinline__ void row_stage(const Middle& x, int64_t n, int team) {
  const bool pairs = x.m.loss_params.kind == Loss::symba;
  goodness_row(x, n, team);
  if (pairs) goodness_row(x, n + x.p.N / 2, team);
  if (x.m.loss == nullptr) return;
  __syncthreads();
  if (threadIdx.x < 32) {
    const int64_t at = n * x.m.K;
    if (pairs) finalise_pair(x.rows, n);
    else finalise_loss(x.rows, n, x.m.g + at, x.m.coef + at, x.m.loss + n);
  }
  __syncthreads();
  weigh_row(x, n);
  if (pairs) weigh_row(x, n + x.p.N / 2);
}

// dgamma, dbeta and table rows 3 and 4 of 32 channels.
__device__ __forceinline__ void answer_stage(const Middle& x, int64_t first) {
  const BatchPassParams& p = x.p;
  const BatchMiddleParams& m = x.m;
  const int64_t c = first + int(threadIdx.x) % kAcross;
  const int lane = int(threadIdx.x) / kAcross;
  const bool there = c < p.C;
  const int k = there ? group_of(x.rows, int(c)) : 0;
  const double pixels = double(m.pixels_z);
  double along = 0.0, beside = 0.0;
  for (int64_t n = lane; n < p.N && there; n += kRowLanes) {
    const ChannelOfRow of = channel_of(x, n, c);
    const double coef = double(m.coef[n * m.K + k]);
    if (m.goodness == Goodness::mean) {
      along += of.centred * coef * pixels;
      beside += coef * pixels;
    } else {  // sum over pixels of z (p - mean) = scale M2 + pixels z_mean centred
      along += (of.centred * of.z_mean * pixels + of.m2 * of.scale) * coef * 2.0;
      beside += of.z_mean * coef * (2.0 * pixels);
    }
  }
  along = column_sum(along);
  beside = column_sum(beside);
  if (lane != 0 || !there) return;
  const double rstd = m.work[p.C + c];
  if (m.dgamma != nullptr) {
    m.dgamma[c] = float(along * rstd);
    m.dbeta[c] = float(beside);
  }
  if (!m.training || m.use_running) return;
  const double answer = scale_of(x, c) * (double(m.da_scale) / (double(p.N) * double(m.pixels)));
  const double slope = answer * rstd * rstd * along;
  x.table[3 * p.C + c] = float(answer * beside - slope * m.work[2 * p.C + c]);
  x.table[4 * p.C + c] = float(slope);
}

__global__ void __launch_bounds__(kChannelThreads, 1)
    middle_channels(const __grid_constant__ Middle x) {
  channel_stage(x, int64_t(blockIdx.x) * kAcross);
}
__global__ void __launch_bounds__(kRowThreads, 1)
    middle_rows(const __grid_constant__ Middle x, int team) {
  row_stage(x, blockIdx.x, team);
}
__global__ void __launch_bounds__(kChannelThreads, 1)
    middle_answers(const __grid_constant__ Middle x) {
  answer_stage(x, int64_t(blockIdx.x) * kAcross);
}

// The rows of z as local_pass describes its own.
LocalPassParams rows_of_z(const BatchPassParams& p, const BatchMiddleParams& m) {
  LocalPassParams rows{};
  rows.y = p.y, rows.offsets = m.offsets;
  rows.g = m.g, rows.loss = m.loss, rows.coef = m.coef;
  rows.N = p.N, rows.C = p.C, rows.H = m.pixels_z, rows.W = 1, rows.K = m.K;
  rows.equal_groups = m.equal_groups;
  rows.goodness = m.goodness;
  rows.loss_params = m.loss_params;
  return rows;
}

}  // namespace

void batch_middle_cuda(const BatchPassParams& p, const BatchMiddleParams& m, void* stream) {
  if (p.N == 0) return;
  const DeviceOf current(p.moments);
  const auto queue = static_cast<cudaStream_t>(stream);
  const Middle x{p, m, rows_of_z(p, m), const_cast<float*>(p.table), const_cast<float*>(p.weight)};
  const int team = power_of_two_up_to(p.C / m.K, 32);
  const unsigned channels = blocks_for(p.C, kAcross);
  const int64_t rows = m.loss_params.kind == Loss::symba ? p.N / 2 : p.N;
  middle_channels<<<channels, kChannelThreads, 0, queue>>>(x);
  middle_rows<<<grid_of(rows), kRowThreads, 0, queue>>>(x, team);
  if (m.loss != nullptr) middle_answers<<<channels, kChannelThreads, 0, queue>>>(x);
  FF_CUDA(cudaGetLastError());
}

}  // namespace ff
