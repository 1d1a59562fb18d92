// bf16 tiles: packing into the layouts TDPBF16PS wants, and the 2 x 2 tile loop. See gemm.h.
#include <algorithm>

#include "gemm_pairs.h"

namespace ff {
namespace {

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

constexpr int64_t kTile = 512;  // bf16 elements of a packed tile of da
constexpr int64_t kWords = 256;  // words of one of x

// Tiles 0-3 accumulate (row tile, column), 4-5 hold da, 6-7 hold x; columns are two panels of a tap
// or two taps of a panel, so that four independent sums hide the instruction's latency.
template <bool kTwoRows, bool kTwoPanels>
void multiply_tiles(const uint16_t* a, int64_t a_tile, const uint32_t* b, const uint32_t* b2,
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
    _tile_loadd(6, b + k * kWords, 64);
    _tile_loadd(4, a + k * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoPanels) {
      _tile_loadd(7, b2 + k * kWords, 64);
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

void amx_pack_da(const PixelSource& s, int64_t c0, int64_t rows, int64_t t0, int64_t steps,
                 uint16_t* dst) {
  Cursor<uint16_t> cursor(s, t0);
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
