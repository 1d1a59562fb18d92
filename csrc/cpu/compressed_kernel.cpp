// A step on rounded weights or states: block by block into fp32 buffers that stay in the first-level
// cache, the same loops as ever (optimizer_run), and back. The buffers also keep the compiler from
// contracting a decoding product into the step, so the numbers are the reference's.
#include "../common/state_formats.h"
#include "convert.h"
#include "optimizer_kernel.h"
#include "philox_lanes.h"

namespace ff::FF_ISA {
namespace {

constexpr int kBlock = int(kStateBlock);
static_assert(kBlock / 4 % kPhiloxStep == 0, "the words of a block are whole calls");

void block_words(const CompressedStepParams& p, uint32_t stream, int64_t first, uint32_t* words) {
  DropoutParams d{};
  d.seed = p.seed;
  d.layer = stream;
  d.step = uint32_t(p.optim.step);
  philox_run(d, uint64_t(first) / 4, kBlock / 4, words);
}

void decode_bf16(const uint16_t* __restrict from, int n, float* __restrict x) {
  for (int i = 0; i < n; ++i) x[i] = float_of(uint32_t(from[i]) << 16);
}

template <int kShift>
void rounded_bf16(const float* __restrict x, const uint32_t* __restrict words, int n,
                  uint16_t* __restrict to) {
  for (int i = 0; i < n; ++i)
    to[i] = uint16_t(encode_bf16(bits_of(x[i]), (words[i] >> kShift) & 0xffffu));
}

template <bool kSigned>
void decode_codes(const uint8_t* __restrict codes, float scale, int n, float* __restrict x) {
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = kSigned ? decode_signed(codes[i]) : decode_unsigned(codes[i]);
    x[i] = float_of(bits) * scale;
  }
}

// The largest magnitude; as integers NaN is above infinity, and that above all else.
float block_scale(const float* __restrict x, int n) {
  int32_t most = 0;
  for (int i = 0; i < n; ++i) {
    const int32_t rest = int32_t(bits_of(x[i]) & 0x7fffffffu);
    most = rest > most ? rest : most;
  }
  return float_of(uint32_t(most));
}

template <bool kSigned>
void encode_codes(const float* __restrict x, const uint32_t* __restrict words, int n, float scale,
                  uint8_t* __restrict codes) {
  const bool usable = scale > 0.f && bits_of(scale) < 0x7f800000u;
  if (!usable) {
    for (int i = 0; i < n; ++i) codes[i] = 0;
    return;
  }
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(x[i]);
    const uint32_t y = bits_of(float_of(bits & 0x7fffffffu) / scale);
    codes[i] = uint8_t(kSigned ? encode_signed(y, bits, words[i] & 0xffffu)
                               : encode_unsigned(y, bits, words[i] >> 16));
  }
}

// One state of a block: m (signed, low halves of the words) or v.
template <bool kSigned>
struct State {
  StateFormat format;
  void* stored;
  float* scale;

  FF_HD float* in_place(int64_t i) const { return static_cast<float*>(stored) + i; }
  FF_HD uint16_t* halves(int64_t i) const { return static_cast<uint16_t*>(stored) + i; }
  FF_HD uint8_t* codes(int64_t i) const { return static_cast<uint8_t*>(stored) + i; }

  // Where the step finds and leaves its fp32 form.
  FF_HD float* open(int64_t i, int n, float* buffer) const {
    if (stored == nullptr) return nullptr;
    if (format == StateFormat::f32) return in_place(i);
    if (format == StateFormat::bf16) decode_bf16(halves(i), n, buffer);
    else decode_codes<kSigned>(codes(i), scale[i / kBlock], n, buffer);
    return buffer;
  }
  FF_HD void close(int64_t i, int n, const float* x, const uint32_t* words) const {
    if (stored == nullptr || format == StateFormat::f32) return;
    if (format == StateFormat::bf16) {
      rounded_bf16<kSigned ? 0 : 16>(x, words, n, halves(i));
      return;
    }
    const float most = scale[i / kBlock] = block_scale(x, n);
    encode_codes<kSigned>(x, words, n, most, codes(i));
  }
};

}  // namespace

void compressed_run(const CompressedStepParams& p, const StepCoefficients& k, int64_t first,
                    int64_t count) {
  alignas(64) float weights[kBlock], ms[kBlock], vs[kBlock];
  alignas(64) uint32_t words[kBlock];
  const State<true> first_moment{p.format, p.m, p.m_scale};
  const State<false> second_moment{p.format, p.v, p.v_scale};
  for (int64_t i = first; i < first + count; i += kBlock) {
    const int n = int(first + count - i < kBlock ? first + count - i : kBlock);
    float* m = first_moment.open(i, n, ms);
    float* v = second_moment.open(i, n, vs);
    uint16_t* halves = static_cast<uint16_t*>(p.weight) + i;
    float* w = p.bf16_weight ? weights : static_cast<float*>(p.weight) + i;
    if (p.bf16_weight) decode_bf16(halves, n, weights);
    optimizer_run(k, n, static_cast<const float*>(p.grad) + i, p.inv_scale, w, m, v);
    if (m != nullptr && p.format != StateFormat::f32) {
      block_words(p, p.stream, i, words);
      first_moment.close(i, n, m, words);
      second_moment.close(i, n, v, words);
    }
    if (p.bf16_weight) {
      block_words(p, p.stream ^ kWeightStream, i, words);
      rounded_bf16<0>(weights, words, n, halves);
    }
  }
}

}  // namespace ff::FF_ISA
