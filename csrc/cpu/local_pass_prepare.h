// local_pass, first part: a -> h = dropout(relu(a)) -> pool, blend, into fp32 scratch.
// A dropped element carries a set sign bit (-0, or a negative NaN), so that the gradient needs no
// second draw: an element is alive where its bits, read as int32, exceed 0 (masked) or -1
// (straight-through).
#pragma once
#include "convert.h"
#include "lanes.h"
#include "local_pass_kernel.h"
#include "philox_lanes.h"
#include "sums.h"

namespace ff {
namespace FF_ISA {

FF_HD float dropped_or(float h, uint32_t word, const DropoutParams& d) {
  const float kept = h * d.keep_scale;
  const float lost = h == h ? 0.f : h;
  return word >= d.threshold ? kept : float_of(bits_of(lost) | 0x80000000u);
}

// Elements in the order of their logical index, the first of which is `index`.
template <class T>
static void drop_run(const DropoutParams& d, const T* a, float* h, uint64_t index, int64_t n,
                     uint32_t* words) {
  constexpr int64_t kBlocks = 256;
  const int64_t skip = int64_t(index & 3);
  for (int64_t at = -skip; at < n; at += 4 * kBlocks) {
    const int64_t first = at < 0 ? 0 : at;
    const int64_t last = at + 4 * kBlocks < n ? at + 4 * kBlocks : n;
    philox_run(d, (index + at) >> 2, (last - at + 3) / 4, words);
#pragma omp simd
    for (int64_t i = first; i < last; ++i)
      h[i] = dropped_or(relu(load(a + i)), words[i - at], d);
  }
}

// NHWC: lanes run over channels; where P is a multiple of 4, one draw serves four pixels.
template <class T>
static void drop_pixels(const DropoutParams& d, const T* a, float* h, uint64_t index, int64_t C,
                        int64_t P, const LocalPassScratch& s) {
  const int64_t pitch = (C + 63) / 64 * 64;
  const int64_t together = P % 4 == 0 ? 4 : 1;
  for (int64_t pixel = 0; pixel < P; pixel += together) {
    for (int64_t c = 0; c < pitch; ++c) s.counters[c] = (index + uint64_t(c * P + pixel)) >> 2;
    philox_columns(d, s.counters, C, s.words, pitch);
    for (int64_t w = 0; w < together; ++w) {
      const T* from = a + (pixel + w) * C;
      float* to = h + (pixel + w) * C;
      const uint32_t* words = s.words + w * pitch;
      if (together == 4) {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) to[c] = dropped_or(relu(load(from + c)), words[c], d);
      } else {
        for (int64_t c = 0; c < C; ++c) {
          const uint64_t word = (index + uint64_t(c * P + pixel)) & 3;
          to[c] = dropped_or(relu(load(from + c)), s.words[int64_t(word) * pitch + c], d);
        }
      }
    }
  }
}

template <class T>
static void activate(const LocalPassParams& p, const LocalPassPlan& plan, int64_t row, const T* a,
                     float* h, const LocalPassScratch& s) {
  const int64_t size = p.C * plan.pixels;
  if (p.dropout.threshold == 0) {
    int64_t i = 0;  // + 0: of -0 the instruction returns -0, which would read as dropped
    for (; i + kWidth <= size; i += kWidth) store_lanes(h + i, relu_lanes(load_lanes(a + i)) + 0.f);
    for (; i < size; ++i) h[i] = relu(load(a + i));
    return;
  }
  const int64_t in_batch = row < p.half ? p.start + row : p.half_start + row - p.half;
  const uint64_t index = uint64_t(in_batch) * uint64_t(size);
  if (plan.channels_inner && plan.pixels > 1)
    drop_pixels(p.dropout, a, h, index, p.C, plan.pixels, s);
  else
    drop_run(p.dropout, a, h, index, size, s.words);
}

// The 2x2 windows of a sample: `step` elements between neighbours of a row, `line` between rows,
// `inner` elements that share the window's geometry (channels in NHWC), `outer` maps (channels in
// NCHW).
struct Windows {
  int64_t outer, inner, step, line, map, rows, columns;
};

FF_HD Windows windows_of(const LocalPassParams& p) {
  if (p.channels_last) return {1, p.C, p.C, p.C * p.W, 0, p.H / 2, p.W / 2};
  return {p.C, 1, 1, p.W, p.H * p.W, p.H / 2, p.W / 2};
}

FF_HD float larger(float x, float y) { return y > x || y != y ? y : x; }
FF_HD Floats larger(Floats x, Floats y) { return (y > x) | (y != y) ? y : x; }

// Of a window's four pixels, numbers or vectors of them; the last NaN if there is one.
template <class F>
FF_HD F largest(F x, F right, F below, F across) {
  return larger(larger(x, right), larger(below, across));
}

static void pool(const Windows& w, const float* h, float* out) {
  for (int64_t o = 0; o < w.outer; ++o)
    for (int64_t r = 0; r < w.rows; ++r) {
      const float* from = h + o * w.map + 2 * r * w.line;
      float* to = out + (o * w.rows + r) * w.columns * w.inner;
      if (w.inner == 1) {
#pragma omp simd
        for (int64_t c = 0; c < w.columns; ++c)
          to[c] = largest(from[2 * c], from[2 * c + 1], from[w.line + 2 * c],
                          from[w.line + 2 * c + 1]);
        continue;
      }
      for (int64_t c = 0; c < w.columns; ++c) {
        const float *of = from + 2 * c * w.step, *below = of + w.line;
        float* pooled = to + c * w.inner;
        if (w.inner < kWidth) {
          for (int64_t i = 0; i < w.inner; ++i)
            pooled[i] = largest(of[i], of[i + w.step], below[i], below[i + w.step]);
          continue;
        }
        over_vectors(w.inner, [&](int64_t i) {
          store_lanes(pooled + i, largest(load_lanes(of + i), load_lanes(of + i + w.step),
                                          load_lanes(below + i), load_lanes(below + i + w.step)));
        });
      }
    }
}

// Where h of a row, before pool and blend, is kept.
FF_HD float* full_of(const LocalPassParams& p, const LocalPassPlan& plan, int64_t row, int slot,
                     const LocalPassScratch& s) {
  return plan.full_in_z ? static_cast<float*>(p.z) + row * p.C * plan.pixels : s.full[slot];
}

// Fills the scratch of sample `slot` for row `row`.
template <class T>
static void prepare(const LocalPassParams& p, const LocalPassPlan& plan, int64_t row, int slot,
                    const LocalPassScratch& s) {
  const T* a = static_cast<const T*>(p.a) + row * p.C * plan.pixels;
  const float* h = full_of(p, plan, row, slot, s);
  activate(p, plan, row, a, full_of(p, plan, row, slot, s), s);
  if (!plan.keeps_features) return;
  const int64_t size = p.C * plan.pixels_z;
  float* features = s.features[slot];
  if (p.pool) {
    pool(windows_of(p), h, features);
    h = features;
  }
  if (p.h_prev == nullptr) return;
  const T* previous = static_cast<const T*>(p.h_prev) + row * size;
  const float beta = p.blend, rest = 1.f - p.blend;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) features[i] = beta * h[i] + rest * load(previous + i);
}

}  // namespace FF_ISA
}  // namespace ff
