// Launch choices of local_pass on CUDA: pure functions of sizes and device limits, tested without a
// GPU.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../common/layout.h"

namespace ff {

struct DeviceCaps {
  bool clusters = false;  // the device has them and this build has kernels for them
  int multiprocessors = 1, l2_bytes = 0, shared_per_block = 0;
};

constexpr int kThreads = 256;
constexpr int kColumnThreads = 512;  // at most; leaves 128 registers a thread

inline int item_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Elements a vector: 16 bytes, where every large tensor is aligned alike; else single elements.
inline int vector_width(const LocalPassParams& p) {
  if (p.pool) return 1;
  const uintptr_t at = reinterpret_cast<uintptr_t>(p.a) % 16;
  for (const void* t : {static_cast<const void*>(p.z), static_cast<const void*>(p.da), p.h_prev})
    if (t != nullptr && reinterpret_cast<uintptr_t>(t) % 16 != at) return 1;
  const int V = 16 / item_size(p.dtype);
  if (!p.channels_last) return V;
  // NHWC columns must begin on a vector in every row of every sample
  const int64_t pixels = p.H * p.W;
  if (at != 0 || pixels % rows_of(int(p.C), int(pixels), V).pixels != 0) return 1;
  return rows_of(int(p.C), int(pixels), V).pixels > 1 && p.K > 1024 ? 1 : V;
}

inline int power_of_two_up_to(int64_t x, int most) {
  int out = 1;
  while (out < most && out < x) out *= 2;
  return out;
}

// NCHW: a group of a sample is one contiguous run; `team` threads sweep it, chunk by chunk.
inline int team_size(const LocalPassParams& p, int V) {
  const int64_t run = std::max<int64_t>(1, p.C * pixels_out(p) / p.K);
  return power_of_two_up_to((run + kUnroll * V - 1) / (kUnroll * V), kThreads);
}

// NHWC: `width` vectors side by side, `lanes` chunks of four rows at a time.
struct Columns {
  int width, lanes, threads;
};

inline Columns columns_of(int vectors, int rows, int threads) {
  Columns out;
  out.width = std::min(vectors, threads);
  const int chunks = std::max(1, (rows + kUnroll - 1) / kUnroll);
  out.lanes = std::max(1, std::min(threads / out.width, chunks));
  out.threads = (out.width * out.lanes + 31) / 32 * 32;
  return out;
}

// NHWC sweep 1: blocks that share a sample's groups, so that few samples still fill the device; a
// block's part of a pixel stays 128 bytes wide or more.
inline int group_blocks(const LocalPassParams& p, int V, int64_t samples, const DeviceCaps& caps) {
  if (rows_of(int(p.C), pixels_out(p), V).pixels > 1) return 1;
  const int64_t wanted = (2 * caps.multiprocessors + samples - 1) / samples;
  const int64_t most = std::max<int64_t>(1, p.C * item_size(p.dtype) / 128);
  const int64_t least = (p.K + 1023) / 1024;
  return int(std::max(least, std::min({wanted, most, p.K})));
}

// Samples swept twice before the next ones, so that the second sweep finds them in L2.
inline int64_t samples_at_once(const LocalPassParams& p, const DeviceCaps& caps) {
  if (p.phase != Phase::fused || p.loss_params.kind == Loss::symba) return p.N;
  const int64_t bytes = std::max<int64_t>(1, p.C * p.H * p.W * item_size(p.dtype));
  return std::min(p.N, std::max<int64_t>(caps.l2_bytes / 2 / bytes, (p.N + 15) / 16));
}

// The one-read kernel: a cluster of `blocks` thread blocks holds a sample in shared memory.
struct ClusterPlan {
  int blocks = 0;  // 0: not this kernel
  int slab = 0;    // elements a block holds
  int tile_bytes = 0, shared_bytes = 0;
  const char* why_not = nullptr;
};

constexpr int kMaxCluster = 8;  // portable; 16 needs an opt-in and fewer free neighbours
constexpr int kClusterGroups = 128;

// Of the cluster kernel: few, so that four blocks of up to 128 registers share a multiprocessor.
constexpr int kClusterThreads = 128;

// Column sums and their row lanes' counts, or the moments of a slab's pieces (one a warp at least).
FF_HD int cluster_scratch_bytes(const LocalPassParams& p, int V) {
  const int K = int(p.K), warps = kClusterThreads / 32;
  return p.channels_last ? kClusterThreads * (V * 8 + 4) : (K > warps ? K : warps) * 12;
}

// And each group's share, statistics, goodness and coef.
inline int cluster_extra_bytes(const LocalPassParams& p, int V) {
  return (cluster_scratch_bytes(p, V) + int(p.K) * 28 + 15) / 16 * 16;
}

inline ClusterPlan no_cluster(const char* reason) {
  ClusterPlan plan;
  plan.why_not = reason;
  return plan;
}

// Fewest blocks a cluster whose slab still lets four, then two, then one of them share a
// multiprocessor: neighbours load while others store.
inline ClusterPlan use_cluster(const LocalPassParams& p, const DeviceCaps& caps) {
  if (!caps.clusters) return no_cluster("no thread-block clusters");
  if (p.phase != Phase::fused || (!p.z && !p.da)) return no_cluster("one sweep is enough");
  if (p.pool || p.h_prev) return no_cluster("pool or blend");
  if (p.loss_params.kind == Loss::symba) return no_cluster("a loss of two samples");
  if (p.dropout.threshold && p.straight_through)
    return no_cluster("dropout under straight-through");
  if (p.K > kClusterGroups) return no_cluster("more than 128 groups");
  const int V = 16 / item_size(p.dtype);
  const int64_t size = p.C * p.H * p.W;
  if (vector_width(p) != V || reinterpret_cast<uintptr_t>(p.a) % 16 != 0 || size % V != 0)
    return no_cluster("samples are not whole 16-byte vectors");
  if (size * item_size(p.dtype) < 8192) return no_cluster("samples under 8 KB");
  // NHWC slabs are whole chunks of rows, so that every block sweeps whole chunks
  const int unit =
      p.channels_last ? kUnroll * rows_of(int(p.C), int(p.H * p.W), V).width : V;
  const int extra = cluster_extra_bytes(p, V);
  for (int share : {4, 2, 1}) {
    // of each block's shared memory 1 KB is the system's, and a word is the kernel's own
    const int room = (caps.shared_per_block + 1024) / share - 1024 - 16;
    for (int blocks = 1; blocks <= kMaxCluster; blocks *= 2) {
      const int64_t units = (size + unit - 1) / unit, slab = (units + blocks - 1) / blocks * unit;
      const int64_t bytes = std::min(slab, size) * item_size(p.dtype);
      if (bytes + extra > room) continue;
      ClusterPlan plan;
      plan.blocks = blocks, plan.slab = int(slab), plan.tile_bytes = int(bytes);
      plan.shared_bytes = int(bytes) + extra;
      return plan;
    }
  }
  return no_cluster("a sample does not fit the shared memory of eight blocks");
}

}  // namespace ff
