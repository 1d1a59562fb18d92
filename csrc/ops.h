// Entry points of every op, one per back-end. Arguments were validated in Python (ffengine/ops);
// what only a kernel can know it checks with FF_CHECK.
#pragma once
#include <cstdint>

#include "params.h"

namespace ff {

void local_pass_cpu(const LocalPassParams& p);
// Scratch bytes that call would hold; its pointers are only tested for null.
int64_t local_pass_scratch_cpu(const LocalPassParams& p);
void batch_pass_cpu(const BatchPassParams& p);
int64_t batch_pass_scratch_cpu(const BatchPassParams& p);
void weight_update_cpu(const WeightUpdateParams& p);
// Scratch bytes that call would hold (its pointers are only tested for null), and the most that was
// held since the last reset.
int64_t weight_update_scratch_cpu(const WeightUpdateParams& p, int threads);
int64_t scratch_peak_cpu(bool reset);
// One optimizer step on n weights: gradient = grad * inv_scale. m and v are null where the
// optimizer has none.
void optimizer_step_cpu(float* weight, float* m, float* v, const float* grad, int64_t n,
                        float inv_scale, const OptimParams& optim);
void compressed_step_cpu(const CompressedStepParams& p);
// p.routes from p.a, and p.da from p.routes and p.dz.
void routes_cpu(const RoutesParams& p);
void along_routes_cpu(const RoutesParams& p);
// Whether the calling thread and the OpenMP threads it leads, torch's own among them, take denormal
// numbers as zeros from now on; returns what the calling thread did before.
bool flush_denormals(bool on);
// Before and after a tile's local_pass.
void linear_prepare_cpu(const LinearStepParams& p);
void linear_finish_cpu(const LinearStepParams& p);

// `stream` is a cudaStream_t; the calls return once the kernels are queued.
void local_pass_cuda(const LocalPassParams& p, void* stream);
void batch_pass_cuda(const BatchPassParams& p, void* stream);
void batch_middle_cuda(const BatchPassParams& p, const BatchMiddleParams& m, void* stream);
void optimizer_step_cuda(const OptimizerStepParams& p, void* stream);
void compressed_step_cuda(const CompressedStepParams& p, void* stream);
void linear_prepare_cuda(const LinearStepParams& p, void* stream);
void linear_finish_cuda(const LinearStepParams& p, void* stream);

}  // namespace ff
