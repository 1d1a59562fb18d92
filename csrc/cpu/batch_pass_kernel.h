// What csrc/cpu/batch_pass.cpp and its kernel, compiled once per instruction set, share.
#pragma once
#include <cstdint>

#include "../params.h"
#include "isa.h"

namespace ff {

// A sample as rows of `period` elements (channels innermost): C times a few pixels.
struct BatchPassPlan {
  bool channels_inner;     // channels_last, or a single pixel
  int64_t pixels;          // H * W
  int64_t pixels_z;        // after the pool
  int64_t period;          // table entries: one a channel at least
  int64_t pooled;          // elements of scratch for one sample's pooled map
};

// One thread's scratch.
struct BatchPassScratch {
  float* table[6];  // stats: sum, sum of squares, centre. apply: one per BatchCoefficient
  float* pooled;    // one sample's pooled h
};

}  // namespace ff

// Sweep 1 and 2 of BatchNorm on row n; the tables shared by all rows are filled by ..._tables.
FF_ISA_DECLARE(
    void batch_pass_stats_row(const BatchPassParams& p, const BatchPassPlan& plan, int64_t n,
                              const BatchPassScratch& scratch);
    void batch_pass_apply_tables(const BatchPassParams& p, const BatchPassPlan& plan,
                                 const BatchPassScratch& scratch);
    void batch_pass_apply_row(const BatchPassParams& p, const BatchPassPlan& plan, int64_t n,
                              const BatchPassScratch& scratch);
    // Peer, channels [begin, end).
    void batch_pass_peer_stats(const BatchPassParams& p, int64_t begin, int64_t end);
    void batch_pass_peer_apply_row(const BatchPassParams& p, int64_t n))
