// local_pass on Hopper and Blackwell: one read of `a`. A cluster of thread blocks holds a sample in
// its shared memory between the sums and the normalisation.
//
//   1. every block copies its slab of the sample into shared memory (cp.async, all in flight)
//   2. its share of every group's moments, from shared memory; dropped elements become 0 there, so
//      that Philox is drawn once
//   3. every block reads all blocks' shares over distributed shared memory, in rank order, and one
//      warp of each computes the statistics, the loss and coef: the same numbers in every block
//   4. z and da from the slab
//
// Which calls come here: use_cluster in plan.h.
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

#include "runtime.h"
#include "sweep.cuh"

namespace ff {
namespace {

struct ClusterArgs {
  int blocks, slab, tile_bytes;  // of ClusterPlan
  Columns read, write;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

namespace cg = cooperative_groups;

// A block's shared memory behind its tile, in this order; sized by cluster_extra_bytes.
struct Shared {
  unsigned char* scratch;  // NCHW: moments of pieces; NHWC: column sums
  Moments* share;          // (K) of this block's slab
  float *stats, *g, *coef;
};

__device__ __forceinline__ Shared shared_at(unsigned char* start, int scratch_bytes, int K) {
  Moments* share = reinterpret_cast<Moments*>(start + scratch_bytes);
  float* stats = reinterpret_cast<float*>(share + K);
  return {start, share, stats, stats + 2 * K, stats + 3 * K};
}

// Elements [first, last) of a sample: a block's slab.
struct Slab {
  int first, last;
};

// A block's NCHW slab as pieces: each group's part of it in `a_group` ranges, one warp a piece.
struct Pieces {
  int first_group, groups, a_group;
};

__device__ __forceinline__ Pieces pieces_of(const LocalPassParams& p, Slab slab, int warps) {
  if (slab.first >= slab.last) return {0, 0, 1};
  const int Q = pixels_out(p);
  const int low = group_of(p, slab.first / Q), high = group_of(p, (slab.last - 1) / Q);
  return {low, high - low + 1, max(1, warps / (high - low + 1))};
}

template <int V>
__device__ __forceinline__ Slab piece_range(const LocalPassParams& p, Slab slab,
                                            const Pieces& pieces, int piece) {
  const int k = pieces.first_group + piece / pieces.a_group, j = piece % pieces.a_group;
  const int low = max(group_begin(p, k) * pixels_out(p), slab.first);
  const int high = min(group_begin(p, k + 1) * pixels_out(p), slab.last);
  const int each = ((high - low + pieces.a_group - 1) / pieces.a_group + V - 1) / V * V;
  return {min(low + j * each, high), min(low + (j + 1) * each, high)};
}

// Writes a chunk back with its dropped elements as 0; a NaN stays.
template <class T, int V>
__device__ __forceinline__ void zero_dropped(T* tile, const Span& span, const float* x,
                                             uint32_t kept) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    float out[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float value = x[u * V + v];
      out[v] = (kept >> (u * V + v) & 1) || value != value ? value : 0.f;
    }
    store_vector<T, V>(tile, span.start + u * span.step, span.low, span.high, out);
  }
}

// The moments of the slab's pieces, then of its groups, into shared.share.
template <class T, int V>
__device__ __forceinline__ void gather_slab(const LocalPassParams& p, const Sample& s, Slab slab,
                                            T* tile, const Shared& shared) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const Pieces pieces = pieces_of(p, slab, kClusterThreads / 32);
  const int count = pieces.groups * pieces.a_group;
  Moments* moments = reinterpret_cast<Moments*>(shared.scratch);
  for (int piece = warp; piece < count; piece += kClusterThreads / 32) {
    const Slab range = piece_range<V>(p, slab, pieces, piece);
    Moments m = gather_run<T, V>(p, s, tile, range.first, range.last, lane, 32,
                                 [&](const Span& span, const float* x, uint32_t kept) {
                                   zero_dropped<T, V>(tile, span, x, kept);
                                 });
    m = merge_lanes(m, 32);
    if (lane == 0) moments[piece] = m;
  }
  __syncthreads();
  for (int k = int(threadIdx.x); k < int(p.K); k += kClusterThreads) {
    Moments m{};
    const int at = (k - pieces.first_group) * pieces.a_group;
    if (k >= pieces.first_group && k < pieces.first_group + pieces.groups)
      for (int j = 0; j < pieces.a_group; ++j) m = merge(m, moments[at + j]);
    shared.share[k] = m;
  }
}

template <class T, int V>
__device__ __forceinline__ void apply_slab(const LocalPassParams& p, const Sample& s, Slab slab,
                                           const T* tile, const Shared& shared) {
  const Pieces pieces = pieces_of(p, slab, kClusterThreads / 32);
  const int count = pieces.groups * pieces.a_group;
  for (int piece = int(threadIdx.x) / 32; piece < count; piece += kClusterThreads / 32) {
    const Slab range = piece_range<V>(p, slab, pieces, piece);
    const int k = pieces.first_group + piece / pieces.a_group;
    apply_run<T, V, true>(p, s, tile, range.first, range.last, int(threadIdx.x) % 32, 32,
                          group_scale(p, shared.stats[2 * k], shared.stats[2 * k + 1],
                                      p.coef ? shared.coef[k] : 0.f));
  }
}

// All blocks' shares of the groups, merged in rank order, as (mean, M2) in shared.stats.
__device__ __forceinline__ void merge_cluster(const LocalPassParams& p, const Shared& shared,
                                              int blocks) {
  cg::cluster_group cluster = cg::this_cluster();
  for (int k = int(threadIdx.x); k < int(p.K); k += kClusterThreads) {
    Moments m{};
    for (int rank = 0; rank < blocks; ++rank)
      m = merge(m, *cluster.map_shared_rank(shared.share + k, rank));
    shared.stats[2 * k] = m.mean;
    shared.stats[2 * k + 1] = m.m2;
  }
}

// Statistics, loss and coef by warp 0; rank 0's copy goes to memory.
__device__ __forceinline__ void finalise_cluster(const LocalPassParams& p, int64_t n,
                                                 const Shared& shared, int rank) {
  __shared__ float loss;
  const bool with_loss = p.loss_params.kind != Loss::none;
  if (threadIdx.x < 32) {
    finalise_groups(p, n, shared.stats, shared.g);
    if (with_loss) finalise_loss(p, n, shared.g, shared.coef, &loss);
  }
  __syncthreads();
  if (rank != 0) return;
  for (int k = int(threadIdx.x); k < int(p.K); k += kClusterThreads) {
    p.g[n * p.K + k] = shared.g[k];
    p.stats[2 * (n * p.K + k)] = shared.stats[2 * k];
    p.stats[2 * (n * p.K + k) + 1] = shared.stats[2 * k + 1];
    if (with_loss) p.coef[n * p.K + k] = shared.coef[k];
  }
  if (with_loss && threadIdx.x == 0) p.loss[n] = loss;
}

// The rows of an NHWC slab, by vectors of V elements.
template <int V>
__device__ __forceinline__ Grid slab_rows(const LocalPassParams& p, Slab slab,
                                          const Columns& columns) {
  const Rows rows = rows_of(int(p.C), pixels_out(p), V);
  return {rows,           slab.first / rows.width, slab.last / rows.width, 0,
          rows.width / V, columns.width,           columns.lanes};
}

#endif  // __CUDA_ARCH__ >= 900

// Sums by vectors of 16 bytes, z and da by V elements.
template <class T, int V, bool channels_last>
__global__ void __launch_bounds__(kClusterThreads, kClusterResident)
    one_read(const __grid_constant__ LocalPassParams p, ClusterArgs args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int R = kVector<T>;
  extern __shared__ __align__(16) unsigned char bytes[];
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = int(cluster.block_rank()), size = int(p.C * p.H * p.W);
  const Sample s = sample_of(p, int64_t(blockIdx.x) / args.blocks);
  const Slab slab{min(rank * args.slab, size), min((rank + 1) * args.slab, size)};

  T* const held = reinterpret_cast<T*>(bytes);
  const Shared shared =
      shared_at(bytes + args.tile_bytes, cluster_scratch_bytes(p, R), int(p.K));
  const T* source = static_cast<const T*>(p.a) + s.base + slab.first;
  for (int i = int(threadIdx.x) * R; i < slab.last - slab.first; i += kClusterThreads * R)
    __pipeline_memcpy_async(held + i, source + i, 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();

  T* tile = held - slab.first;  // indexed by the element's place in its sample
  if (channels_last) {
    float2* columns = reinterpret_cast<float2*>(shared.scratch);
    gather_columns<T, R>(p, s, tile, slab_rows<R>(p, slab, args.read), 0, int(p.K), shared.share,
                         columns, reinterpret_cast<float*>(columns + kClusterThreads * R),
                         [&](const Span& span, const float* x, uint32_t kept) {
                           zero_dropped<T, R>(tile, span, x, kept);
                         });
  } else {
    gather_slab<T, R>(p, s, slab, tile, shared);
  }
  cluster.sync();
  merge_cluster(p, shared, args.blocks);
  __syncthreads();
  cluster.barrier_arrive();  // this block reads no other's memory from here on
  finalise_cluster(p, s.n, shared, rank);
  if (channels_last)
    apply_columns<T, V, true>(p, s, tile, slab_rows<V>(p, slab, args.write), shared.stats,
                              p.coef ? shared.coef : nullptr);
  else
    apply_slab<T, V>(p, s, slab, tile, shared);
  __syncthreads();
  cluster.barrier_wait();  // and may go once none reads its memory
#endif
}

template <class T, int V, bool channels_last>
void launch(const LocalPassParams& p, const ClusterPlan& plan, const DeviceCaps& caps,
            cudaStream_t stream) {
  const ClusterArgs args{plan.blocks, plan.slab, plan.tile_bytes, plan.read, plan.write};
  allow_shared<one_read<T, V, channels_last>>(caps, plan.shared_bytes);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(plan.blocks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid_of(p.N * plan.blocks));
  config.blockDim = dim3(kClusterThreads);
  config.dynamicSmemBytes = size_t(plan.shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  FF_CUDA(cudaLaunchKernelEx(&config, one_read<T, V, channels_last>, p, args));
}

template <class T>
void launch_layout(const LocalPassParams& p, const ClusterPlan& plan, const DeviceCaps& caps,
                   cudaStream_t stream) {
  constexpr int V = kVector<T>;
  if (!p.channels_last) return launch<T, V, false>(p, plan, caps, stream);
  if constexpr (V == 8) {
    if (plan.vector == 4) return launch<T, 4, true>(p, plan, caps, stream);
  }
  launch<T, V, true>(p, plan, caps, stream);
}

}  // namespace

bool cluster_kernels_built(int device) {
  static std::array<bool, kDevices> built;
  static std::array<std::once_flag, kDevices> asked;
  std::call_once(asked[size_t(device)], [device] {
    cudaFuncAttributes attributes;
    FF_CUDA(cudaFuncGetAttributes(&attributes, one_read<float, 4, false>));
    built[size_t(device)] = attributes.ptxVersion >= 90;
  });
  return built[size_t(device)];
}

void local_pass_cluster(const LocalPassParams& p, const ClusterPlan& plan, const DeviceCaps& caps,
                        cudaStream_t stream) {
  switch (p.dtype) {
    case DType::f32: return launch_layout<float>(p, plan, caps, stream);
    case DType::bf16: return launch_layout<__nv_bfloat16>(p, plan, caps, stream);
    case DType::f16: return launch_layout<__half>(p, plan, caps, stream);
  }
}

}  // namespace ff
