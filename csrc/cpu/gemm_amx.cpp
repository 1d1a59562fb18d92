// bf16 tiles: packing into the layouts TDPBF16PS wants, and the 2 x 2 tile loop. See gemm.h.
#include <immintrin.h>

#include <algorithm>

#include "gemm.h"

// gcc 12 warns about its own AVX-512 headers (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace ff {
namespace {

// Walks grid positions upwards; a division a position costs more than packing it.
class Cursor {
 public:
  Cursor(const PixelSource& s, int64_t t)
      : s_(s), left_(s.samples - t / s.positions), g_(t % s.positions),
        sample_(static_cast<const uint16_t*>(s.data) + t / s.positions * s.pixels * s.channels) {}

  // The pixel here, of channel 0, or null where the grid is zero padding; then steps on.
  const uint16_t* next() {
    if (left_ <= 0) return nullptr;
    const int64_t i = s_.index ? s_.index[g_] : g_;
    const uint16_t* at = i < 0 ? nullptr : sample_ + (s_.channels_last ? i * s_.channels : i);
    if (++g_ == s_.positions) g_ = 0, --left_, sample_ += s_.pixels * s_.channels;
    return at;
  }

 private:
  const PixelSource& s_;
  int64_t left_, g_;
  const uint16_t* sample_;
};

// 16 channels of a pixel from channel c on; lanes outside `mask` are zero.
__m256i channels16(const PixelSource& s, const uint16_t* at, int64_t c, __mmask16 mask) {
  if (!at) return _mm256_setzero_si256();
  if (s.channels_last) return _mm256_maskz_loadu_epi16(mask, at + c);
  alignas(32) uint16_t lane[16] = {};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) lane[i] = at[(c + i) * s.pixels];
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(lane));
}

__mmask16 mask_of(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1u << count) - 1); }

__m512i pair_words(__m256i even, __m256i odd) {
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}

void transpose16(__m512i v[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  // v[4 i + j] now holds column 4 l + j of rows 4 i .. 4 i + 3 in its 128-bit lane l
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

constexpr int64_t kTile = 512;  // bf16 elements of a packed tile

// Tiles 0-3 accumulate (row tile, column), 4-5 hold da, 6-7 hold x; columns are two panels of a tap
// or two taps of a panel, so that four independent sums hide the instruction's latency.
template <bool kTwoRows, bool kTwoPanels>
void multiply_tiles(const uint16_t* a, int64_t a_tile, const uint16_t* b, const uint16_t* b2,
                    int64_t steps, float* acc, float* acc2, bool first) {
  float *low = acc + 16 * kPanel, *low2 = acc2 + 16 * kPanel;
  if (first) {
    _tile_zero(0);
    if (kTwoPanels) _tile_zero(1);
    if (kTwoRows) _tile_zero(2);
    if (kTwoRows && kTwoPanels) _tile_zero(3);
  } else {
    _tile_loadd(0, acc, 64);
    if (kTwoPanels) _tile_loadd(1, acc2, 64);
    if (kTwoRows) _tile_loadd(2, low, 64);
    if (kTwoRows && kTwoPanels) _tile_loadd(3, low2, 64);
  }
  for (int64_t k = 0; k < steps; ++k) {
    _tile_loadd(6, b + k * kTile, 64);
    _tile_loadd(4, a + k * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoPanels) {
      _tile_loadd(7, b2 + k * kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kTwoRows) {
      _tile_loadd(5, a + a_tile + k * kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      if (kTwoPanels) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, acc, 64);
  if (kTwoPanels) _tile_stored(1, acc2, 64);
  if (kTwoRows) _tile_stored(2, low, 64);
  if (kTwoRows && kTwoPanels) _tile_stored(3, low2, 64);
}

}  // namespace

void amx_configure(int64_t rows) {
  TileConfig config;
  const uint8_t first = uint8_t(std::min<int64_t>(rows, 16));
  const uint8_t second = uint8_t(std::max<int64_t>(rows - 16, 1));
  const uint8_t per_tile[8] = {first, first, second, second, first, second, 16, 16};
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = per_tile[i];
    config.bytes_per_row[i] = 64;
  }
  // gcc 12 drops part of the configuration as dead stores without this
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

void amx_release() { _tile_release(); }

void amx_pack_x(const PixelSource& s, int64_t c0, int64_t count, int64_t t0, int64_t t1,
                int64_t panel_stride, uint16_t* dst) {
  Cursor cursor(s, t0);
  for (int64_t t = t0; t < t1; t += 2, dst += 2 * kPanel) {
    const uint16_t* even = cursor.next();
    const uint16_t* odd = cursor.next();
    for (int64_t c = 0; c < count; c += kPanel) {
      const __mmask16 mask = mask_of(count - c);
      _mm512_store_si512(dst + c / kPanel * panel_stride,
                         pair_words(channels16(s, even, c0 + c, mask),
                                    channels16(s, odd, c0 + c, mask)));
    }
  }
}

void amx_pack_da(const PixelSource& s, int64_t c0, int64_t rows, int64_t t0, int64_t steps,
                 uint16_t* dst) {
  Cursor cursor(s, t0);
  for (int64_t k = 0; k < steps; ++k) {
    const uint16_t* at[kAmxStep];
    for (int i = 0; i < kAmxStep; ++i) at[i] = cursor.next();
    for (int64_t r = 0; r < rows; r += 16) {
      const __mmask16 mask = mask_of(rows - r);
      __m512i v[16];
      for (int i = 0; i < 16; ++i)
        v[i] = pair_words(channels16(s, at[2 * i], c0 + r, mask),
                          channels16(s, at[2 * i + 1], c0 + r, mask));
      transpose16(v);
      uint16_t* tile = dst + (r / 16 * steps + k) * kTile;
      for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * kAmxStep, v[i]);
    }
  }
}

void amx_multiply(const AmxPass& p) {
  const int64_t a_tile = p.steps * kTile, even = p.panels / 2 * 2;
  const auto b = [&](int64_t tap, int64_t j) {
    return p.b + p.tap_offset[tap] + j * p.panel_stride;
  };
  const auto acc = [&](int64_t tap, int64_t j) {
    return p.acc + (tap * p.panels + j) * p.rows * kPanel;
  };
  const auto two = p.rows > 16 ? multiply_tiles<true, true> : multiply_tiles<false, true>;
  const auto one = p.rows > 16 ? multiply_tiles<true, false> : multiply_tiles<false, false>;
  for (int64_t j = 0; j < even; j += 2)
    for (int64_t t = 0; t < p.taps; ++t)
      two(p.a, a_tile, b(t, j), b(t, j + 1), p.steps, acc(t, j), acc(t, j + 1), p.first);
  if (even == p.panels) return;
  for (int64_t t = 0; t + 1 < p.taps; t += 2)
    two(p.a, a_tile, b(t, even), b(t + 1, even), p.steps, acc(t, even), acc(t + 1, even), p.first);
  if (p.taps % 2)
    one(p.a, a_tile, b(p.taps - 1, even), nullptr, p.steps, acc(p.taps - 1, even), nullptr,
        p.first);
}

}  // namespace ff
