// batch_pass on one row: moments of every channel (sweep 1), z and da (sweep 2), and the two sweeps
// of peer normalisation. Compiled once per instruction set; see csrc/cpu/isa.h.
#include "batch_pass_kernel.h"

#include "batch_pass_apply.h"
#include "batch_pass_windows.h"
#include "sums.h"

namespace ff {
namespace FF_ISA {
namespace {

// Row n of (2, N, C): every channel's mean and centred M2.
struct Planes {
  float *mean, *m2;
};

Planes planes_of(const BatchPassParams& p, float* moments, int64_t n) {
  return {moments + n * p.C, moments + (p.N + n) * p.C};
}

// Whole pixels [begin, end) of a sample whose channels are innermost, merged into what `before`
// pixels have left (Chan). The block lies in L1 for its second reading.
template <class Source>
void merge_block(const BatchPassParams& p, const Source& f, int64_t begin, int64_t end,
                 int64_t period, const Planes& out, const BatchPassScratch& s) {
  const float pixels = float((end - begin) / p.C), before = float(begin / p.C);
  float *sum = s.table[0], *squares = s.table[1], *centre = s.table[2];
  add_rows(Plain<Source>{f}, begin, end, period, sum);
  fold(sum, p.C, period);
  for (int64_t c = 0; c < p.C; ++c) centre[c] = sum[c] / pixels;
  for (int64_t j = p.C; j < period; ++j) centre[j] = centre[j - p.C];
  add_centred_rows(f, centre, begin, end, period, sum, squares);
  fold(sum, p.C, period);
  fold(squares, p.C, period);
  const float share = pixels / (before + pixels);
#pragma omp simd
  for (int64_t c = 0; c < p.C; ++c) {
    const float rest = sum[c] / pixels;
    const float mean = (centre[c] - p.table[c]) + rest, m2 = squares[c] - rest * sum[c];
    const float delta = mean - out.mean[c];
    out.mean[c] = before == 0.f ? mean : out.mean[c] + delta * share;
    out.m2[c] = before == 0.f ? m2 : out.m2[c] + m2 + delta * delta * before * share;
  }
}

// One channel of a sample whose pixels are innermost: elements [begin, end).
template <class Source>
void merge_run(const Source& f, int64_t begin, int64_t end, float pivot, float* mean, float* m2) {
  constexpr int64_t kBlock = 4096;
  double centre = 0., squares = 0.;
  for (int64_t b = begin; b < end; b += kBlock) {
    const int64_t last = b + kBlock < end ? b + kBlock : end;
    const double n = double(last - b), before = double(b - begin);
    const float middle = run_sum(Plain<Source>{f}, b, last) / float(n);
    float rest[2];
    run_centred(f, middle, b, last, rest);
    const double delta = middle + rest[0] / n - centre, share = n / (before + n);
    centre += b == begin ? delta : delta * share;
    squares += rest[1] - double(rest[0]) * rest[0] / n;
    squares += b == begin ? 0. : delta * delta * before * share;
  }
  *mean = float(centre - pivot);
  *m2 = float(squares);
}

template <class Source>
void sample_moments(const BatchPassParams& p, const BatchPassPlan& plan, const Source& f,
                    int64_t pixels, const Planes& out, const BatchPassScratch& s) {
  constexpr int64_t kBlock = 8192;
  if (pixels == 1) {
    for (int64_t c = 0; c < p.C; ++c) out.mean[c] = f.value(c) - p.table[c], out.m2[c] = 0.f;
  } else if (plan.channels_inner) {
    const int64_t size = p.C * pixels, rows = kBlock / plan.period;
    const int64_t block = (rows > 1 ? rows : 1) * plan.period;
    for (int64_t b = 0; b < size; b += block)
      merge_block(p, f, b, b + block < size ? b + block : size, plan.period, out, s);
  } else {
    for (int64_t c = 0; c < p.C; ++c)
      merge_run(f, c * pixels, (c + 1) * pixels, p.table[c], out.mean + c, out.m2 + c);
  }
}

template <class T>
void stats_row(const BatchPassParams& p, const BatchPassPlan& plan, int64_t n,
               const BatchPassScratch& s) {
  const T* a = static_cast<const T*>(p.a) + n * p.C * plan.pixels;
  if (!p.pool || p.norm_first)
    sample_moments(p, plan, FromInput<T>{a}, plan.pixels, planes_of(p, p.moments, n), s);
  if (!p.pool) return;
  const Planes out = planes_of(p, p.norm_first ? p.extrema : p.moments, n);
  const float* gamma = p.norm_first ? p.gamma : nullptr;
  const FromScratch<float> f{s.pooled, s.pooled};
  if (plan.channels_inner) {
    pool_pixels(p, a, gamma, s.pooled);
    sample_moments(p, plan, f, plan.pixels_z, out, s);
    return;
  }
  for (int64_t c = 0; c < p.C; ++c) {
    pool_map(p, a + c * plan.pixels, gamma == nullptr ? 1.f : sign(gamma[c]), s.pooled);
    merge_run(f, 0, plan.pixels_z, p.table[c], out.mean + c, out.m2 + c);
  }
}

template <class T>
void peer_stats(const BatchPassParams& p, int64_t begin, int64_t end) {
  const T* a = static_cast<const T*>(p.a);
  float rows = 0.f;
  for (int64_t c = begin; c < end; ++c) p.moments[c] = 0.f;
  for (int64_t n = 0; n < p.N; ++n) {
    if (p.y[n] != 1) continue;
    rows += 1.f;
#pragma omp simd
    for (int64_t c = begin; c < end; ++c) p.moments[c] += relu(load(a + n * p.C + c));
  }
  for (int64_t c = begin; c < end; ++c) p.moments[c] /= rows;
}

template <class T>
void peer_apply_row(const BatchPassParams& p, int64_t n) {
  if (p.y[n] != 1) return;
  const T* a = static_cast<const T*>(p.a) + n * p.C;
  T* da = static_cast<T*>(p.da) + n * p.C;
#pragma omp simd
  for (int64_t c = 0; c < p.C; ++c) {
    const float passing = p.straight_through || load(a + c) > 0.f ? 1.f : 0.f;
    store(da + c, load(da + c) + p.table[c] * passing);
  }
}

}  // namespace

void batch_pass_stats_row(const BatchPassParams& p, const BatchPassPlan& plan, int64_t n,
                          const BatchPassScratch& s) {
  switch (p.dtype) {
    case DType::f32: return stats_row<float>(p, plan, n, s);
    case DType::bf16: return stats_row<bf16>(p, plan, n, s);
    case DType::f16: return stats_row<f16>(p, plan, n, s);
  }
}

void batch_pass_apply_tables(const BatchPassParams& p, const BatchPassPlan& plan,
                             const BatchPassScratch& s) {
  for (int i = 0; i < kWeight; ++i)
    for (int64_t j = 0; j < plan.period; ++j)
      s.table[i][j] = j < p.C ? p.table[i * p.C + j] : s.table[i][j - p.C];
}

void batch_pass_apply_row(const BatchPassParams& p, const BatchPassPlan& plan, int64_t n,
                          const BatchPassScratch& s) {
  switch (p.dtype) {
    case DType::f32: return apply_row<float>(p, plan, n, s);
    case DType::bf16: return apply_row<bf16>(p, plan, n, s);
    case DType::f16: return apply_row<f16>(p, plan, n, s);
  }
}

void batch_pass_peer_stats(const BatchPassParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::f32: return peer_stats<float>(p, begin, end);
    case DType::bf16: return peer_stats<bf16>(p, begin, end);
    case DType::f16: return peer_stats<f16>(p, begin, end);
  }
}

void batch_pass_peer_apply_row(const BatchPassParams& p, int64_t n) {
  switch (p.dtype) {
    case DType::f32: return peer_apply_row<float>(p, n);
    case DType::bf16: return peer_apply_row<bf16>(p, n);
    case DType::f16: return peer_apply_row<f16>(p, n);
  }
}

}  // namespace FF_ISA
}  // namespace ff
