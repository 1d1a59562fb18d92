// Count, mean and centred second moment of a set of numbers, merged by Chan's formula: the variance
// is never a difference of two large sums.
#pragma once
#include <cstdint>

#include "macros.h"

namespace ff {

struct Moments {  // no initialisers: it lives in shared memory
  float count, mean, m2;
};

FF_HD Moments merge(const Moments& a, const Moments& b) {
  if (!(b.count > 0.f)) return a;
  const float count = a.count + b.count, share = b.count / count, delta = b.mean - a.mean;
  Moments out{};
  out.count = count;
  out.mean = a.mean + delta * share;
  out.m2 = a.m2 + b.m2 + delta * delta * a.count * share;
  return out;
}

// Two passes over the `n` numbers x[i] whose bit i of `valid` is set; n <= 32.
template <int n>
FF_HD Moments moments_of(const float* x, uint32_t valid) {
  constexpr uint32_t all = n == 32 ? ~0u : (1u << (n & 31)) - 1;
  Moments out{};
  float total = 0.f;
  if (valid == all) {
    for (int i = 0; i < n; ++i) total += x[i];
    out.count = float(n);
    out.mean = total * (1.f / n);
    for (int i = 0; i < n; ++i) out.m2 += (x[i] - out.mean) * (x[i] - out.mean);
    return out;
  }
  for (int i = 0; i < n; ++i)
    if (valid >> i & 1) total += x[i], out.count += 1.f;
  if (out.count == 0.f) return out;
  out.mean = total / out.count;
  for (int i = 0; i < n; ++i)
    if (valid >> i & 1) out.m2 += (x[i] - out.mean) * (x[i] - out.mean);
  return out;
}

}  // namespace ff
