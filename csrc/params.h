// Plain-old-data descriptions of one kernel call. Filled by one function each in bindings.cpp;
// no torch types, so one build serves every torch version.
#pragma once
#include <cstdint>

namespace ff {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };
// Codes shared with ffengine/ops/config.py.
enum class Loss : int32_t {
  none = -1, ce = 0, cwc = 1, pvn = 2, threshold = 3, symba = 4, sparsemax = 5, cwg = 6, margin = 7
};
enum class Goodness : int32_t { mean = 0, sum_sq = 1, mean_sq = 2 };
enum class NormKind : int32_t { none = 0, group = 1, layer = 2, length = 3 };
// fused: everything. stats: g and stats only. apply: z and da from given coef and stats.
enum class Phase : int32_t { fused = 0, stats = 1, apply = 2 };

struct LossParams {
  Loss kind;
  float p0, p1, p2;  // the loss's numbers, in the order of ffengine.ops.config
  float scale;       // weight of one loss value in the batch objective
};

struct DropoutParams {
  uint64_t seed;       // Philox key
  uint32_t layer, step;  // third and fourth counter words
  const uint32_t* clock;  // where the fourth word stands instead, or null
  uint32_t threshold;  // a word below this drops the element; 0 = no dropout
  float keep_scale;    // 1 / (1 - p)
};

struct LocalPassParams {
  // Tensors: host pointers on cpu, device pointers on cuda. Null where absent.
  const void* a;       // (N, C, H, W) pre-activation; NCHW or NHWC by channels_last
  const int64_t* y;    // (N,) class, or 1 / 0 for positive / negative rows
  const float* g0;     // (N, K) additive goodness term
  const void* h_prev;  // shape, dtype and layout of z, dense; blended in when blend != 1
  const void* shortcut;  // like h_prev; added to z
  void* z;             // (N, C, Hz, Wz) normalised features, C of a map's z_channels; may alias a
                       // when nothing pools
  float* g;            // (N, K) goodness, g0 included
  float* loss;         // (N,), or (N/2,) for symba
  float* coef;         // (N, K) dL/dg / m; input in phase apply
  void* da;            // shape and layout of a; dL/da times da_scale
  float* stats;        // (N, K, 2) per group: mean and rstd (z = (h - mean) * rstd); every norm
                       // kind and scope writes its two numbers per (n, k); length norms: mean 0
  const int64_t* offsets;  // (K + 1,) channel offsets of the groups, always given (host memory on
                           // cpu, device memory on cuda)

  int64_t N, C, H, W;  // of a; a linear layer has H = W = 1
  int64_t z_channels;  // C where z is dense; else z's pixels (NHWC) or samples (NCHW) are as far
                       // apart as those of a map of so many channels
  int64_t K;
  bool channels_last;
  bool equal_groups;   // every group owns C / K channels
  DType dtype;         // of a, h_prev, z, da
  Phase phase;
  Goodness goodness;
  NormKind norm;
  bool norm_rms;        // length: root mean square rather than l2
  bool norm_per_group;  // length: per group rather than per sample
  float norm_eps;
  bool straight_through;  // relu's gradient is 1 everywhere
  bool pool;              // 2x2 max after activation and dropout, floor mode
  float blend;            // beta; 1 = none
  DropoutParams dropout;
  LossParams loss_params;
  float da_scale;         // power of two, 1 except in fp16
  // Row n of this call is row (n < half ? start + n : half_start + n - half) of the whole batch.
  int64_t start, half, half_start;
};

// stats, apply: the two sweeps of BatchNorm; middle (cuda): what lies between them, as
// ffengine/ops/batch_stats.py defines it.
// peer_stats, peer_apply: the mean of h over positive rows, and the addition of its gradient.
enum class BatchPhase : int32_t { stats = 0, apply = 1, peer_stats = 2, peer_apply = 3, middle = 4 };

struct BatchPassParams {
  const void* a;        // (N, C, H, W) pre-activation; NCHW or NHWC by channels_last
  const int64_t* y;     // (N,) peer: 1 = positive row
  const float* gamma;   // (C,) its sign says which extremum of h wins a window under norm_first;
                        // null: the maximum
  const float* table;   // stats: (C,) a number amid each channel's, from which means are counted, so
                        // that rounding them costs little whatever the data's shift.
                        // apply: (5, C) mean, scale, shift, constant, slope. With p = h, pooled or
                        // not: z = (p - mean) scale + shift and
                        // dL/dp = weight (squares ? z : 1) - constant - slope (p - mean).
                        // peer_apply: (C,) dL/dh of every positive row, beside da's own
  const float* weight;  // (N, C); null without da
  float* moments;       // stats: (2, N, C) mean (from table) and centred M2 of what BatchNorm
                        // normalises.
                        // peer_stats: (C,) mean of h over the positive rows, NaN without any
  float* extrema;       // stats: (2, N, C) the same of the windows' winners; norm_first and pool
  void* z;              // shape of the pooled map; may alias a when nothing pools
  void* da;             // shape and layout of a; peer_apply adds to it
  int64_t N, C, H, W;
  DType dtype;          // of a, z, da
  BatchPhase phase;
  bool channels_last;
  bool pool;              // 2x2 max, floor mode
  bool norm_first;        // BatchNorm before the pool
  bool squares;           // goodness is of squares
  bool straight_through;  // relu's gradient is 1 everywhere
};

// The middle phase reads BatchPassParams' moments, extrema, y and gamma and writes its table and
// weight; besides:
struct BatchMiddleParams {
  const float* pivot;    // (C,) the table of phase stats
  const float* beta;     // (C,) beside gamma, or null
  float* running_mean;   // (C,) or null; moved in training
  float* running_var;
  const int64_t* offsets;  // (K + 1,) as in LocalPassParams
  float* g;              // (N, K)
  float* loss;           // (N,) or (N/2,); null without y
  float* coef;           // (N, K) dL/dg / m; null without y
  float* dgamma;         // (C,) or null
  float* dbeta;
  double* work;          // (3, C): mean less pivot, 1 / sigma, what rounding the mean lost
  int64_t K, pixels, pixels_z;  // pixels of a channel of a sample: of the statistics, of z
  bool equal_groups, training, use_running;
  Goodness goodness;
  double momentum, eps;
  LossParams loss_params;
  float da_scale;
};

enum class Optim : int32_t { sgd = 0, adam = 1, adamw = 2 };

struct OptimParams {
  Optim kind;
  // double: 1 - float(0.999) is off by 1e-5, which would show in the bias correction. Kernels turn
  // them into fp32 coefficients on the host.
  double lr, weight_decay;
  double beta1, beta2, eps;  // Adam
  double momentum;           // SGD
  bool nesterov;
  int64_t step;             // 1 at the first update
  const float* row;  // cuda: (8,) on the device, in place of lr, weight_decay and step, so that no
                     // argument changes from step to step: the decay (times lr for adamw), the
                     // step size, the root of the second moment's correction, and in the last
                     // place the step's bits as an int32; or null
};

// One optimizer step on n weights: gradient = grad * inv_scale. All tensors lie in one order.
struct OptimizerStepParams {
  float* weight;
  float* m;  // null where the optimizer has none
  float* v;
  const void* grad;  // of grad_dtype
  void* half;        // the updated weight in half_dtype (bf16 or fp16), or null
  DType grad_dtype, half_dtype;
  int64_t n;
  float inv_scale;
  OptimParams optim;
};

// How optimizer states lie in memory: csrc/common/state_formats.h.
enum class StateFormat : int32_t { f32 = 0, bf16 = 1, bits8 = 2 };

// One optimizer step in fp32 on weights or states that are stored in fewer bits.
struct CompressedStepParams {
  void* weight;        // (n,) fp32, or bf16 with bf16_weight; updated
  const void* grad;    // (n,) in the weight's memory order, of grad_dtype (cpu: fp32)
  void* half;          // (n,) cuda: the updated fp32 weight in half_dtype (bf16 or fp16), or null
  DType grad_dtype, half_dtype;
  void* m;             // (n,) by `format`; null where the optimizer has none
  void* v;
  float* m_scale;      // (ceil(n / kStateBlock),), bits8 only
  float* v_scale;
  int64_t n;
  StateFormat format;  // of m and v
  bool bf16_weight;
  float inv_scale;     // gradient = grad * inv_scale
  uint64_t seed;       // Philox key
  uint32_t stream;     // third counter word; the fourth is optim.step
  OptimParams optim;
};

// Where a gradient goes through relu and a 2x2 max pool: a byte a unit of z, 1 where relu passes a
// gradient; of a pooled window its arg-max in row-major order, or kBlocked.
constexpr int kBlocked = 4;
struct RoutesParams {
  const void* a;    // (N, H, W, C): pre-activations, read to write `routes`
  uint8_t* routes;  // like z, (N, H / 2, W / 2, C) with `pool`
  const void* dz;   // like z
  void* da;         // like a, written along `routes`
  int64_t N, C, H, W;
  bool pool, straight;
  DType dtype;      // of a, dz and da
};

// Weight gradient of a convolution (a linear layer: kH = kW = H = W = 1) and, with finish, the
// optimizer step on it.
struct WeightUpdateParams {
  const void* x;    // (N, C, H, W)
  const void* da;   // (N, O, P, Q)
  float* weight;    // (O, C, kH, kW), updated when finish; weight, m, v, grad and grad_out all lie
                    // as weight_channels_last says: (O, kH, kW, C) in memory, or contiguous. The
                    // engine keeps convolution weights channels_last: the library's forward then
                    // makes no second copy of them (23 MB at 800x800x3x3, measured), and the GEMM's
                    // own (O, taps, C) order is written out as it stands.
  float* m;         // Adam first moment or SGD momentum; null where the optimizer has none
  float* v;         // Adam second moment
  float* grad;      // (O, C, kH, kW) accumulation buffer; null: no buffer exists
  float* grad_out;  // where the finished gradient is written; null: nowhere
  int64_t N, C, H, W, O, P, Q, kH, kW, stride, pad;
  DType dtype;      // of x and da
  bool x_channels_last, da_channels_last, weight_channels_last;
  bool accumulate;  // grad holds earlier tiles' sum: add to it
  bool finish;      // step the optimizer
  float inv_scale;  // 1 / da_scale
  OptimParams optim;
};

// The passes of linear_step over a tile of samples that surround its local_pass. prepare:
// scale = 1 / (||x|| + eps) row by row, a = scale * from + bias: in fp32 from = a = x W^T, the
// input's normalisation folded in; in 16 bits from = x, a = the normalised input itself. finish: the
// column sums of da for the bias, then da *= scale, so that da^T x is the weight gradient.
struct LinearStepParams {
  const void* x;      // (N, in); prepare only
  const void* from;   // (N, out); prepare only
  void* a;            // (N, out): a of prepare (may be from), da of finish (in place)
  const float* bias;  // (out,), or null; prepare only
  float* scale;       // (N,), written by prepare unless null; finish: null = 1
  float* sums;        // cpu: (out,), added to; cuda: (chunks, out) sums of `chunk` rows each; or null
  int64_t N, in, out;
  int64_t chunk;      // cuda
  DType dtype;        // of x and a
  bool rms;           // root mean square rather than l2
  float eps;
  float inv_scale;    // cpu: factor of the sums, 1 / da_scale
};

}  // namespace ff
