// What csrc/cpu/local_pass.cpp and its kernel, compiled once per instruction set, share.
#pragma once
#include <cstdint>

#include "../params.h"
#include "isa.h"

namespace ff {

// Elements of one layout-independent view of a sample: `rows` of `period` elements, the last row
// shorter; element j of a row belongs to channel j mod C. Only where channels are innermost.
struct LocalPassPlan {
  bool channels_inner;   // channels_last, or a single pixel
  bool keeps_full;       // h is written to scratch: dropout, pool or blend
  bool keeps_features;   // pooled or blended features differ from h
  bool full_in_z;        // h waits in z's own memory (fp32, dense, nothing pooled or blended)
  int64_t pixels;        // H * W
  int64_t pixels_z;      // after the pool
  int64_t period;        // channels_inner: C times a few pixels, a multiple of 16 where possible
  int64_t run;           // elements of z that lie side by side: the period, or one pixel's
  int64_t full, features, table, words, counters;  // scratch sizes in elements
};

// One thread's scratch. full and features hold one sample (two of a pair).
struct LocalPassScratch {
  float* full[2];      // h before pool and blend; a dropped element has its sign bit set
  float* features[2];  // h after them
  float* table[5];     // per element of a period: mean, rstd, gradient, two accumulators
  uint32_t* words;
  uint64_t* counters;
  double* groups;      // (K, 3): mean, centred M2, sum of squares
};


}  // namespace ff

// Everything of row `item`, or of the pair (item, item + N / 2).
FF_ISA_DECLARE(void local_pass_item(const LocalPassParams& p, const LocalPassPlan& plan,
                                    int64_t item, const LocalPassScratch& scratch))
