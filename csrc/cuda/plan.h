// Launch choices of local_pass on CUDA: pure functions of sizes and device limits, tested without a
// GPU.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../common/layout.h"

namespace ff {

struct DeviceCaps {
  int device = 0;
  bool clusters = false;  // of a size that the one-read kernel was written for
  int multiprocessors = 1, l2_bytes = 0, shared_per_block = 0;
};

constexpr int kThreads = 256;
constexpr int kColumnThreads = 512;  // at most; leaves 128 registers a thread

inline int item_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Do rows of whole vectors make up an NHWC sample? Rows of several pixels are swept by one block,
// which has room for the moments of 1024 groups.
inline bool whole_rows(const LocalPassParams& p, int V) {
  const int64_t pixels = p.H * p.W;
  const int row = rows_of(int(p.C), int(pixels), V).pixels;
  return pixels % row == 0 && (row == 1 || p.K <= 1024);
}

inline bool lies_alike(const void* t, const void* a, int bytes) {
  return t == nullptr ||
         (reinterpret_cast<uintptr_t>(t) - reinterpret_cast<uintptr_t>(a)) % bytes == 0;
}

// Elements of a vector of sweep 1: 16 bytes, where what is read is aligned alike; else one.
inline int read_width(const LocalPassParams& p) {
  const int V = 16 / item_size(p.dtype);
  if (p.pool || !lies_alike(p.h_prev, p.a, 16)) return 1;
  if (!p.channels_last) return V;
  return reinterpret_cast<uintptr_t>(p.a) % 16 == 0 && whole_rows(p, V) ? V : 1;
}

// Can sweep 2 read and write V elements at once everywhere? A vector of a slice must lie inside one
// of the map's pixels.
inline bool writes_whole(const LocalPassParams& p, int V) {
  const int bytes = V * item_size(p.dtype);
  for (const void* t : {static_cast<const void*>(p.z), static_cast<const void*>(p.da), p.h_prev,
                        p.shortcut})
    if (!lies_alike(t, p.a, bytes)) return false;
  const int64_t apart = p.z != nullptr ? p.z_channels - p.C : 0;
  if (!p.channels_last) return apart * pixels_out(p) % V == 0;
  return reinterpret_cast<uintptr_t>(p.a) % bytes == 0 && whole_rows(p, V) &&
         (apart == 0 || (p.C % V == 0 && apart % V == 0));
}

// Elements of a vector of sweep 2: 16 bytes; or 8, for which a slice of 100 channels in 16 bits
// asks; else one.
inline int write_width(const LocalPassParams& p) {
  if (p.pool) return 1;
  const int V = 16 / item_size(p.dtype);
  if (writes_whole(p, V)) return V;
  return p.channels_last && V == 8 && writes_whole(p, V / 2) ? V / 2 : 1;
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

// Samples swept twice before the next ones, so that the second sweep finds them in L2; as many each
// time.
inline int64_t samples_at_once(const LocalPassParams& p, const DeviceCaps& caps) {
  if (p.phase != Phase::fused || p.loss_params.kind == Loss::symba) return p.N;
  const int64_t bytes = std::max<int64_t>(1, p.C * p.H * p.W * item_size(p.dtype));
  const int64_t most = std::max<int64_t>(caps.l2_bytes / 2 / bytes, (p.N + 15) / 16);
  const int64_t rounds = (p.N + most - 1) / most;
  return (p.N + rounds - 1) / rounds;
}

// The one-read kernel: a cluster of `blocks` thread blocks holds a sample in shared memory.
struct ClusterPlan {
  int blocks = 0;  // 0: not this kernel
  int vector = 0;  // elements that are written at once
  int slab = 0;    // elements a block holds
  int tile_bytes = 0, shared_bytes = 0;
  Columns read{1, 1, 0}, write{1, 1, 0};  // NHWC: of the sums and of z and da
  const char* why_not = nullptr;
};

constexpr int kMaxCluster = 8;  // portable; 16 needs an opt-in and fewer free neighbours
constexpr int kClusterGroups = 128;

// Threads of a block of the cluster kernel: four blocks of up to 128 registers a thread share a
// multiprocessor, whatever their slabs.
constexpr int kClusterThreads = 128, kClusterResident = 4;

// A slab that a cluster is cut into, where eight blocks reach it. Predicted for ResNet-17's 128
// samples on 132 multiprocessors, bf16 (51 KB slabs, the rule before, in brackets): stage 1 1024
// blocks (512), stage 2 1024 (256), stage 3 512 (128), stage 4 256 (128). 528 blocks are resident
// at once: stages 1 and 2 come in two waves, of which one stores while the other loads; stages 3
// and 4 go from one block a multiprocessor, which waits for its own loads, to four and two. At
// 6 loads of 16 bytes a thread the 4 blocks have 48 KB in flight. Predicted 80 % of copy or more at
// stages 1 to 3; at stage 4 (10 MB, 3 us at copy rate) the latency of load, two barriers and store,
// about 4 us, rules.
constexpr int kSlabBytes = 16 << 10;

// Shared memory of a block that is not the plan's to give: the kernel's own variables, rounded up.
constexpr int kClusterStatic = 16;

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

// Fewest blocks a cluster whose slab is of kSlabBytes or less; else the most blocks there are, if
// their slabs fit.
inline ClusterPlan use_cluster(const LocalPassParams& p, const DeviceCaps& caps) {
  if (!caps.clusters) return no_cluster("no thread-block clusters");
  if (p.phase != Phase::fused || (!p.z && !p.da)) return no_cluster("one sweep is enough");
  if (p.pool || p.h_prev) return no_cluster("pool or blend");
  if (p.loss_params.kind == Loss::symba) return no_cluster("a loss of two samples");
  if (p.dropout.threshold && p.straight_through)
    return no_cluster("dropout under straight-through");
  if (p.K > kClusterGroups) return no_cluster("more than 128 groups");
  const int item = item_size(p.dtype), V = read_width(p), W = write_width(p);
  const int64_t size = p.C * p.H * p.W, bytes = size * item;
  if (V == 1 || W == 1 || reinterpret_cast<uintptr_t>(p.a) % 16 != 0 || bytes % 16 != 0)
    return no_cluster("samples are not whole 16-byte vectors");
  if (bytes < 8192) return no_cluster("samples under 8 KB");
  // NHWC slabs are whole chunks of rows, so that every block sweeps whole chunks
  const Rows rows = rows_of(int(p.C), int(p.H * p.W), V);
  const int unit = p.channels_last ? kUnroll * rows.width : V;
  const int64_t units = (size + unit - 1) / unit;
  int64_t slab = 0, held = 0;
  int blocks = 1;
  for (;; blocks *= 2) {
    slab = (units + blocks - 1) / blocks * unit;
    held = std::min(slab, size) * item;
    if (held <= kSlabBytes || blocks == kMaxCluster) break;
  }
  const int64_t shared = held + cluster_extra_bytes(p, V);
  if (shared > caps.shared_per_block - kClusterStatic)
    return no_cluster("a sample does not fit the shared memory of eight blocks");
  ClusterPlan plan;
  plan.blocks = blocks, plan.vector = W, plan.slab = int(slab);
  plan.tile_bytes = int(held), plan.shared_bytes = int(shared);
  if (p.channels_last) {
    const int row = rows_of(int(p.C), int(p.H * p.W), W).width;
    plan.read = columns_of(rows.width / V, plan.slab / rows.width, kClusterThreads);
    plan.write = columns_of(row / W, plan.slab / row, kClusterThreads);
  }
  return plan;
}

}  // namespace ff
