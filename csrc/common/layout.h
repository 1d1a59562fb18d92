// Where an element lies and which element it is: pure index functions of local_pass, the same in
// the kernels and on the host. Offsets inside a sample fit an int; across samples they are int64.
#pragma once
#include <cstdint>

#include "../params.h"
#include "macros.h"
#include "philox.h"

namespace ff {

// Pixels of a sample before and after the pool.
FF_HD int pixels_in(const LocalPassParams& p) { return int(p.H * p.W); }
FF_HD int pixels_out(const LocalPassParams& p) {
  return p.pool ? int((p.H / 2) * (p.W / 2)) : int(p.H * p.W);
}

FF_HD int64_t batch_row(const LocalPassParams& p, int64_t n) {
  return n < p.half ? p.start + n : p.half_start + (n - p.half);
}

// Logical NCHW index, in the whole batch, of the first element of row n: what dropout counts from.
FF_HD uint64_t row_index(const LocalPassParams& p, int64_t n) {
  return uint64_t(batch_row(p, n)) * uint64_t(p.C * p.H * p.W);
}

FF_HD int group_begin(const LocalPassParams& p, int k) {
  return p.equal_groups ? k * int(p.C / p.K) : int(p.offsets[k]);
}

FF_HD int group_of(const LocalPassParams& p, int c) {
  if (p.equal_groups) return c / int(p.C / p.K);
  int low = 0, high = int(p.K) - 1;  // the last k with offsets[k] <= c
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (p.offsets[middle] <= c) low = middle;
    else high = middle - 1;
  }
  return low;
}

// NHWC: a sample is rows of `pixels` pixels, the least number that makes a row whole vectors of V
// elements, so that a thread can own a column of vectors. Row element x is channel x % C of the
// row's pixel x / C.
struct Rows {
  int pixels, width, count;  // pixels a row, elements a row, rows a sample
};

FF_HD Rows rows_of(int C, int Q, int V) {
  int pixels = 1;
  while (pixels * C % V != 0) ++pixels;  // V is a power of two: at most V steps
  return {pixels, pixels * C, Q / pixels};
}

// Bits of four elements i, i + stride, ... of the dropout mask of this step; one Philox call serves
// those of one counter block.
FF_HD uint32_t keep_bits(const DropoutParams& d, uint32_t step, uint64_t i, uint64_t stride) {
  uint64_t block = ~uint64_t(0);
  uint32_t kept = 0, bits = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (int u = 0; u < 4; ++u, i += stride) {
    if ((i >> 2) != block) {
      uint32_t w[4];
      block = i >> 2;
      philox4x32(d.seed, block, d.layer, step, w);
      kept = uint32_t(w[0] >= d.threshold) | uint32_t(w[1] >= d.threshold) << 1 |
             uint32_t(w[2] >= d.threshold) << 2 | uint32_t(w[3] >= d.threshold) << 3;
    }
    bits |= (kept >> (i & 3) & 1) << u;
  }
  return bits;
}

constexpr int kUnroll = 4;  // vectors a thread holds at a time: 64 bytes in flight

// Bit u * V + v of a chunk: is element v of vector u kept? The chunk's vectors start at logical
// index i and lie `apart` elements apart (NCHW: memory order is logical order).
template <int V>
FF_HD uint32_t chunk_bits_nchw(const DropoutParams& d, uint32_t step, uint64_t i, int apart) {
  if (V == 1) return keep_bits(d, step, i, uint64_t(apart));
  uint32_t bits = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (int quad = 0; quad < kUnroll * V / 4; ++quad) {
    const int element = quad * 4;
    const uint64_t at = i + uint64_t(element / V) * uint64_t(apart) + uint64_t(element % V);
    bits |= keep_bits(d, step, at, 1) << element;
  }
  return bits;
}

// The same for NHWC: rows row … row + 3 of `rows`, elements column … column + V - 1 of each.
template <int V>
FF_HD uint32_t chunk_bits_nhwc(const LocalPassParams& p, uint32_t step, uint64_t sample,
                               const Rows& rows, int row, int column) {
  uint32_t bits = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (int v = 0; v < V; ++v) {
    const int c = (column + v) % int(p.C), pixel = row * rows.pixels + (column + v) / int(p.C);
    const uint32_t four = keep_bits(
        p.dropout, step, sample + uint64_t(c) * uint64_t(p.H * p.W) + uint64_t(pixel),
        uint64_t(rows.pixels));
    for (int u = 0; u < kUnroll; ++u) bits |= (four >> u & 1) << (u * V + v);
  }
  return bits;
}

}  // namespace ff
