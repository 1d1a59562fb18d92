// AMX tiles in plain C++, for processors without them: what gemm_amx.cpp uses, and the tests' check
// that every tile stays within its configuration.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulator {

struct Tile {
  int rows = 0, bytes = 0;
  unsigned char data[16][64] = {};
};
inline Tile tiles[8];

inline void configure(const void* at) {
  const auto* c = static_cast<const unsigned char*>(at);
  if (c[0] != 1) std::abort();  // the palette
  for (int t = 0; t < 8; ++t) {
    uint16_t bytes;
    std::memcpy(&bytes, c + 16 + 2 * t, 2);
    tiles[t] = Tile{};
    tiles[t].rows = c[48 + t], tiles[t].bytes = bytes;
    if (tiles[t].rows > 16 || bytes > 64) std::abort();
  }
}

inline void load(int t, const void* base, long stride) {
  for (int r = 0; r < tiles[t].rows; ++r)
    std::memcpy(tiles[t].data[r], static_cast<const char*>(base) + r * stride, tiles[t].bytes);
}

inline void store(int t, void* base, long stride) {
  for (int r = 0; r < tiles[t].rows; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, tiles[t].data[r], tiles[t].bytes);
}

inline void zero(int t) { std::memset(tiles[t].data, 0, sizeof tiles[t].data); }

inline float widened(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// c (rows x n) += a (rows x 2k) b (k x 2n), pairs side by side.
inline void product(int c, int a, int b) {
  if (tiles[c].rows != tiles[a].rows || tiles[a].bytes / 4 != tiles[b].rows ||
      tiles[c].bytes != tiles[b].bytes)
    std::abort();
  for (int m = 0; m < tiles[a].rows; ++m)
    for (int k = 0; k < tiles[a].bytes / 4; ++k)
      for (int n = 0; n < tiles[b].bytes / 4; ++n) {
        uint16_t x[2], y[2];
        float sum;
        std::memcpy(x, tiles[a].data[m] + 4 * k, 4);
        std::memcpy(y, tiles[b].data[k] + 4 * n, 4);
        std::memcpy(&sum, tiles[c].data[m] + 4 * n, 4);
        sum += widened(x[0]) * widened(y[0]);
        sum += widened(x[1]) * widened(y[1]);
        std::memcpy(tiles[c].data[m] + 4 * n, &sum, 4);
      }
}

}  // namespace emulator

#define _tile_loadconfig(at) emulator::configure(at)
#define _tile_release() static_cast<void>(0)
#define _tile_loadd(t, base, stride) emulator::load(t, base, stride)
#define _tile_stored(t, base, stride) emulator::store(t, base, stride)
#define _tile_zero(t) emulator::zero(t)
#define _tile_dpbf16ps(c, a, b) emulator::product(c, a, b)
