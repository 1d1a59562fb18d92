// batch_pass, sweep 2: z = (p - mean) scale + shift and da, where p is h, pooled or not, and
//   dL/dp = weight (1 | z) - constant - slope (p - mean):
// goodness, and the two terms by which BatchNorm's statistics answer. With the pool after BatchNorm
// the first term belongs to a window's winner, the others to every pixel.
#pragma once
#include <type_traits>

#include "batch_pass_kernel.h"
#include "batch_pass_windows.h"
#include "sums.h"

namespace ff {
namespace FF_ISA {

// One channel's numbers, and vectors of them from tables.
struct Uniform {
  ChannelNumbers numbers;
  FF_HD ChannelNumbers one(int64_t) const { return numbers; }
  FF_HD Floats lanes(int i, int64_t) const { return splat(numbers.of[i]); }
};
struct Tables {
  const float* of[6];
  FF_HD ChannelNumbers one(int64_t j) const {
    return {{of[0][j], of[1][j], of[2][j], of[3][j], of[4][j], of[5][j]}};
  }
  FF_HD Floats lanes(int i, int64_t j) const { return load_lanes(of[i] + j); }
};

FF_HD Floats passing_lanes(Floats h, bool straight_through) {
  return h > (straight_through ? -1.f : 0.f) ? splat(1.f) : Floats{};
}

// Elements [i, i + n) of a row, nothing pooled, with coefficients 0 .. n - 1.
template <bool kSquares, bool kZ, bool kDa, class T, class Coefficients>
FF_HD void apply_run(const T* a, const Coefficients& t, int64_t i, int64_t n, bool straight, T* z,
                     T* da) {
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) {
    const Floats h = relu_lanes(load_lanes(a + i + j)), x = h - t.lanes(kMean, j);
    const Floats u = x * t.lanes(kScale, j) + t.lanes(kShift, j);
    if (kDa) {
      const Floats weight = t.lanes(kWeight, j);
      const Floats answer = t.lanes(kConstant, j) + t.lanes(kSlope, j) * x;
      const Floats own = kSquares ? weight * u : weight;
      store_lanes(da + i + j, (own - answer) * passing_lanes(h, straight));
    }
    if (kZ) store_lanes(z + i + j, u);
  }
  for (; j < n; ++j) {
    const ChannelNumbers numbers = t.one(j);
    const float h = relu(load(a + i + j)), u = normalised(numbers, h);
    const float d = asked(numbers, u, kSquares) - answered(numbers, h);
    if (kDa) store(da + i + j, d * passing(h, straight));
    if (kZ) store(z + i + j, u);
  }
}

// Offsets of a window's pixels in a and da.
struct Window {
  int64_t offset[4];
};

FF_HD Window window_of(int64_t step, int64_t line) { return {{0, step, line, line + step}}; }

// One channel of one window.
template <bool kSquares, bool kZ, bool kDa, class T>
FF_HD void apply_window(const Window& w, const ChannelNumbers& t, bool norm_first, bool straight,
                        const T* a, T* z, T* da) {
  const float h0 = relu(load(a)), h1 = relu(load(a + w.offset[1]));
  const float h2 = relu(load(a + w.offset[2])), h3 = relu(load(a + w.offset[3]));
  const Choice best = choose(h0, h1, h2, h3, norm_first ? sign(t.of[kScale]) : 1.f);
  const float u = normalised(t, best.h);
  if (kZ) store(z, u);
  if (!kDa) return;
  const float own = asked(t, u, kSquares);
  store(da, window_gradient(t, h0, best.at == 0, own, norm_first, straight));
  store(da + w.offset[1], window_gradient(t, h1, best.at == 1, own, norm_first, straight));
  store(da + w.offset[2], window_gradient(t, h2, best.at == 2, own, norm_first, straight));
  store(da + w.offset[3], window_gradient(t, h3, best.at == 3, own, norm_first, straight));
}

// A vector of windows whose h are given: u, and the gradients of their pixels in place of h.
template <bool kSquares, bool kDa, class Coefficients>
FF_HD Floats window_lanes(const BatchPassParams& p, const Coefficients& t, int64_t c, Floats* h) {
  const Floats mean = t.lanes(kMean, c), scale = t.lanes(kScale, c);
  const Choices best = choose_lanes(h, p.norm_first ? sign_lanes(scale) : splat(1.f));
  const Floats u = (best.h - mean) * scale + t.lanes(kShift, c);
  if (!kDa) return u;
  const Floats weight = t.lanes(kWeight, c), own = kSquares ? weight * u : weight;
  const Floats constant = t.lanes(kConstant, c), slope = t.lanes(kSlope, c);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Floats answer = constant + slope * (h[i] - mean);
    const Floats other = p.norm_first ? -answer : Floats{};
    const Floats d = best.at == i ? own - answer : other;
    h[i] = d * passing_lanes(h[i], p.straight_through);
  }
  return u;
}

// Channels innermost: a window of kWidth channels that begin at table entry c.
template <bool kSquares, bool kZ, bool kDa, class T>
FF_HD void apply_window_lanes(const BatchPassParams& p, const Window& w, const Tables& t, int64_t c,
                              const T* a, T* z, T* da) {
  Floats h[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) h[i] = relu_lanes(load_lanes(a + w.offset[i]));
  const Floats u = window_lanes<kSquares, kDa>(p, t, c, h);
  if (kZ) store_lanes(z, u);
  if (!kDa) return;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) store_lanes(da + w.offset[i], h[i]);
}

// Pixels innermost: kWidth windows of one channel; half of them start at `a`, half `second` later.
template <bool kSquares, bool kZ, bool kDa, class T>
FF_HD void apply_row_lanes(const BatchPassParams& p, const Uniform& t, int64_t second, const T* a,
                           T* z, T* da) {
  Floats h[4];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const T* line = a + i * p.W;
    const Floats x = relu_lanes(load_lanes(line)), y = relu_lanes(load_lanes(line + second));
    h[2 * i] = evens(x, y);
    h[2 * i + 1] = odds(x, y);
  }
  const Floats u = window_lanes<kSquares, kDa>(p, t, 0, h);
  if (kZ) store_lanes(z, u);
  if (!kDa) return;
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    store_lanes(da + i * p.W, left(h[2 * i], h[2 * i + 1]));
    store_lanes(da + i * p.W + second, right(h[2 * i], h[2 * i + 1]));
  }
}

FF_HD ChannelNumbers channel_of(const BatchPassParams& p, int64_t n, int64_t c) {
  ChannelNumbers t{};
  for (int i = 0; i < kWeight; ++i) t.of[i] = p.table[i * p.C + c];
  t.of[kWeight] = p.weight == nullptr ? 0.f : p.weight[n * p.C + c];
  return t;
}

// Pixels that a floor-mode pool leaves out: BatchNorm before the pool has read them all the same.
template <class T>
static void apply_margins(const BatchPassParams& p, const ChannelNumbers& t, int64_t step,
                          const T* a, T* da) {
  const int64_t rows = p.H / 2 * 2, columns = p.W / 2 * 2;
  for (int64_t r = 0; r < p.H; ++r)
    for (int64_t w = r < rows ? columns : 0; w < p.W; ++w) {
      const int64_t at = (r * p.W + w) * step;
      store(da + at, margin_gradient(t, relu(load(a + at)), p.norm_first, p.straight_through));
    }
}

// Every window of one channel, `step` elements between its pixels.
template <bool kSquares, bool kZ, bool kDa, class T>
static void apply_windows(const BatchPassParams& p, const ChannelNumbers& t, int64_t step,
                          const T* a, T* z, T* da) {
  const int64_t columns = p.W / 2, rows = p.H / 2, line = p.W * step;
  const Window w = window_of(step, line);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = 2 * r * line, first_z = r * columns * step;
    const auto vector = [&](int64_t i, int64_t second) {
      apply_row_lanes<kSquares, kZ, kDa>(p, Uniform{t}, second, a + first + 2 * i, z + first_z + i,
                                         da + first + 2 * i);
    };
    if (step == 1 && columns >= kWidth) {
      over_vectors(columns, [&](int64_t i) { vector(i, kWidth); });
    } else if (step == 1 && p.W == kWidth && r + 1 < rows) {
      vector(0, 2 * line);  // two rows of windows at once
      ++r;
    } else {
      for (int64_t i = 0; i < columns; ++i)
        apply_window<kSquares, kZ, kDa>(w, t, p.norm_first, p.straight_through,
                                        a + first + 2 * i * step, z + first_z + i * step,
                                        da + first + 2 * i * step);
    }
  }
}

template <bool kSquares, bool kZ, bool kDa, class T>
static void apply_pooled(const BatchPassParams& p, const BatchPassPlan& plan, int64_t n,
                         const Tables& t, const T* a, T* z, T* da) {
  const int64_t columns = p.W / 2, C = p.C;
  const bool vectors = plan.channels_inner && C >= kWidth;
  if (vectors) {
    const Window w = window_of(C, p.W * C);
    for (int64_t i = 0; i < plan.pixels_z; ++i) {
      const int64_t corner = 2 * (i / columns * p.W + i % columns) * C;
      over_vectors(C, [&](int64_t c) {
        apply_window_lanes<kSquares, kZ, kDa>(p, w, t, c, a + corner + c, z + i * C + c,
                                              da + corner + c);
      });
    }
    if (!kDa || (p.H % 2 == 0 && p.W % 2 == 0)) return;
  }
  const int64_t step = plan.channels_inner ? C : 1;
  for (int64_t c = 0; c < C; ++c) {
    const ChannelNumbers own = channel_of(p, n, c);
    const int64_t first = plan.channels_inner ? c : c * plan.pixels;
    const int64_t first_z = plan.channels_inner ? c : c * plan.pixels_z;
    if (!vectors)
      apply_windows<kSquares, kZ, kDa>(p, own, step, a + first, z + first_z, da + first);
    if (kDa) apply_margins(p, own, step, a + first, da + first);
  }
}

template <bool kSquares, bool kZ, bool kDa, class T>
static void apply_plain(const BatchPassParams& p, const BatchPassPlan& plan, int64_t n,
                        const Tables& t, const T* a, T* z, T* da) {
  const bool straight = p.straight_through;
  const int64_t size = p.C * plan.pixels;
  if (plan.channels_inner) {
    for (int64_t i = 0; i < size; i += plan.period)
      apply_run<kSquares, kZ, kDa>(a, t, i, size - i < plan.period ? size - i : plan.period,
                                   straight, z, da);
    return;
  }
  for (int64_t c = 0; c < p.C; ++c)
    apply_run<kSquares, kZ, kDa>(a, Uniform{channel_of(p, n, c)}, c * plan.pixels, plan.pixels,
                                 straight, z, da);
}

template <class T>
static void apply_row(const BatchPassParams& p, const BatchPassPlan& plan, int64_t n,
                      const BatchPassScratch& s) {
  const T* a = static_cast<const T*>(p.a) + n * p.C * plan.pixels;
  T* z = p.z == nullptr ? nullptr : static_cast<T*>(p.z) + n * p.C * plan.pixels_z;
  T* da = p.da == nullptr ? nullptr : static_cast<T*>(p.da) + n * p.C * plan.pixels;
  Tables t{};
  for (int i = 0; i < 6; ++i) t.of[i] = s.table[i];
  if (da != nullptr && plan.channels_inner) {
    const float* weight = p.weight + n * p.C;
    for (int64_t j = 0; j < plan.period; ++j)
      s.table[kWeight][j] = j < p.C ? weight[j] : s.table[kWeight][j - p.C];
  }
  const auto sweep = [&](auto squares, auto with_z, auto with_da) {
    constexpr bool kSquares = squares.value, kZ = with_z.value, kDa = with_da.value;
    p.pool ? apply_pooled<kSquares, kZ, kDa>(p, plan, n, t, a, z, da)
           : apply_plain<kSquares, kZ, kDa>(p, plan, n, t, a, z, da);
  };
  const std::true_type yes;
  const std::false_type no;
  if (da == nullptr) return sweep(no, yes, no);
  if (z == nullptr) return p.squares ? sweep(yes, no, yes) : sweep(no, no, yes);
  p.squares ? sweep(yes, yes, yes) : sweep(no, yes, yes);
}

}  // namespace FF_ISA
}  // namespace ff
