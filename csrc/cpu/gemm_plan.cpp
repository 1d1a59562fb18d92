#include "gemm_plan.h"

#include <algorithm>
#include <array>
#include <map>

#include "gemm.h"

namespace ff {
namespace {

constexpr int64_t kPackedBytes = 1280 * 1024;  // x's panels beside accumulators in 2 MB of L2
constexpr int64_t kPackedMost = 2560 * 1024;   // where cutting samples would cost a large dW buffer
constexpr int64_t kLargeSum = 4 << 20;
// About as many steps between accumulator load and store: a pass of x and da stays in L1.
constexpr int64_t kPassSteps = 128;
// An odd number of samples above which a half empty word costs less than pixels side by side, which
// take two copies of x and cannot leave out the padding.
constexpr int64_t kManySamples = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// One axis of the grid: output size, kernel, stride, padding, input size.
struct Axis {
  int64_t out, kernel, stride, pad, size;

  int64_t source(int64_t position, int64_t phase) const {
    const int64_t i = position * stride + phase - pad;
    return i < 0 || i >= size ? -1 : i;
  }
  int64_t last(int64_t phase) const { return out - 1 + (kernel - 1 - phase) / stride; }

  // Smallest length at which a position past the end may read the next run's beginning: both are
  // padding, so right and left (bottom and top) padding share their zeros.
  int64_t length() const {
    for (int64_t n = out;; ++n) {
      bool zeros = true;
      for (int64_t phase = 0; phase < std::min(stride, kernel); ++phase)
        for (int64_t i = n; i <= last(phase); ++i)
          zeros = zeros && source(i, phase) < 0 && source(i - n, phase) < 0;
      if (zeros) return n;
    }
  }
};

std::vector<int32_t> grid_index(const Axis& y, const Axis& x, int64_t height, int64_t width,
                                int64_t phase_y, int64_t phase_x) {
  std::vector<int32_t> index;
  index.reserve(size_t(height * width));
  for (int64_t i = 0; i < height; ++i)
    for (int64_t j = 0; j < width; ++j) {
      const int64_t r = y.source(i, phase_y), c = x.source(j, phase_x);
      index.push_back(r < 0 || c < 0 ? -1 : int32_t(r * x.size + c));
    }
  return index;
}

// Every tap's copy of x and shift in it.
void place_taps(GemmPlan& plan, const Axis& y, const Axis& x) {
  std::map<std::array<int64_t, 3>, int64_t> known;
  for (int64_t i = 0; i < y.kernel; ++i)
    for (int64_t j = 0; j < x.kernel; ++j) {
      int64_t phase_y = i, phase_x = j, shift = 0;
      if (!plan.compact) {
        phase_y = i % y.stride, phase_x = j % x.stride;
        shift = i / y.stride * plan.grid_width + j / x.stride;
      }
      const int64_t first = shift % plan.pixels_a_word;
      const auto [at, is_new] =
          known.try_emplace({phase_y, phase_x, first}, int64_t(plan.copies.size()));
      if (is_new)
        plan.copies.push_back({grid_index(y, x, plan.grid_height, plan.grid_width, phase_y,
                                          phase_x), first});
      plan.tap_copy.push_back(at->second);
      plan.tap_shift.push_back(shift);
    }
}

// da on rows of `width` positions, of which there are `height`.
void place_outputs(GemmPlan& plan, int64_t P, int64_t Q, int64_t height, int64_t width) {
  if (height == P && width == Q) return;
  for (int64_t i = 0; i < height; ++i)
    for (int64_t j = 0; j < width; ++j)
      plan.da_index.push_back(i < P && j < Q ? int32_t(i * Q + j) : -1);
}

// Outputs [first, last) at which kernel position k of an axis lies on the input.
std::array<int64_t, 2> inside(const Axis& axis, int64_t k) {
  const int64_t first = ceil_div(std::max<int64_t>(axis.pad - k, 0), axis.stride);
  const int64_t room = axis.size - 1 + axis.pad - k;
  const int64_t last = room < 0 ? 0 : std::min(axis.out, room / axis.stride + 1);
  return {std::min(first, last), last};
}

// The steps of fma and dot.
void place_steps(GemmPlan& plan, const Axis& y, const Axis& x) {
  const int64_t together = plan.pixels_a_word;
  plan.length = plan.endless ? kPassSteps : ceil_div(x.out, together);
  plan.pass_rows = plan.endless ? 1 : std::max<int64_t>(1, kPassSteps / plan.length);
  if (!plan.endless) place_outputs(plan, y.out, x.out, y.out, plan.length * together);
  for (int64_t i = 0; i < y.kernel; ++i)
    for (int64_t j = 0; j < x.kernel; ++j) {
      const auto rows = inside(y, i), columns = inside(x, j);
      if (plan.endless || plan.narrow)
        plan.extent.push_back({0, 0, INT32_MAX, 0, int32_t(plan.length)});
      else
        plan.extent.push_back({0, int32_t(rows[0]), int32_t(rows[1]),
                               int32_t(columns[0] / together),
                               int32_t(ceil_div(columns[1], together))});
    }
}

int64_t copy_positions(const GemmPlan& plan, int64_t samples) {
  const int64_t grids = ceil_div(samples, plan.samples_a_word);
  return round_up(round_up(grids * plan.grid(), kAmxStep) + plan.largest_shift(), 2);
}

int64_t panel_bytes(const GemmPlan& plan, int64_t samples) {
  return int64_t(plan.copies.size()) * copy_positions(plan, samples) / plan.pixels_a_word *
         kPanel * 4;
}

// Packed x of some samples; narrow: the one panel of channels, and what is made of it.
int64_t packed_bytes(const GemmPlan& plan, int64_t samples) {
  if (!plan.narrow) return panel_bytes(plan, samples) * plan.panels;
  return panel_bytes(plan, samples) +
         plan.panels * copy_positions(plan, samples) / plan.pixels_a_word * kPanel * 4;
}

// Most samples of N whose panels fit, one at least. A sample alone is padded to a whole step, so
// that many of one pixel take far less than as many times its bytes.
int64_t most_samples(const GemmPlan& plan, int64_t N) {
  int64_t fits = 1, too_many = N + 1;
  while (too_many - fits > 1) {
    const int64_t middle = (fits + too_many) / 2;
    (packed_bytes(plan, middle) <= kPackedBytes ? fits : too_many) = middle;
  }
  return fits;
}

// Blocks of x that stay in L2: few channels over all samples where that is enough work per packed
// da (dW is then finished tile by tile and never exists), else chunks of samples.
void block_x(GemmPlan& plan, const WeightUpdateParams& p) {
  const int64_t all = ceil_div(p.C, kPanel), dw = 4 * p.O * p.C * plan.taps;
  const int64_t least = std::min(all, std::max<int64_t>(2, ceil_div(512, plan.taps * kPanel)));
  const int64_t whole = std::max<int64_t>(1, panel_bytes(plan, p.N));
  plan.samples = p.N;
  if (plan.narrow) {
    plan.panels = ceil_div(p.C * plan.taps, kPanel);
    plan.samples = most_samples(plan, p.N);
  } else if (whole * least <= (dw > kLargeSum ? kPackedMost : kPackedBytes)) {
    plan.panels = std::min(all, std::max(least, kPackedBytes / whole));
  } else {
    plan.panels = std::min(all, std::max<int64_t>(least, 8));
    while (plan.panels > 2 && panel_bytes(plan, 1) * plan.panels > kPackedBytes) --plan.panels;
    plan.samples = most_samples(plan, p.N);
  }
  if (!plan.narrow)
    plan.panels = std::min(all, round_up(ceil_div(all, ceil_div(all, plan.panels)), 2));
  if (p.N > 0) plan.samples = ceil_div(p.N, ceil_div(p.N, plan.samples));
  plan.samples = std::min(p.N, round_up(plan.samples, plan.samples_a_word));
  plan.needs_sum = plan.samples < p.N;
  plan.positions = copy_positions(plan, plan.samples);
  plan.x_bytes = packed_bytes(plan, plan.samples);
}

void block_rows(GemmPlan& plan, const WeightUpdateParams& p, int threads) {
  int64_t most = plan.unit == Unit::amx ? kAmxRows : kDotRows;
  if (plan.unit == Unit::fma) FF_ISA_CALL(fma_rows(&most))
  int64_t blocks = ceil_div(p.O, most);
  plan.panel_groups = 1;
  if (blocks < threads)
    plan.panel_groups = std::min(ceil_div(threads, blocks), ceil_div(plan.panels, 2));
  else if (blocks < 4 * threads)
    blocks = std::min(round_up(blocks, threads), p.O);
  plan.row_blocks = blocks;
  plan.rows = ceil_div(p.O, blocks);
}

}  // namespace

int64_t GemmPlan::largest_shift() const {
  return *std::max_element(tap_shift.begin(), tap_shift.end());
}

int64_t GemmPlan::thread_bytes() const {
  return round_up(4 * acc_floats, 64) + round_up(da_bytes, 64) + round_up(4 * run_floats, 64);
}

int64_t GemmPlan::scratch_bytes(int threads, const WeightUpdateParams& p) const {
  const int64_t sum = needs_sum && !p.grad ? 4 * p.O * p.C * taps : 0;
  return round_up(x_bytes, 64) + threads * thread_bytes() + round_up(sum, 64);
}

GemmPlan gemm_plan(const WeightUpdateParams& p, int threads) {
  GemmPlan plan{};
  const Axis y{p.P, p.kH, p.stride, p.pad, p.H}, x{p.Q, p.kW, p.stride, p.pad, p.W};
  const bool pairs = p.dtype == DType::bf16 && bf16_dot();
  plan.unit = !pairs ? Unit::fma : amx_bf16() ? Unit::amx : Unit::dot;
  // a sample too many is half a word of zeros
  const bool of_samples = plan.unit == Unit::dot && (p.N % 2 == 0 || p.N > kManySamples);
  plan.samples_a_word = of_samples ? 2 : 1;
  plan.pixels_a_word = plan.unit == Unit::fma || of_samples ? 1 : 2;
  plan.taps = p.kH * p.kW;
  plan.narrow = p.C < kPanel && ceil_div(p.C * plan.taps, kPanel) < plan.taps;
  plan.grid_height = y.length();
  plan.grid_width = x.length();
  plan.endless = plan.unit != Unit::amx && plan.taps == 1 && plan.grid() == p.P * p.Q;
  if (plan.unit == Unit::dot && !plan.endless)  // a row begins with a whole word
    plan.grid_width = round_up(plan.grid_width, plan.pixels_a_word);
  place_taps(plan, y, x);
  // Compact packs (taps - copies) more copies of x; each costs about 160 / O of all multiplications
  // (400 -> 400 on 8x8, one thread: shift 7.8 ms, compact 11.1; 200 -> 400 with stride 2, which
  // needs 7 copies anyway: 5.2 and 4.1).
  const double waste = double(plan.grid()) / double(p.P * p.Q) - 1;
  const double saved = double(plan.taps - int64_t(plan.copies.size())) / double(plan.taps);
  plan.compact = plan.unit == Unit::amx && waste > saved * 160.0 / double(p.O);
  if (plan.compact) {
    plan.grid_height = p.P, plan.grid_width = p.Q;
    plan.copies.clear(), plan.tap_copy.clear(), plan.tap_shift.clear();
    place_taps(plan, y, x);
  }
  if (plan.unit == Unit::amx) place_outputs(plan, p.P, p.Q, plan.grid_height, plan.grid_width);
  else place_steps(plan, y, x);
  block_x(plan, p);
  block_rows(plan, p, threads);
  const int64_t task_panels = round_up(ceil_div(plan.panels, plan.panel_groups), 2);
  plan.acc_floats = (plan.narrow ? 1 : plan.taps) * task_panels * plan.rows * kPanel;
  plan.da_bytes = plan.unit == Unit::amx ? 2 * kAmxRows * kAmxChunk
                                         : 4 * (plan.rows * plan.pass_rows * plan.length + kPanel);
  plan.run_floats = std::min(p.C, plan.panels * kPanel) * plan.taps + 2 * kPanel;
  return plan;
}

}  // namespace ff
