// weight_update on CPUs: packs x into L2-sized panels, multiplies da^T onto it block of output rows
// by block (gemm.h), and hands each finished row of dW to the optimizer: dW itself never exists
// where all samples fit one chunk. A thread owns whole outputs, so any thread count gives the same
// bits.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "../check.h"
#include "../ops.h"
#include "gemm.h"
#include "gemm_plan.h"
#include "optimizer_kernel.h"

namespace ff {
namespace {

std::atomic<int64_t> scratch_live{0}, scratch_peak{0};

// 64-byte aligned scratch, counted: tests hold the peak against what the plan declares.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(bytes) {
    const size_t rounded = size_t(bytes + 63) / 64 * 64;
    data_ = bytes ? std::aligned_alloc(64, rounded) : nullptr;
    if (bytes && !data_) throw std::bad_alloc();
    const int64_t live = scratch_live += bytes;
    int64_t peak = scratch_peak;
    while (live > peak && !scratch_peak.compare_exchange_weak(peak, live)) {}
  }
  ~Scratch() {
    scratch_live -= bytes_;
    std::free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  int64_t bytes_;
  void* data_;
};

int64_t round64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Where finished rows of dW go.
struct Sink {
  float* sum;   // buffer that holds dW between chunks or tiles, or null
  bool add;     // sum holds earlier pixels
  bool step;    // this is the last chunk of the last tile
  float inv_scale;
  StepCoefficients optim;
};

// One block of x's channels over one chunk of samples.
struct Block {
  const WeightUpdateParams& p;
  const GemmPlan& plan;
  const Sink& sink;
  PixelSource x, da;
  int64_t channel, width, panels;  // first channel, channels, panels of the block
  uint32_t* packed;
  std::vector<int64_t> tap_offset;

  // Words of a packed panel.
  int64_t panel_stride() const { return plan.positions / plan.pixels_a_word() * kPanel; }
};

struct Task {
  int64_t row, rows, panel, panels;
  float* acc;
  char* da;
  float* run;
};

PixelSource source(const void* data, DType dtype, bool channels_last, int64_t channels,
                   int64_t pixels, int64_t first, int64_t samples) {
  const int64_t bytes = first * channels * pixels * (dtype == DType::f32 ? 4 : 2);
  return {static_cast<const char*>(data) + bytes, dtype, channels_last, channels, pixels, nullptr,
          pixels, samples};
}

constexpr int64_t kPackRun = 128;  // positions a packing task

void pack_x(const Block& block, int64_t task) {
  const GemmPlan& plan = block.plan;
  const int64_t runs = (plan.positions + kPackRun - 1) / kPackRun, copy = task / runs;
  const GridCopy& grid = plan.copies[size_t(copy)];
  PixelSource x = block.x;
  x.index = grid.index.data();
  x.positions = plan.grid();
  const int64_t t0 = task % runs * kPackRun, t1 = std::min(t0 + kPackRun, plan.positions);
  const int64_t stride = block.panel_stride();
  uint32_t* dst =
      block.packed + copy * block.panels * stride + t0 / plan.pixels_a_word() * kPanel;
  if (kHasDot && plan.unit != Unit::fma) {
    pairs_pack_x(x, block.channel, block.width, t0 + grid.first, t1 + grid.first, 2 * stride,
                 reinterpret_cast<uint16_t*>(dst));
  } else {
    FF_ISA_CALL(fma_pack_x(x, block.channel, block.width, t0, t1, stride,
                           reinterpret_cast<float*>(dst)))
  }
}

void multiply_amx(const Block& block, const Task& task) {
  const int64_t end = (block.da.samples * block.da.positions + kAmxStep - 1) / kAmxStep;
  uint16_t* da = reinterpret_cast<uint16_t*>(task.da);
  const uint32_t* x = block.packed + task.panel * block.panel_stride();
  amx_configure(task.rows);
  for (int64_t k = 0; k < end; k += kAmxChunk / kAmxStep) {
    const int64_t steps = std::min<int64_t>(kAmxChunk / kAmxStep, end - k);
    amx_pack_da(block.da, task.row, task.rows, k * kAmxStep, steps, da);
    amx_multiply({da, x + k * kAmxStep / 2 * kPanel, block.tap_offset.data(), block.panel_stride(),
                  steps, block.plan.taps, task.panels, task.rows, task.acc, k == 0});
  }
  amx_release();
}

// One pass of fma or dot: da's positions from `first` on.
void multiply_pass(const Block& block, const Task& task, int64_t first, int64_t last,
                   StepPass pass) {
  uint32_t* da = reinterpret_cast<uint32_t*>(task.da);
  pass.a = da;
  pass.steps = (last - first + block.plan.pixels_a_word() - 1) / block.plan.pixels_a_word();
  if (kHasDot && block.plan.unit == Unit::dot) {
    dot_pack_da(block.da, task.row, task.rows, first, last, da);
    dot_multiply(pass);
  } else {
    FF_ISA_CALL(fma_pack_da(block.da, task.row, task.rows, first, last,
                            reinterpret_cast<float*>(da)))
    FF_ISA_CALL(fma_multiply(pass))
  }
}

void multiply_steps(const Block& block, const Task& task) {
  const GemmPlan& plan = block.plan;
  const int64_t together = plan.pixels_a_word(), most = plan.pass_steps * together;
  const int64_t all = block.da.samples * block.da.positions;
  const bool endless = plan.period == 0;
  // positions after which the steps repeat, and how far x has then moved
  const int64_t period = endless ? most : plan.period * block.da.positions;
  const int64_t moved = (endless ? most : plan.period * plan.grid()) / together * kPanel;
  StepPass pass{nullptr, block.packed + task.panel * block.panel_stride(), nullptr,
                block.tap_offset.data(), block.panel_stride(), 0, plan.taps, task.panels, task.rows,
                task.acc};
  for (int64_t start = 0; start < all; start += period, pass.b += moved) {
    const int64_t end = std::min(start + period, all);
    for (int64_t t = start; t < end; t += most) {
      pass.step_offset = &plan.step_offset[size_t((t - start) / together)];
      multiply_pass(block, task, t, std::min(t + most, end), pass);
    }
  }
}

// n finished gradients, contiguous at `offset` of the weight.
void emit(const Block& block, float* run, int64_t n, int64_t offset) {
  const WeightUpdateParams& p = block.p;
  const Sink& sink = block.sink;
  float* out = sink.step && p.grad_out ? p.grad_out + offset : nullptr;
  float* sum = sink.sum ? sink.sum + offset : nullptr;
  FF_ISA_CALL(gradient_run(n, run, sink.inv_scale, sum, sink.add, out))
  if (!sink.step) return;
  FF_ISA_CALL(optimizer_run(sink.optim, n, run, 1.f, p.weight + offset,
                            p.m ? p.m + offset : nullptr, p.v ? p.v + offset : nullptr))
}

// Rows of a task's accumulators, in the weight's own order.
void finish_rows(const Block& block, const Task& task) {
  const WeightUpdateParams& p = block.p;
  const int64_t taps = block.plan.taps, c0 = task.panel * kPanel;
  const int64_t width = std::min(task.panels * kPanel, block.width - c0);
  const int64_t channel = block.channel + c0;
  const bool whole = width == p.C;
  for (int64_t r = 0; r < task.rows; ++r) {
    const int64_t o = task.row + r;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const float* acc = task.acc + (tap * task.panels * task.rows + r) * kPanel;
      const int64_t panel = task.rows * kPanel;
      if (p.weight_channels_last) {
        // a last, partial panel writes past its run: the next tap, or the slack, takes that over
        float* run = task.run + (whole ? tap * width : 0);
        for (int64_t j = 0; j < task.panels; ++j)
          std::memcpy(run + j * kPanel, acc + j * panel, kPanel * sizeof(float));
        if (!whole) emit(block, run, width, (o * taps + tap) * p.C + channel);
      } else {
        for (int64_t c = 0; c < width; ++c)
          task.run[c * taps + tap] = acc[c / kPanel * panel + c % kPanel];
      }
    }
    if (!p.weight_channels_last || whole)
      emit(block, task.run, width * taps, (o * p.C + channel) * taps);
  }
}

void run_task(const Block& block, int64_t index, char* scratch) {
  const GemmPlan& plan = block.plan;
  const int64_t i = index % plan.row_blocks, group = index / plan.row_blocks;
  const int64_t pairs = (block.panels + 1) / 2;
  Task task;
  task.row = i * block.p.O / plan.row_blocks;
  task.rows = (i + 1) * block.p.O / plan.row_blocks - task.row;
  task.panel = group * pairs / plan.panel_groups * 2;
  task.panels = std::min((group + 1) * pairs / plan.panel_groups * 2, block.panels) - task.panel;
  if (task.panels <= 0) return;
  task.acc = reinterpret_cast<float*>(scratch);
  task.da = scratch + round64(4 * plan.acc_floats);
  task.run = reinterpret_cast<float*>(task.da + round64(plan.da_bytes));
  if (plan.unit != Unit::amx || block.da.samples == 0)
    std::memset(task.acc, 0, size_t(4 * plan.taps * task.panels * task.rows * kPanel));
  if (kHasAmx && plan.unit == Unit::amx) multiply_amx(block, task);
  else multiply_steps(block, task);
  finish_rows(block, task);
}

void run_block(Block& block, char* threads_scratch, int threads) {
  const GemmPlan& plan = block.plan;
  const int64_t copy = block.panels * block.panel_stride();
  for (size_t tap = 0; tap < size_t(plan.taps); ++tap) {
    const int64_t first = plan.copies[size_t(plan.tap_copy[tap])].first;
    const int64_t words = (plan.tap_shift[tap] - first) / plan.pixels_a_word() * kPanel;
    block.tap_offset.push_back(plan.tap_copy[tap] * copy + words);
  }
  const int64_t packs = int64_t(plan.copies.size()) * ((plan.positions + kPackRun - 1) / kPackRun);
  const int64_t tasks = plan.row_blocks * plan.panel_groups;
#pragma omp parallel num_threads(threads)
  {
    char* scratch = threads_scratch + omp_get_thread_num() * plan.thread_bytes();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < packs; ++i) pack_x(block, i);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) run_task(block, i, scratch);
  }
}

}  // namespace

void weight_update_cpu(const WeightUpdateParams& p) {
  const int threads = num_threads();
  const GemmPlan plan = gemm_plan(p, threads);
  const bool own_sum = plan.needs_sum && !p.grad;
  const int64_t x_bytes = round64(plan.x_bytes);
  const Scratch scratch(plan.scratch_bytes(threads, p));
  char* per_thread = scratch.data() + x_bytes;
  float* sum = own_sum ? reinterpret_cast<float*>(per_thread + threads * plan.thread_bytes())
                       : p.grad;
  int64_t n = 0;
  do {
    const int64_t samples = std::min(plan.samples, p.N - n);
    const bool last = n + samples >= p.N;
    const Sink sink{sum, n > 0 || (p.grad && p.accumulate), last && p.finish, p.inv_scale,
                    step_coefficients(p.optim, p.m != nullptr)};
    Block block{p, plan, sink,
                source(p.x, p.dtype, p.x_channels_last, p.C, p.H * p.W, n, samples),
                source(p.da, p.dtype, p.da_channels_last, p.O, p.P * p.Q, n, samples),
                0, 0, 0, reinterpret_cast<uint32_t*>(scratch.data()), {}};
    if (!plan.da_index.empty()) {
      block.da.index = plan.da_index.data();
      block.da.positions = int64_t(plan.da_index.size());
    }
    for (int64_t c = 0; c < p.C; c += plan.panels * kPanel) {
      block.channel = c;
      block.width = std::min(plan.panels * kPanel, p.C - c);
      block.panels = (block.width + kPanel - 1) / kPanel;
      block.tap_offset.clear();
      run_block(block, per_thread, threads);
    }
    n += samples;
  } while (n < p.N);
}

int64_t weight_update_scratch_cpu(const WeightUpdateParams& p, int threads) {
  return gemm_plan(p, threads).scratch_bytes(threads, p);
}

int64_t scratch_peak_cpu(bool reset) {
  const int64_t peak = scratch_peak;
  if (reset) scratch_peak = scratch_live.load();
  return peak;
}

}  // namespace ff
