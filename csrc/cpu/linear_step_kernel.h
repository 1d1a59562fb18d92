// What csrc/cpu/linear_step.cpp and its kernel, compiled once per instruction set, share.
#pragma once
#include <cstdint>

#include "../params.h"
#include "isa.h"

namespace ff {

// Columns whose sums fit a few vector registers while a thread walks down the rows.
constexpr int64_t kStrip = 128;

}  // namespace ff

// linear_prepare_rows: scale of rows [begin, end), and a = scale * from + bias there.
// linear_finish_strip: on columns [begin, end), at most kStrip of them: sums += inv_scale * (the sum
// of da over the rows), then da *= scale row by row.
FF_ISA_DECLARE(
    void linear_prepare_rows(const LinearStepParams& p, int64_t begin, int64_t end);
    void linear_finish_strip(const LinearStepParams& p, int64_t begin, int64_t end))
