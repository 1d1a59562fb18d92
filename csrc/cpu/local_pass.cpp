// local_pass on the CPU: reference ffengine/reference/local_pass.py, public op
// ffengine/ops/local_pass.py, kernel csrc/cpu/local_pass_kernel.cpp.
//
// One thread takes a whole sample (a pair for symba) through goodness, loss and normalisation, so
// that its tile stays in L2 and `a` is read from memory once; a sample's result depends on nothing
// but its own numbers, whatever the batch, the tile or the thread count.
#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>

#include "../check.h"
#include "../ops.h"
#include "isa.h"
#include "local_pass_kernel.h"

namespace ff {
namespace {

// C times the fewest pixels that give whole 16-lane vectors and rows of 256 elements or more.
int64_t period_of(int64_t channels, int64_t pixels) {
  int64_t rows = 1;
  while (rows < 16 && rows < pixels && (rows * channels % 16 != 0 || rows * channels < 256)) ++rows;
  return rows * channels;
}

LocalPassPlan make_plan(const LocalPassParams& p) {
  LocalPassPlan plan{};
  plan.pixels = p.H * p.W;
  plan.pixels_z = p.pool ? (p.H / 2) * (p.W / 2) : plan.pixels;
  plan.channels_inner = p.channels_last || plan.pixels == 1;
  plan.keeps_features = p.pool || p.h_prev != nullptr;
  plan.keeps_full = plan.keeps_features || p.dropout.threshold != 0;
  plan.period = plan.channels_inner ? period_of(p.C, plan.pixels_z) : 0;
  const bool slice = p.z != nullptr && p.z_channels != p.C;
  plan.run = slice ? p.C : plan.period;
  const int64_t samples = p.loss_params.kind == Loss::symba ? 2 : 1;
  plan.full_in_z = p.dtype == DType::f32 && p.z != nullptr && !slice && !plan.keeps_features;
  plan.full = plan.keeps_full && !plan.full_in_z ? samples * p.C * plan.pixels : 0;
  plan.features = plan.keeps_features ? samples * p.C * plan.pixels_z : 0;
  plan.table = plan.period;
  if (p.dropout.threshold != 0) {
    const int64_t padded = (p.C + 63) / 64 * 64;
    plan.words = plan.channels_inner && plan.pixels > 1 ? 4 * padded : 1280;
    plan.counters = padded;
  }
  return plan;
}

// Elements below which a second thread does not pay: about 5 us of work, a parallel region's cost.
constexpr int64_t kGrain = 16384;

int team_of(int64_t items, int64_t elements) {
  const int64_t useful = std::min(items, 1 + elements / kGrain);
  return int(std::min<int64_t>(useful, num_threads()));
}

// What the threads share out: samples, or pairs of them.
int64_t items_of(const LocalPassParams& p) {
  return p.loss_params.kind == Loss::symba ? p.N / 2 : p.N;
}

constexpr int64_t kAlign = 64;
int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Lays a thread's scratch out from `base` and returns its size; base may be null to ask for it.
int64_t lay_out(const LocalPassParams& p, const LocalPassPlan& plan, std::byte* base,
                LocalPassScratch* s) {
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    std::byte* at = base + used;
    used += aligned(bytes);
    return at;
  };
  const int samples = p.loss_params.kind == Loss::symba ? 2 : 1;
  for (int i = 0; i < samples; ++i) {
    s->full[i] = reinterpret_cast<float*>(take(plan.full / samples * 4));
    s->features[i] = reinterpret_cast<float*>(take(plan.features / samples * 4));
  }
  for (auto& table : s->table) table = reinterpret_cast<float*>(take(plan.table * 4));
  s->words = reinterpret_cast<uint32_t*>(take(plan.words * 4));
  s->counters = reinterpret_cast<uint64_t*>(take(plan.counters * 8));
  s->groups = reinterpret_cast<double*>(take(p.K * 3 * 8));
  return used;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

}  // namespace

int64_t local_pass_scratch_cpu(const LocalPassParams& p) {
  const LocalPassPlan plan = make_plan(p);
  LocalPassScratch measure{};
  return lay_out(p, plan, nullptr, &measure) * team_of(items_of(p), p.N * p.C * plan.pixels);
}

void local_pass_cpu(const LocalPassParams& given) {
  if (given.N == 0) return;
  LocalPassParams p = given;
  if (p.dropout.clock != nullptr) p.dropout.step = *p.dropout.clock;
  const bool paired = p.loss_params.kind == Loss::symba;
  FF_CHECK(!paired || p.N % 2 == 0, "[local_pass] symba needs an even number of rows, got " << p.N);
  const LocalPassPlan plan = make_plan(p);
  const int64_t items = items_of(p);
  const int team = team_of(items, p.N * p.C * plan.pixels);
  LocalPassScratch measure{};
  const int64_t each = lay_out(p, plan, nullptr, &measure);
  // one allocation by the calling thread: malloc then reuses it from call to call
  const std::unique_ptr<std::byte, Free> memory(
      static_cast<std::byte*>(std::aligned_alloc(kAlign, size_t(each) * team)));
  FF_CHECK(memory != nullptr, "[local_pass] no memory for " << each * team << " bytes of scratch");
#pragma omp parallel for schedule(static, 1) num_threads(team)
  for (int part = 0; part < team; ++part) {
    LocalPassScratch scratch{};
    lay_out(p, plan, memory.get() + each * part, &scratch);
    for (int64_t item = items * part / team; item < items * (part + 1) / team; ++item) {
      FF_ISA_CALL(local_pass_item(p, plan, item, scratch))
    }
  }
}

}  // namespace ff
