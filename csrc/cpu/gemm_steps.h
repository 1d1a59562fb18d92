// The register-blocked multiply that the fma and dot units share. Unit: its Vec of kWidth
// accumulators; load (kWidth words of x), spread (a word of da in every lane) and add, which
// multiplies the two onto a Vec; kMostRows x kMostPanels accumulators at a time, in registers over
// every step of a pass.
#pragma once
#include <cstdint>
#include <utility>

#include "gemm.h"

namespace ff {
namespace {

template <class Unit, int kRows, int kPanels>
void multiply_block(const StepPass& p, const uint32_t* a, const uint32_t* b, float* acc) {
  constexpr int kPerPanel = kPanel / Unit::kWidth, kVecs = kPanels * kPerPanel;
  typename Unit::Vec sum[kRows][kVecs] = {};
  for (int64_t k = 0; k < p.steps; ++k, a += p.rows) {
    const uint32_t* x = b + p.step_offset[k];
    typename Unit::Words column[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j)
      column[j] = Unit::load(x + j / kPerPanel * p.panel_stride + j % kPerPanel * Unit::kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto row = Unit::spread(a + i);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sum[i][j] = Unit::add(sum[i][j], row, column[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      float* at = acc + (j / kPerPanel * p.rows + i) * kPanel + j % kPerPanel * Unit::kWidth;
      typename Unit::Vec before;
      __builtin_memcpy(&before, at, sizeof before);
      before += sum[i][j];
      __builtin_memcpy(at, &before, sizeof before);
    }
}

using Block = void (*)(const StepPass&, const uint32_t*, const uint32_t*, float*);

// Of every (panels, rows), at (panels - 1) * kMostRows + rows - 1.
template <class Unit, int... i>
constexpr auto blocks(std::integer_sequence<int, i...>) {
  struct Table {
    Block of[sizeof...(i)];
  };
  return Table{{multiply_block<Unit, i % Unit::kMostRows + 1, i / Unit::kMostRows + 1>...}};
}

// Every row, tap and panel of a pass, in blocks of about the same size.
template <class Unit>
void multiply_steps(const StepPass& p) {
  static constexpr auto kBlocks =
      blocks<Unit>(std::make_integer_sequence<int, Unit::kMostRows * Unit::kMostPanels>{});
  const int64_t row_blocks = (p.rows + Unit::kMostRows - 1) / Unit::kMostRows;
  const int64_t panel_blocks = (p.panels + Unit::kMostPanels - 1) / Unit::kMostPanels;
  for (int64_t n = 0; n < panel_blocks; ++n) {
    const int64_t j = n * p.panels / panel_blocks, panels = (n + 1) * p.panels / panel_blocks - j;
    for (int64_t tap = 0; tap < p.taps; ++tap) {
      const uint32_t* b = p.b + p.tap_offset[tap] + j * p.panel_stride;
      float* acc = p.acc + (tap * p.panels + j) * p.rows * kPanel;
      for (int64_t i = 0; i < row_blocks; ++i) {
        const int64_t row = i * p.rows / row_blocks;
        const int64_t rows = (i + 1) * p.rows / row_blocks - row;
        kBlocks.of[(panels - 1) * Unit::kMostRows + rows - 1](p, p.a + row, b, acc + row * kPanel);
      }
    }
  }
}

}  // namespace
}  // namespace ff
