// local_pass, last part: z = (h - mean) * rstd and da, in one sweep over the sample's tile in L2.
#pragma once
#include <type_traits>

#include "convert.h"
#include "lanes.h"
#include "local_pass_kernel.h"
#include "local_pass_prepare.h"
#include "local_pass_stats.h"

namespace ff {
namespace FF_ISA {

enum class Gradient { none, mean, squares };

// Coefficients of a run: three constants of a group, or tables over a period.
struct Constant {
  float mean_, rstd_, slope_;
  FF_HD float mean(int64_t) const { return mean_; }
  FF_HD float rstd(int64_t) const { return rstd_; }
  FF_HD float slope(int64_t) const { return slope_; }
  FF_HD Floats means(int64_t) const { return splat(mean_); }
  FF_HD Floats rstds(int64_t) const { return splat(rstd_); }
  FF_HD Floats slopes(int64_t) const { return splat(slope_); }
};
struct Table {
  const float *mean_, *rstd_, *slope_;
  FF_HD float mean(int64_t j) const { return mean_[j]; }
  FF_HD float rstd(int64_t j) const { return rstd_[j]; }
  FF_HD float slope(int64_t j) const { return slope_[j]; }
  FF_HD Floats means(int64_t j) const { return load_lanes(mean_ + j); }
  FF_HD Floats rstds(int64_t j) const { return load_lanes(rstd_ + j); }
  FF_HD Floats slopes(int64_t j) const { return load_lanes(slope_ + j); }
};

// Where z goes: nowhere, to its own place, or there with a shortcut added.
enum class Features { none, plain, joined };

// Elements [i, i + n) with coefficients 0 .. n - 1; an element whose bits are below `least` passes
// no gradient. Without squares the slopes are numbers of T already. z and shortcut, like da, are
// where their element 0 would be.
template <Gradient kGradient, Features kZ, class Source, class Coefficients, class T>
FF_HD void apply_run(const Source f, const Coefficients t, int64_t i, int64_t n, int32_t least,
                     T* z, const T* shortcut, T* da) {
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) {
    const Floats h = f.lanes(i + j);
    if (kGradient != Gradient::none) {
      const bool squares = kGradient == Gradient::squares;
      const Floats d = squares ? t.slopes(j) * (h + h) : t.slopes(j);
      const Floats chosen = Ints(f.alive_lanes(i + j, h)) >= least ? d : Floats{};
      squares ? store_lanes(da + i + j, chosen) : store_exact(da + i + j, chosen);
    }
    if (kZ == Features::none) continue;
    const Floats normal = (h - t.means(j)) * t.rstds(j);
    store_lanes(z + i + j, normal + (kZ == Features::joined ? load_lanes(shortcut + i + j)
                                                            : Floats{}));
  }
  for (; j < n; ++j) {
    const float h = f.value(i + j);
    if (kGradient != Gradient::none) {
      const float d = kGradient == Gradient::squares ? t.slope(j) * (h + h) : t.slope(j);
      store(da + i + j, int32_t(bits_of(f.alive(i + j, h))) >= least ? d : 0.f);
    }
    if (kZ == Features::none) continue;
    const float normal = (h - t.mean(j)) * t.rstd(j);
    store(z + i + j, normal + (kZ == Features::joined ? load(shortcut + i + j) : 0.f));
  }
}

// dL/dh = coef * slope_scale (* 2h); coef is absent when there is no loss.
FF_HD float slope_scale(const LocalPassParams& p) {
  return p.da_scale * p.blend * (p.dropout.threshold != 0 ? p.dropout.keep_scale : 1.f);
}

FF_HD Constant constants_of(const LocalPassParams& p, int64_t row, int64_t k, float scale) {
  const int64_t at = row * p.K + k;
  return {p.stats[2 * at], p.stats[2 * at + 1], p.coef == nullptr ? 0.f : p.coef[at] * scale};
}

template <bool kRound, class T>
static Table fill_table(const LocalPassParams& p, const LocalPassPlan& plan, int64_t row,
                        const LocalPassScratch& s) {
  const float scale = slope_scale(p);
  for (int64_t k = 0; k < p.K; ++k) {
    Constant t = constants_of(p, row, k, scale);
    if (kRound) t.slope_ = rounded_to<T>(t.slope_);
    for (int64_t c = p.offsets[k]; c < p.offsets[k + 1]; ++c)
      s.table[0][c] = t.mean_, s.table[1][c] = t.rstd_, s.table[2][c] = t.slope_;
  }
  for (int table = 0; table < 3; ++table)
    for (int64_t j = p.C; j < plan.period; ++j) s.table[table][j] = s.table[table][j - p.C];
  return {s.table[0], s.table[1], s.table[2]};
}

template <Gradient kGradient, Features kZ, class Source, class T>
static void apply_sample(const LocalPassParams& p, const LocalPassPlan& plan, int64_t row,
                         const Source& f, T* z, const T* shortcut, T* da,
                         const LocalPassScratch& s) {
  const int32_t least = p.straight_through ? Source::kLeast : 1;
  constexpr bool kRound = kGradient == Gradient::mean;
  if (!plan.channels_inner) {
    const float scale = slope_scale(p);
    for (int64_t k = 0; k < p.K; ++k) {
      const int64_t begin = p.offsets[k] * plan.pixels_z, end = p.offsets[k + 1] * plan.pixels_z;
      Constant t = constants_of(p, row, k, scale);
      if (kRound) t.slope_ = rounded_to<T>(t.slope_);
      apply_run<kGradient, kZ>(f, t, begin, end - begin, least, z, shortcut, da);
    }
    return;
  }
  const Table table = fill_table<kRound, T>(p, plan, row, s);
  const int64_t size = p.C * plan.pixels_z;
  const int64_t apart = p.z_channels - p.C;  // between the pixels of z
  for (int64_t i = 0; i < size; i += plan.run) {
    apply_run<kGradient, kZ>(f, table, i, size - i < plan.run ? size - i : plan.run, least, z,
                             shortcut, da);
    if (kZ != Features::none) z += apart;
  }
}

// One window's gradient goes to its maximum, the first in row-major order; slope is dL/dh there.
template <class T>
FF_HD void pool_window(const float* h, const Windows& w, float slope, int32_t floor, T* da) {
  const int64_t at[4] = {0, w.step, w.line, w.line + w.step};
  const float top = largest(h[at[0]], h[at[1]], h[at[2]], h[at[3]]);
  bool open = true;
  for (int i = 0; i < 4; ++i) {
    const bool wins = open & (h[at[i]] == top);
    open = open & !wins;
    store(da + at[i], wins & (int32_t(bits_of(h[at[i]])) > floor) ? slope : 0.f);
  }
}
template <class T>
FF_HD void pool_window_lanes(const float* from, const Windows& w, Floats slope, int32_t floor,
                             T* da) {
  const int64_t at[4] = {0, w.step, w.line, w.line + w.step};
  Floats h[4];
  for (int i = 0; i < 4; ++i) h[i] = load_lanes(from + at[i]);
  const Floats top = largest(h[0], h[1], h[2], h[3]);
  Ints taken{};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Ints wins = ~taken & (h[i] == top);
    taken |= wins;
    store_lanes(da + at[i], wins & (Ints(h[i]) > floor) ? slope : Floats{});
  }
}

template <class T>
static void clear_margins(const LocalPassParams& p, const Windows& w, T* da) {
  for (int64_t o = 0; o < w.outer; ++o) {
    T* map = da + o * w.map;
    for (int64_t r = 0; r < p.H; ++r)
      for (int64_t c = r < 2 * w.rows ? 2 * w.columns : 0; c < p.W; ++c)
        for (int64_t i = 0; i < w.inner; ++i) store(map + r * w.line + c * w.step + i, 0.f);
  }
}

// da through the pool: at each window's winner coef * scale (* 2h), elsewhere 0.
template <class T>
static void pool_gradient(const LocalPassParams& p, const LocalPassPlan& plan, int64_t row,
                          int slot, T* da, const LocalPassScratch& s) {
  const Windows w = windows_of(p);
  const float scale = slope_scale(p);
  const bool squares = p.goodness != Goodness::mean;
  const int32_t floor = p.straight_through ? -1 : 0;
  const float *full = s.full[slot], *features = s.features[slot];
  const Table table = plan.channels_inner ? fill_table<false, T>(p, plan, row, s) : Table{};
  int64_t k = 0;
  for (int64_t o = 0; o < w.outer; ++o) {
    while (o >= p.offsets[k + 1]) ++k;
    const float slope = constants_of(p, row, k, scale).slope_;
    for (int64_t r = 0; r < w.rows; ++r) {
      const int64_t corner = o * w.map + 2 * r * w.line;
      const float* pooled = features + (o * w.rows + r) * w.columns * w.inner;
      for (int64_t c = 0; c < w.columns; ++c, pooled += w.inner) {
        const float* from = full + corner + 2 * c * w.step;
        T* to = da + corner + 2 * c * w.step;
        if (w.inner < kWidth) {
          for (int64_t i = 0; i < w.inner; ++i) {
            const float own = plan.channels_inner ? table.slope(i) : slope;
            pool_window(from + i, w, squares ? own * 2.f * pooled[i] : own, floor, to + i);
          }
          continue;
        }
        over_vectors(w.inner, [&](int64_t i) {
          const Floats own = table.slopes(i);
          const Floats value = squares ? own * 2.f * load_lanes(pooled + i) : own;
          pool_window_lanes(from + i, w, value, floor, to + i);
        });
      }
    }
  }
  clear_margins(p, w, da);
}

// f(the choice as a compile-time constant), of the values that it can have.
template <auto kFirst, auto... kRest, class F>
FF_HD void with_value(decltype(kFirst) choice, const F& f) {
  if (choice == kFirst) return f(std::integral_constant<decltype(kFirst), kFirst>{});
  if constexpr (sizeof...(kRest) > 0) with_value<kRest...>(choice, f);
}

template <class Source, class T>
static void apply(const LocalPassParams& p, const LocalPassPlan& plan, int64_t row, int slot,
                  const Source& f, const LocalPassScratch& s) {
  const int64_t size_z = p.C * plan.pixels_z;
  T* z = p.z == nullptr ? nullptr : static_cast<T*>(p.z) + row * p.z_channels * plan.pixels_z;
  T* da = p.da == nullptr ? nullptr : static_cast<T*>(p.da) + row * p.C * plan.pixels;
  const T* shortcut =
      p.shortcut == nullptr ? nullptr : static_cast<const T*>(p.shortcut) + row * size_z;
  if (p.pool && da != nullptr) {
    pool_gradient(p, plan, row, slot, da, s);
    da = nullptr;
  }
  const auto gradient = da == nullptr                    ? Gradient::none
                        : p.goodness == Goodness::mean ? Gradient::mean
                                                       : Gradient::squares;
  const auto features = z == nullptr            ? Features::none
                        : shortcut == nullptr ? Features::plain
                                              : Features::joined;
  with_value<Gradient::none, Gradient::mean, Gradient::squares>(gradient, [&](auto d) {
    with_value<Features::none, Features::plain, Features::joined>(features, [&](auto to) {
      apply_sample<d, to>(p, plan, row, f, z, shortcut, da, s);
    });
  });
}

}  // namespace FF_ISA
}  // namespace ff
