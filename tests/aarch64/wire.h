// What the two sides of a forwarded call agree on: the params structs go over as they lie in memory
// (the same on x86-64 and aarch64), and with them the memory that their pointers name.
#pragma once
#include <unistd.h>

#include <cstdint>

#include "../../csrc/common/state_formats.h"
#include "../../csrc/params.h"

namespace ff::wire {

enum class Call : int32_t {
  local_pass, local_pass_scratch, batch_pass, batch_pass_scratch, weight_update,
  weight_update_scratch, scratch_peak, optimizer_step, compressed_step, routes, along_routes,
  linear_prepare, linear_finish, flush_denormals, isa_name, isas, set_isa, num_threads,
  set_num_threads
};

// optimizer_step_cpu's arguments, and those of the calls that take numbers alone.
struct Step {
  float *weight, *m, *v;
  const float* grad;
  int64_t n;
  float inv_scale;
  OptimParams optim;
};
template <class P>
struct Scratch {
  P p;
  int threads;
};
struct Number {
  int64_t value;
};
struct Name {
  char text[64];
};

struct Request {
  Call call;
  int32_t regions;  // that many Regions follow the struct, each with its bytes
  int64_t size;     // of the struct
};
struct Region {
  uint64_t address;  // where it lies in the caller's memory
  int64_t bytes;
};
// Followed by a text, an error's if the call failed, then by the regions' bytes.
struct Reply {
  int64_t value;
  int32_t failed;
  int32_t text;  // bytes
};

// False at the end of the stream.
inline bool read_all(int file, void* to, int64_t bytes) {
  for (char* at = static_cast<char*>(to); bytes > 0;) {
    const ssize_t got = read(file, at, size_t(bytes));
    if (got <= 0) return false;
    at += got, bytes -= got;
  }
  return true;
}
inline bool write_all(int file, const void* from, int64_t bytes) {
  for (const char* at = static_cast<const char*>(from); bytes > 0;) {
    const ssize_t put = write(file, at, size_t(bytes));
    if (put <= 0) return false;
    at += put, bytes -= put;
  }
  return true;
}

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// visit(pointer, bytes) for every pointer of a struct and the bytes that a call may touch there.
template <class V>
void pointers(LocalPassParams& p, V&& visit) {
  const int64_t e = size_of(p.dtype), pooled = p.pool ? (p.H / 2) * (p.W / 2) : p.H * p.W;
  const int64_t z = p.N * p.C * pooled, apart = p.z_channels;
  const int64_t slice = z == 0          ? 0
                        : p.channels_last ? (p.N * pooled - 1) * apart + p.C
                                          : ((p.N - 1) * apart + p.C) * pooled;
  visit(p.a, p.N * p.C * p.H * p.W * e);
  visit(p.y, p.N * 8);
  visit(p.g0, p.N * p.K * 4);
  visit(p.h_prev, z * e);
  visit(p.shortcut, z * e);
  visit(p.z, slice * e);
  visit(p.g, p.N * p.K * 4);
  visit(p.loss, (p.loss_params.kind == Loss::symba ? p.N / 2 : p.N) * 4);
  visit(p.coef, p.N * p.K * 4);
  visit(p.da, p.N * p.C * p.H * p.W * e);
  visit(p.stats, p.N * p.K * 8);
  visit(p.offsets, (p.K + 1) * 8);
  visit(p.dropout.clock, 4);
}

template <class V>
void pointers(BatchPassParams& p, V&& visit) {
  const int64_t e = size_of(p.dtype), pooled = p.pool ? (p.H / 2) * (p.W / 2) : p.H * p.W;
  visit(p.a, p.N * p.C * p.H * p.W * e);
  visit(p.y, p.N * 8);
  visit(p.gamma, p.C * 4);
  visit(p.table, (p.phase == BatchPhase::apply ? 5 : 1) * p.C * 4);
  visit(p.weight, p.N * p.C * 4);
  visit(p.moments, (p.phase == BatchPhase::stats ? 2 * p.N : 1) * p.C * 4);
  visit(p.extrema, 2 * p.N * p.C * 4);
  visit(p.z, p.N * p.C * pooled * e);
  visit(p.da, p.N * p.C * p.H * p.W * e);
}

template <class V>
void pointers(WeightUpdateParams& p, V&& visit) {
  const int64_t e = size_of(p.dtype), weights = p.O * p.C * p.kH * p.kW * 4;
  visit(p.x, p.N * p.C * p.H * p.W * e);
  visit(p.da, p.N * p.O * p.P * p.Q * e);
  visit(p.weight, weights);
  visit(p.m, weights);
  visit(p.v, weights);
  visit(p.grad, weights);
  visit(p.grad_out, weights);
}

template <class V>
void pointers(Step& p, V&& visit) {
  visit(p.weight, p.n * 4);
  visit(p.m, p.n * 4);
  visit(p.v, p.n * 4);
  visit(p.grad, p.n * 4);
}

template <class V>
void pointers(CompressedStepParams& p, V&& visit) {
  const int64_t state = p.format == StateFormat::f32 ? 4 : p.format == StateFormat::bf16 ? 2 : 1;
  const int64_t blocks = (p.n + kStateBlock - 1) / kStateBlock;
  visit(p.weight, p.n * (p.bf16_weight ? 2 : 4));
  visit(p.grad, p.n * 4);
  visit(p.m, p.n * state);
  visit(p.v, p.n * state);
  visit(p.m_scale, blocks * 4);
  visit(p.v_scale, blocks * 4);
}

template <class V>
void pointers(RoutesParams& p, V&& visit) {
  const int64_t e = size_of(p.dtype), pixels = p.pool ? (p.H / 2) * (p.W / 2) : p.H * p.W;
  visit(p.a, p.N * p.H * p.W * p.C * e);
  visit(p.routes, p.N * pixels * p.C);
  visit(p.dz, p.N * pixels * p.C * e);
  visit(p.da, p.N * p.H * p.W * p.C * e);
}

template <class V>
void pointers(LinearStepParams& p, V&& visit) {
  const int64_t e = size_of(p.dtype);
  visit(p.x, p.N * p.in * e);
  visit(p.from, p.N * p.out * e);
  visit(p.a, p.N * p.out * e);
  visit(p.bias, p.out * 4);
  visit(p.scale, p.N * 4);
  visit(p.sums, p.out * 4);
}

// Structs whose pointers are at most tested for null.
template <class P, class V>
void pointers(Scratch<P>&, V&&) {}
template <class V>
void pointers(Number&, V&&) {}
template <class V>
void pointers(Name&, V&&) {}

}  // namespace ff::wire
