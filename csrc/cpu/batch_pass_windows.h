// batch_pass: 2x2 windows of h, the winner of each, and the pooled map whose moments sweep 1 takes.
#pragma once
#include "../common/batch_norm.h"
#include "batch_pass_kernel.h"
#include "sums.h"

namespace ff {
namespace FF_ISA {

FF_HD Floats sign_lanes(Floats x) {
  return (x > 0.f ? splat(1.f) : Floats{}) - (x < 0.f ? splat(1.f) : Floats{});
}

// choose, for a vector of windows.
struct Choices {
  Floats h;
  Ints at;
};
FF_HD Choices choose_lanes(const Floats* h, Floats direction) {
  Choices best{h[0], Ints{}};
  Floats key = direction * h[0];
#pragma GCC unroll 3
  for (int32_t i = 1; i < 4; ++i) {
    const Floats other = direction * h[i];
    const Ints wins = (other > key) | (other != other);
    best.h = wins ? h[i] : best.h;
    best.at = wins ? Ints{} + i : best.at;
    key = wins ? other : key;
  }
  return best;
}

// A row of pixels as two vectors side by side: its even and odd columns, and back.
FF_HD Ints every_other(int first) {
  Ints index{};
  for (int l = 0; l < kWidth; ++l) index[l] = first + 2 * l;
  return index;
}
FF_HD Ints alternating(int first) {
  Ints index{};
  for (int l = 0; l < kWidth; ++l) index[l] = first + l / 2 + (l % 2) * kWidth;
  return index;
}
FF_HD Floats evens(Floats x, Floats y) { return __builtin_shuffle(x, y, every_other(0)); }
FF_HD Floats odds(Floats x, Floats y) { return __builtin_shuffle(x, y, every_other(1)); }
FF_HD Floats left(Floats even, Floats odd) { return __builtin_shuffle(even, odd, alternating(0)); }
FF_HD Floats right(Floats even, Floats odd) {
  return __builtin_shuffle(even, odd, alternating(kWidth / 2));
}

// Channels innermost: out (rows, columns, C) = the chosen h of every window.
template <class T>
static void pool_pixels(const BatchPassParams& p, const T* a, const float* gamma, float* out) {
  const int64_t line = p.W * p.C, C = p.C;
  for (int64_t r = 0; r < p.H / 2; ++r)
    for (int64_t w = 0; w < p.W / 2; ++w, out += C) {
      const T* corner = a + 2 * r * line + 2 * w * C;
      const T* of[4] = {corner, corner + C, corner + line, corner + line + C};
      if (C < kWidth) {
        for (int64_t c = 0; c < C; ++c)
          out[c] = choose(relu(load(of[0] + c)), relu(load(of[1] + c)), relu(load(of[2] + c)),
                          relu(load(of[3] + c)), gamma == nullptr ? 1.f : sign(gamma[c])).h;
        continue;
      }
      over_vectors(C, [&](int64_t c) {
        Floats h[4];
        for (int i = 0; i < 4; ++i) h[i] = relu_lanes(load_lanes(of[i] + c));
        const Floats direction = gamma == nullptr ? splat(1.f) : sign_lanes(load_lanes(gamma + c));
        store_lanes(out + c, choose_lanes(h, direction).h);
      });
    }
}

// One channel whose pixels are innermost.
template <class T>
static void pool_map(const BatchPassParams& p, const T* a, float direction, float* out) {
  const int64_t columns = p.W / 2;
  for (int64_t r = 0; r < p.H / 2; ++r, out += columns) {
    const T *upper = a + 2 * r * p.W, *lower = upper + p.W;
#pragma omp simd
    for (int64_t w = 0; w < columns; ++w)
      out[w] = choose(relu(load(upper + 2 * w)), relu(load(upper + 2 * w + 1)),
                      relu(load(lower + 2 * w)), relu(load(lower + 2 * w + 1)), direction).h;
  }
}

}  // namespace FF_ISA
}  // namespace ff
