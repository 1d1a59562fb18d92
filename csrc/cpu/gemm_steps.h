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
void multiply_block(const StepPass& p, const Tap& tap, const uint32_t* a, const uint32_t* b,
                    float* acc) {
  constexpr int kPerPanel = kPanel / Unit::kWidth, kVecs = kPanels * kPerPanel;
  typename Unit::Vec sum[kRows][kVecs] = {};
  for (int64_t r = 0; r < p.pixel_row_count; ++r) {
    const PixelRow row = p.pixel_rows[r];
    if (row.y < tap.top || row.y >= tap.bottom) continue;
    const uint32_t* x = b + row.offset + tap.left * kPanel;
    const uint32_t* d = a + (r * p.length + tap.left) * p.rows;
    for (int32_t q = tap.left; q < tap.right; ++q, d += p.rows, x += kPanel) {
      typename Unit::Words column[kVecs];
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j)
        column[j] = Unit::load(x + j / kPerPanel * p.panel_stride + j % kPerPanel * Unit::kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const auto word = Unit::spread(d + i);
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) sum[i][j] = Unit::add(sum[i][j], word, column[j]);
      }
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

using Block = void (*)(const StepPass&, const Tap&, const uint32_t*, const uint32_t*, float*);

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
    for (int64_t t = 0; t < p.tap_count; ++t) {
      const Tap& tap = p.taps[t];
      const uint32_t* b = p.b + tap.offset + j * p.panel_stride;
      float* acc = p.acc + (t * p.panels + j) * p.rows * kPanel;
      for (int64_t i = 0; i < row_blocks; ++i) {
        const int64_t row = i * p.rows / row_blocks;
        const int64_t rows = (i + 1) * p.rows / row_blocks - row;
        kBlocks.of[(panels - 1) * Unit::kMostRows + rows - 1](p, tap, p.a + row, b,
                                                              acc + row * kPanel);
      }
    }
  }
}

}  // namespace
}  // namespace ff
