// Philox4x32-10 (Salmon et al., SC 2011), the dropout generator of every back-end:
// key = seed, counter = (i / 4 low, i / 4 high, layer, step), word i mod 4 decides element i,
// i = logical NCHW index in the whole batch. An element is kept iff its word >= threshold.
#pragma once
#include <cstdint>

#include "../params.h"
#include "macros.h"

namespace ff {

FF_HD void philox4x32(uint64_t seed, uint64_t block, uint32_t layer, uint32_t step, uint32_t out[4]) {
  uint32_t c0 = uint32_t(block), c1 = uint32_t(block >> 32), c2 = layer, c3 = step;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

FF_HD bool dropout_keeps(const DropoutParams& d, uint64_t i) {
  uint32_t words[4];
  philox4x32(d.seed, i >> 2, d.layer, d.step, words);
  return words[i & 3] >= d.threshold;
}

}  // namespace ff
