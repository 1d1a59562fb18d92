// batch_pass on the CPU: reference ffengine/reference/batch_pass.py, public op
// ffengine/ops/batch_pass.py, kernel csrc/cpu/batch_pass_kernel.cpp.
//
// A thread takes whole samples through a sweep; a row's numbers depend on nothing but the row, and
// what couples the rows is between the sweeps, so the thread count changes no bit.
#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>

#include "../check.h"
#include "../ops.h"
#include "batch_pass_kernel.h"
#include "isa.h"

namespace ff {
namespace {

// C times the fewest pixels that give whole 16-lane vectors and rows of 256 elements or more.
int64_t period_of(int64_t channels, int64_t pixels) {
  int64_t rows = 1;
  while (rows < 16 && rows < pixels && (rows * channels % 16 != 0 || rows * channels < 256)) ++rows;
  return rows * channels;
}

bool normalises(const BatchPassParams& p) {
  return p.phase == BatchPhase::stats || p.phase == BatchPhase::apply;
}

BatchPassPlan make_plan(const BatchPassParams& p) {
  BatchPassPlan plan{};
  plan.pixels = p.H * p.W;
  plan.pixels_z = p.pool ? (p.H / 2) * (p.W / 2) : plan.pixels;
  plan.channels_inner = p.channels_last || plan.pixels == 1;
  plan.period = plan.channels_inner ? period_of(p.C, plan.pixels) : 0;
  if (p.pool && p.phase == BatchPhase::stats)
    plan.pooled = plan.channels_inner ? p.C * plan.pixels_z : plan.pixels_z;
  return plan;
}

// Elements below which a second thread does not pay: about 5 us of work, a parallel region's cost.
constexpr int64_t kGrain = 16384;

int team_of(const BatchPassParams& p) {
  const int64_t items = p.phase == BatchPhase::peer_stats ? (p.C + 63) / 64 : p.N;
  const int64_t useful = std::min(items, 1 + p.N * p.C * p.H * p.W / kGrain);
  return int(std::min<int64_t>(useful, num_threads()));
}

constexpr int64_t kAlign = 64;

// Lays a thread's scratch out from `base` and returns its size; base may be null to ask for it.
int64_t lay_out(const BatchPassParams& p, const BatchPassPlan& plan, std::byte* base,
                BatchPassScratch* s) {
  int64_t used = 0;
  const auto take = [&](int64_t elements) {
    std::byte* at = base + used;
    used += (elements * 4 + kAlign - 1) / kAlign * kAlign;
    return reinterpret_cast<float*>(at);
  };
  const int tables = p.phase == BatchPhase::stats ? 3 : 6;
  for (int i = 0; i < tables; ++i) s->table[i] = take(plan.period);
  s->pooled = take(plan.pooled);
  return used;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

void peer(const BatchPassParams& p, int team) {
#pragma omp parallel for schedule(static, 1) num_threads(team)
  for (int part = 0; part < team; ++part) {
    if (p.phase == BatchPhase::peer_stats) {
      FF_ISA_CALL(batch_pass_peer_stats(p, p.C * part / team, p.C * (part + 1) / team))
      continue;
    }
    for (int64_t n = p.N * part / team; n < p.N * (part + 1) / team; ++n) {
      FF_ISA_CALL(batch_pass_peer_apply_row(p, n))
    }
  }
}

}  // namespace

int64_t batch_pass_scratch_cpu(const BatchPassParams& p) {
  BatchPassScratch measure{};
  return normalises(p) ? lay_out(p, make_plan(p), nullptr, &measure) * team_of(p) : 0;
}

void batch_pass_cpu(const BatchPassParams& p) {
  if (p.N == 0) return;
  const int team = team_of(p);
  if (!normalises(p)) return peer(p, team);
  const BatchPassPlan plan = make_plan(p);
  BatchPassScratch measure{};
  const int64_t each = lay_out(p, plan, nullptr, &measure);
  const std::unique_ptr<std::byte, Free> memory(
      static_cast<std::byte*>(std::aligned_alloc(kAlign, size_t(std::max(each, kAlign)) * team)));
  FF_CHECK(memory != nullptr, "[batch_pass] no memory for " << each * team << " bytes of scratch");
#pragma omp parallel for schedule(static, 1) num_threads(team)
  for (int part = 0; part < team; ++part) {
    BatchPassScratch scratch{};
    lay_out(p, plan, memory.get() + each * part, &scratch);
    const bool stats = p.phase == BatchPhase::stats;
    if (!stats) FF_ISA_CALL(batch_pass_apply_tables(p, plan, scratch))
    for (int64_t n = p.N * part / team; n < p.N * (part + 1) / team; ++n) {
      if (stats) {
        FF_ISA_CALL(batch_pass_stats_row(p, plan, n, scratch))
      } else {
        FF_ISA_CALL(batch_pass_apply_row(p, plan, n, scratch))
      }
    }
  }
}

}  // namespace ff
