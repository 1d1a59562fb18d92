// The GEMM behind weight_update: dW (O x taps C) = da^T (O x K) times x (K x taps C), K = pixels.
//
// x is packed once into panels of 16 channels over a zero-padded grid of positions in which a
// kernel tap is a fixed offset, so no tap needs a copy of its own ("shift"); where the padding
// would cost more than nine copies do ("compact", AMX on small maps), every tap has one. Output
// rows o are blocked; a block's accumulators [tap][panel][row][16] stay in L2 over all of K.
#pragma once
#include <cstdint>

#include "../params.h"
#include "isa.h"

namespace ff {

// Pixels of one tensor in the order the reduction runs over them.
struct PixelSource {
  const void* data;      // first sample of the chunk
  DType dtype;
  bool channels_last;
  int64_t channels;      // of the tensor
  int64_t pixels;        // per sample
  const int32_t* index;  // pixel at each grid position of a sample, -1 = zero; null: position
  int64_t positions;     // grid positions per sample
  int64_t samples;
};

constexpr int kPanel = 16;       // channels a panel
constexpr int kAmxStep = 32;     // pixels an AMX instruction reduces
constexpr int kAmxRows = 32;     // most output rows of a block: two tiles
// Pixels between accumulator load and store: da's tiles (16 KB) and two panels of x share L1.
// ResNet-17, batch 32, one thread, with AdamW: 256: 157 ms, 512: 169 ms.
constexpr int kAmxChunk = 256;
constexpr int64_t kFmaChunk = 128;  // about as many pixels an FMA pass: x and da stay in L1

// One AMX pass: rows x (taps x panels), over `steps` <= 8 blocks of 32 pixels.
struct AmxPass {
  const uint16_t* a;        // packed da: [row tile][steps][16][32]
  const uint16_t* b;        // packed x of panel 0 at the pass's first position
  const int64_t* tap_offset;  // elements from b to each tap's first pixel pair
  int64_t panel_stride, steps;
  int64_t taps, panels, rows;
  float* acc;               // [tap][panel][row][16]
  bool first;               // start from zero
};

// One FMA pass over pixel rows of one length.
struct FmaPass {
  const float* a;           // packed da: [pixel][rows]
  const float* b;           // packed x of panel 0
  const int64_t* tap_offset;  // elements from b to each tap's copy and shift
  const int64_t* row_offset;  // elements from there to each pixel row
  int64_t panel_stride, pixel_rows, length;
  int64_t taps, panels, rows;
  float* acc;               // [tap][panel][row][16], added to
};

void amx_configure(int64_t rows);
void amx_release();
// Positions [t0, t1) of channels [c0, c0 + count) as pairs (t, t + 1), t = t0, t0 + 2, ...:
// dst[panel][pair][16][2].
void amx_pack_x(const PixelSource& s, int64_t c0, int64_t count, int64_t t0, int64_t t1,
                int64_t panel_stride, uint16_t* dst);
// Positions [t0, t0 + 32 steps) of channels [c0, c0 + rows): dst[row tile][steps][16][32].
void amx_pack_da(const PixelSource& s, int64_t c0, int64_t rows, int64_t t0, int64_t steps,
                 uint16_t* dst);
void amx_multiply(const AmxPass& pass);

}  // namespace ff

// fma_rows: most output rows of a block. fma_pack_x: dst[panel][t][16]; fma_pack_da: dst[t][rows].
FF_ISA_DECLARE(
    void fma_rows(int64_t* rows);
    void fma_pack_x(const PixelSource& s, int64_t c0, int64_t count, int64_t t0, int64_t t1,
                    int64_t panel_stride, float* dst);
    void fma_pack_da(const PixelSource& s, int64_t c0, int64_t rows, int64_t t0, int64_t t1,
                     float* dst);
    void fma_multiply(const FmaPass& pass))
