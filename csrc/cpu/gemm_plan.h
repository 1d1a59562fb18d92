// How weight_update_cpu cuts a call: a pure function of shapes, dtype and instruction set.
#pragma once
#include <cstdint>
#include <vector>

#include "../params.h"

namespace ff {

// One packed copy of x: which pixel stands at each grid position of a sample.
struct GridCopy {
  std::vector<int32_t> index;
  int64_t first;  // packed from this position on: 1 where a tap's shift is odd (pixels in pairs)
};

enum class Unit { fma, dot, amx };

struct GemmPlan {
  Unit unit;
  bool compact;
  int64_t taps;
  int64_t grid_height, grid_width;  // of a sample's grid
  std::vector<GridCopy> copies;
  std::vector<int64_t> tap_copy, tap_shift;  // of each tap; shift in positions
  // Output pixel at each of da's positions, -1 = padding: amx walks the grid of x, dot rows of an
  // even number of pixels. Empty: every pixel, in order.
  std::vector<int32_t> da_index;
  int64_t samples;       // a chunk of samples: x's panels stay in L2; dW is summed over chunks
  int64_t panels;        // a block of 16-channel panels of x packed at a time
  int64_t rows;          // most output rows of a task
  int64_t row_blocks, panel_groups;  // tasks of a block of x
  int64_t positions;     // a copy's packed positions for a whole chunk
  // fma and dot: steps of `period` samples (of one pass, where positions run on over samples), each
  // at its words from the first one's; a pass takes at most pass_steps.
  std::vector<int32_t> step_offset;
  int64_t period, pass_steps;
  int64_t acc_floats, da_bytes, run_floats;  // scratch of a thread
  int64_t x_bytes;                           // shared scratch
  bool needs_sum;  // more than one chunk: without a caller's buffer dW needs one

  int64_t grid() const { return grid_height * grid_width; }
  // Pixels that lie side by side in a packed word, and its bytes a pixel and channel.
  int64_t pixels_a_word() const { return unit == Unit::fma ? 1 : 2; }
  int64_t x_item() const { return unit == Unit::fma ? 4 : 2; }
  int64_t thread_bytes() const;
  int64_t scratch_bytes(int threads, const WeightUpdateParams& p) const;
};

GemmPlan gemm_plan(const WeightUpdateParams& p, int threads);

}  // namespace ff
