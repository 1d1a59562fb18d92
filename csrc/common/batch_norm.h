// The formulas of batch_pass on one element and one 2x2 window; no memory access.
#pragma once
#include <cstdint>

#include "macros.h"

namespace ff {

// One channel of one row in the second sweep; rows of BatchPassParams::table, then weight.
enum BatchCoefficient { kMean, kScale, kShift, kConstant, kSlope, kWeight };
struct ChannelNumbers {
  float of[6];
};

// max(0, x) that keeps a NaN.
FF_HD float rectified(float x) { return x < 0.f ? 0.f : x; }

// Which extremum BatchNorm with a factor of this sign turns into the maximum; 0: all are equal.
FF_HD float sign(float x) { return x > 0.f ? 1.f : (x < 0.f ? -1.f : 0.f); }

// dh/da as a factor, so that a NaN gradient stays one.
FF_HD float passing(float h, bool straight_through) {
  return straight_through || h > 0.f ? 1.f : 0.f;
}

FF_HD float normalised(const ChannelNumbers& t, float p) {
  return (p - t.of[kMean]) * t.of[kScale] + t.of[kShift];
}

// What the goodness asks of an element whose normalised value is u.
FF_HD float asked(const ChannelNumbers& t, float u, bool squares) {
  return squares ? t.of[kWeight] * u : t.of[kWeight];
}

// What the batch's statistics take back of it.
FF_HD float answered(const ChannelNumbers& t, float p) {
  return t.of[kConstant] + t.of[kSlope] * (p - t.of[kMean]);
}

// The first h of a window, in row-major order, that maximises direction * h; the last NaN if any.
struct Choice {
  float h;
  int32_t at;
};
FF_HD Choice offered(const Choice& best, float h, int32_t at, float direction) {
  const float key = direction * best.h, other = direction * h;
  const bool wins = (other > key) | (other != other);
  return {wins ? h : best.h, wins ? at : best.at};
}
FF_HD Choice choose(float h0, float h1, float h2, float h3, float direction) {
  const Choice first = offered({h0, 0}, h1, 1, direction);
  return offered(offered(first, h2, 2, direction), h3, 3, direction);
}

// da of a window's pixel: with BatchNorm before the pool every pixel answers, else the winner.
FF_HD float window_gradient(const ChannelNumbers& t, float h, bool wins, float own, bool norm_first,
                            bool straight_through) {
  const float rest = answered(t, h);
  return (wins ? own - rest : (norm_first ? -rest : 0.f)) * passing(h, straight_through);
}

// And of a pixel that a floor-mode pool leaves out.
FF_HD float margin_gradient(const ChannelNumbers& t, float h, bool norm_first,
                            bool straight_through) {
  return (norm_first ? -answered(t, h) : 0.f) * passing(h, straight_through);
}

}  // namespace ff
