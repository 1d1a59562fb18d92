// linear_step on the CPU, what is neither a product (the library's, or weight_update's in 16 bits)
// nor local_pass: public op ffengine/ops/linear_step.py, kernel csrc/cpu/linear_step_kernel.cpp.
//
// A row's scale and a column's sum are one thread's, in a fixed order: any thread count gives the
// same bits.
#include <algorithm>

#include "../ops.h"
#include "linear_step_kernel.h"

namespace ff {

void linear_prepare_cpu(const LinearStepParams& p) {
  constexpr int64_t kRows = 16;  // a task: some 20 us of a wide layer, 2 us of a narrow one
  const int64_t tasks = (p.N + kRows - 1) / kRows;
#pragma omp parallel for num_threads(num_threads()) schedule(static) if (tasks > 1)
  for (int64_t i = 0; i < tasks; ++i) {
    FF_ISA_CALL(linear_prepare_rows(p, i * kRows, std::min(p.N, (i + 1) * kRows)))
  }
}

void linear_finish_cpu(const LinearStepParams& p) {
  const int64_t strips = (p.out + kStrip - 1) / kStrip;
#pragma omp parallel for num_threads(num_threads()) schedule(static) if (strips > 1)
  for (int64_t i = 0; i < strips; ++i) {
    FF_ISA_CALL(linear_finish_strip(p, i * kStrip, std::min(p.out, (i + 1) * kStrip)))
  }
}

}  // namespace ff
