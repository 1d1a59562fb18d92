// Pairs of bf16 pixels: packing, and products by vdpbf16ps. Compiled once, for AVX-512 BF16; see
// gemm.h.
#include "gemm_pairs.h"
#include "gemm_steps.h"

namespace ff {
namespace {

struct Dot {
  static constexpr int kWidth = 16, kMostRows = 14, kMostPanels = 2;
  typedef __m512 Vec;
  typedef __m512i Words;
  static Words load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static Words spread(const uint32_t* p) { return _mm512_set1_epi32(int(*p)); }
  static Vec add(Vec sum, Words a, Words b) {
    return _mm512_dpbf16_ps(sum, __m512bh(a), __m512bh(b));
  }
};

}  // namespace

void pairs_pack_x(const PixelSource& s, int64_t c0, int64_t count, int64_t t0, int64_t t1,
                  int64_t panel_stride, uint16_t* dst) {
  Cursor<uint16_t> cursor(s, t0);
  for (int64_t t = t0; t < t1; t += 2, dst += 2 * kPanel) {
    const uint16_t* even = cursor.next();
    const uint16_t* odd = cursor.next();
    for (int64_t c = 0; c < count; c += kPanel) {
      const __mmask16 mask = mask_of(count - c);
      _mm512_storeu_si512(dst + c / kPanel * panel_stride,
                          pair_words(channels16(s, even, c0 + c, mask),
                                     channels16(s, odd, c0 + c, mask)));
    }
  }
}

void dot_pack_da(const PixelSource& s, int64_t c0, int64_t rows, int64_t t0, int64_t t1,
                 uint32_t* dst) {
  Cursor<uint16_t> cursor(s, t0);
  for (int64_t t = t0; t < t1; t += 2, dst += rows) {
    const uint16_t* even = cursor.next();
    const uint16_t* odd = t + 1 < t1 ? cursor.next() : nullptr;
    for (int64_t r = 0; r < rows; r += 16) {
      const __mmask16 mask = mask_of(rows - r);
      // a last, partial vector writes past its step: the next one, or the slack, takes that over
      _mm512_storeu_si512(dst + r, pair_words(channels16(s, even, c0 + r, mask),
                                              channels16(s, odd, c0 + r, mask)));
    }
  }
}

void dot_multiply(const StepPass& pass) { multiply_steps<Dot>(pass); }

}  // namespace ff
