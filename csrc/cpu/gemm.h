// The GEMM behind weight_update: dW (O x taps C) = da^T (O x K) times x (K x taps C), K = pixels.
//
// x is packed once into panels of 16 channels over a zero-padded grid of positions in which a
// kernel tap is a fixed offset, so no tap needs a copy of its own ("shift"); where the padding
// would cost more than nine copies do ("compact", AMX on small maps), every tap has one. Output
// rows o are blocked; a block's accumulators [tap][panel][row][16] stay in L2 over all of K.
//
// Three units multiply. fma: fp32, 16-bit numbers widened. dot: pairs of bf16 pixels (vdpbf16ps).
// amx: tiles of 32 bf16 pixels. In dot and amx a packed word holds two pixels side by side.
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

// A build without a unit has none of its functions: what calls them asks first.
#if defined(FF_HAS_AVX512BF16)
constexpr bool kHasDot = true;
#else
constexpr bool kHasDot = false;
#endif
#if defined(FF_HAS_AMX)
constexpr bool kHasAmx = true;
#else
constexpr bool kHasAmx = false;
#endif

constexpr int kPanel = 16;       // channels a panel
constexpr int kAmxStep = 32;     // pixels an AMX instruction reduces
constexpr int kAmxRows = 32;     // most output rows of a block: two tiles
// Pixels between accumulator load and store: da's tiles (16 KB) and two panels of x share L1.
// ResNet-17, batch 32, one thread, with AdamW: 256: 157 ms, 512: 169 ms.
constexpr int kAmxChunk = 256;

// One AMX pass: rows x (taps x panels), over `steps` <= 8 blocks of 32 pixels.
struct AmxPass {
  const uint16_t* a;        // packed da: [row tile][steps][16][32]
  const uint32_t* b;        // packed x of panel 0 at the pass's first position
  const int64_t* tap_offset;  // words from b to each tap's first pixel pair
  int64_t panel_stride, steps;
  int64_t taps, panels, rows;
  float* acc;               // [tap][panel][row][16]
  bool first;               // start from zero
};

// One pass of fma or dot: a word is a float, or a pair of bf16; a step is a pixel, or a pair.
struct StepPass {
  const uint32_t* a;          // packed da: [step][row]
  const uint32_t* b;          // packed x of panel 0
  const int32_t* step_offset;  // words from b to each step
  const int64_t* tap_offset;  // words from there to each tap's copy and shift
  int64_t panel_stride, steps;
  int64_t taps, panels, rows;
  float* acc;                 // [tap][panel][row][16], added to
};

// AVX-512 BF16. Positions [t0, t1) of channels [c0, c0 + count) as pairs (t, t + 1), t = t0, t0 + 2,
// ...: dst[panel][pair][16][2].
void pairs_pack_x(const PixelSource& s, int64_t c0, int64_t count, int64_t t0, int64_t t1,
                  int64_t panel_stride, uint16_t* dst);
// The same of da, whose rows follow each other: dst[pair][rows][2], and up to 15 rows past the end.
void dot_pack_da(const PixelSource& s, int64_t c0, int64_t rows, int64_t t0, int64_t t1,
                 uint32_t* dst);
void dot_multiply(const StepPass& pass);
constexpr int kDotRows = 28;     // most output rows of a block

void amx_configure(int64_t rows);
void amx_release();
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
    void fma_multiply(const StepPass& pass))
