// The optimizer step on weights and states of fewer bits (csrc/common/state_formats.h): each is read
// once, decoded, stepped in fp32, encoded and written once.
//
// A warp owns the kStateBlock elements that share a scale. Its lanes take four elements here and
// four 128 further on: a Philox counter each, 16 bytes of fp32 at once, and what a warp reads or
// writes at once is a run of whole 128-byte lines in every format (512, 256 or 128 bytes). Sixteen
// codes a lane would be 16 bytes too, but leave holes of 48 bytes between the lanes' fp32.
#include <type_traits>

#include "../common/philox.h"
#include "../common/state_formats.h"
#include "../ops.h"
#include "chunk.cuh"
#include "optimizer.cuh"
#include "runtime.h"

namespace ff {
namespace {

constexpr int kQuads = int(kStateBlock) / (32 * 4), kOwn = 4 * kQuads;

// A lane's elements: first + 128 q + j for quads q and j below four.
struct Place {
  int64_t block, first, n;
};

// kWhole: the block's quads are all there and aligned. Two copies of the step, because the compiler
// splits vectors into elements beside a branch that stores elements.

template <class T, bool kWhole>
struct Own {
  Pack<T, 4> quad[kQuads];

  __device__ __forceinline__ T& operator[](int i) { return quad[i / 4].v[i % 4]; }

  // Elements at n and beyond are 0.
  __device__ __forceinline__ void load(const T* from, const Place& at) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int64_t i = at.first + 128 * q;
      if constexpr (kWhole) quad[q] = *reinterpret_cast<const Pack<T, 4>*>(from + i);
      else
        for (int j = 0; j < 4; ++j) quad[q].v[j] = i + j < at.n ? from[i + j] : T{};
    }
  }

  __device__ __forceinline__ void store(T* to, const Place& at) const {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int64_t i = at.first + 128 * q;
      if constexpr (kWhole) *reinterpret_cast<Pack<T, 4>*>(to + i) = quad[q];
      else
        for (int j = 0; j < 4; ++j)
          if (i + j < at.n) to[i + j] = quad[q].v[j];
    }
  }
};

// Words of a lane's elements.
struct Words {
  uint32_t of[kOwn];

  __device__ __forceinline__ Words(const CompressedStepParams& p, uint32_t stream,
                                   const Place& at) {
    const float* row = p.optim.row;
    const uint32_t step = row != nullptr ? __float_as_uint(row[7]) : uint32_t(p.optim.step);
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      philox4x32(p.seed, uint64_t(at.first + 128 * q) / 4, stream, step, of + 4 * q);
  }
};

// How numbers lie in memory: fp32, bf16 or codes, kSigned or not. The low halves of the words round
// what is signed, the high halves what is not.
template <StateFormat F, bool kSigned, bool kWhole>
struct Stored {
  using T = std::conditional_t<F == StateFormat::f32, float,
                               std::conditional_t<F == StateFormat::bf16, uint16_t, uint8_t>>;
  Own<T, kWhole> raw;
  float scale = 1.f;

  __device__ __forceinline__ void load(const void* from, const float* scales, const Place& at) {
    raw.load(static_cast<const T*>(from), at);
    if (F == StateFormat::bits8) scale = scales[at.block];
  }

  // No fused multiply-add: the product is the state.
  __device__ __forceinline__ float operator[](int i) {
    if constexpr (F == StateFormat::f32) return raw[i];
    else if constexpr (F == StateFormat::bf16) return __uint_as_float(uint32_t(raw[i]) << 16);
    else
      return __fmul_rn(
          __uint_as_float(kSigned ? decode_signed(raw[i]) : decode_unsigned(raw[i])), scale);
  }

  __device__ __forceinline__ void store(void* to, float* scales, const Place& at, const float* x,
                                        const uint32_t* words) {
    uint32_t most = 0;
    if constexpr (F == StateFormat::bits8) {
      most = largest(x);
      if (threadIdx.x % 32 == 0) scales[at.block] = __uint_as_float(most);
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if constexpr (F == StateFormat::f32) raw[i] = x[i];
      else {
        const uint32_t random = kSigned ? words[i] & 0xffffu : words[i] >> 16;
        if constexpr (F == StateFormat::bf16)
          raw[i] = T(encode_bf16(__float_as_uint(x[i]), random));
        else raw[i] = T(code(x[i], most, random));
      }
    }
    raw.store(static_cast<T*>(to), at);
  }

 private:
  // Bits of the block's largest magnitude, in which a NaN wins.
  static __device__ __forceinline__ uint32_t largest(const float* x) {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) most = max(most, __float_as_uint(x[i]) & 0x7fffffffu);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2)
      most = max(most, __shfl_xor_sync(~0u, most, mask));
    return most;
  }

  static __device__ __forceinline__ uint32_t code(float x, uint32_t most, uint32_t random) {
    const bool usable = most > 0 && most < 0x7f800000u;
    const uint32_t bits = __float_as_uint(x);
    const uint32_t y =
        __float_as_uint(__fdiv_rn(fabsf(x), usable ? __uint_as_float(most) : 1.f));
    const uint32_t code = kSigned ? encode_signed(y, bits, random) : encode_unsigned(y, bits, random);
    return usable ? code : 0;
  }
};

template <class T, bool kWhole>
__device__ __forceinline__ void load_numbers(const void* from, const Place& at, float* x) {
  Own<T, kWhole> raw;
  raw.load(static_cast<const T*>(from), at);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) x[i] = to_float(raw[i]);
}
template <bool kWhole>
__device__ __forceinline__ void load_gradient(const CompressedStepParams& p, const Place& at,
                                              float* x) {
  switch (p.grad_dtype) {
    case DType::f32: return load_numbers<float, kWhole>(p.grad, at, x);
    case DType::bf16: return load_numbers<__nv_bfloat16, kWhole>(p.grad, at, x);
    case DType::f16: return load_numbers<__half, kWhole>(p.grad, at, x);
  }
}

template <class T, bool kWhole>
__device__ __forceinline__ void store_numbers(void* to, const Place& at, const float* x) {
  Own<T, kWhole> out;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) out[i] = from_float<T>(x[i]);
  out.store(static_cast<T*>(to), at);
}

template <StateFormat F, StateFormat W, bool kWhole>
__device__ __forceinline__ void step_block(const CompressedStepParams& p,
                                           const StepCoefficients& given, const Place& at) {
  float g[kOwn];
  Stored<W, true, kWhole> weight;
  Stored<F, true, kWhole> first;
  Stored<F, false, kWhole> second;
  load_gradient<kWhole>(p, at, g);
  const StepCoefficients k = coefficients_of(given, p.optim.row);
  weight.load(p.weight, nullptr, at);
  if (p.m != nullptr) first.load(p.m, p.m_scale, at);
  if (p.v != nullptr) second.load(p.v, p.v_scale, at);
  float w[kOwn], m[kOwn] = {}, v[kOwn] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    w[i] = weight[i];
    if (p.m != nullptr) m[i] = first[i];
    if (p.v != nullptr) v[i] = second[i];
    step_weight(k, g[i] * p.inv_scale, w[i], m[i], v[i]);
  }
  if (p.m != nullptr) {
    const Words words(p, p.stream, at);  // dead, and gone, where fp32 states take none
    first.store(p.m, p.m_scale, at, m, words.of);
    if (p.v != nullptr) second.store(p.v, p.v_scale, at, v, words.of);
  }
  if constexpr (W == StateFormat::f32) {
    weight.store(p.weight, nullptr, at, w, nullptr);
    if (p.half == nullptr) return;
    if (p.half_dtype == DType::bf16) store_numbers<__nv_bfloat16, kWhole>(p.half, at, w);
    else store_numbers<__half, kWhole>(p.half, at, w);
  } else weight.store(p.weight, nullptr, at, w, Words(p, p.stream ^ kWeightStream, at).of);
}

template <StateFormat F, StateFormat W>
__global__ void __launch_bounds__(kThreads)
    compressed_step(const __grid_constant__ CompressedStepParams p,
                    const __grid_constant__ StepCoefficients k, bool aligned) {
  const int64_t block = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64_t start = block * kStateBlock;
  if (start >= p.n) return;
  const Place at{block, start + threadIdx.x % 32 * 4, p.n};
  if (aligned && start + kStateBlock <= p.n) step_block<F, W, true>(p, k, at);
  else step_block<F, W, false>(p, k, at);
}

template <StateFormat F>
void launch(const CompressedStepParams& p, const StepCoefficients& k, bool aligned,
            cudaStream_t stream) {
  constexpr int64_t each = kThreads / 32 * kStateBlock;
  const unsigned blocks = blocks_for(p.n, each);
  constexpr StateFormat f32 = StateFormat::f32, bf16 = StateFormat::bf16;
  if (p.bf16_weight) compressed_step<F, bf16><<<blocks, kThreads, 0, stream>>>(p, k, aligned);
  else compressed_step<F, f32><<<blocks, kThreads, 0, stream>>>(p, k, aligned);
  FF_CUDA(cudaGetLastError());
}

// Does every tensor begin on a quad of its own elements?
bool quads_aligned(const CompressedStepParams& p) {
  const int state = p.format == StateFormat::f32 ? 16 : p.format == StateFormat::bf16 ? 8 : 4;
  const auto off = [](const void* t, int bytes) { return reinterpret_cast<uintptr_t>(t) % bytes; };
  return off(p.grad, 4 * item_size(p.grad_dtype)) + off(p.half, 4 * item_size(p.half_dtype)) +
             off(p.weight, p.bf16_weight ? 8 : 16) + off(p.m, state) + off(p.v, state) == 0;
}

}  // namespace

void compressed_step_cuda(const CompressedStepParams& p, void* stream) {
  if (p.n == 0) return;
  FF_CHECK(p.optim.kind == Optim::sgd || (p.m != nullptr && p.v != nullptr),
           "[optimizer] adam and adamw expected states m and v, got none");
  FF_CHECK(p.half == nullptr || !p.bf16_weight,
           "[optimizer] a 16-bit copy expected an fp32 weight, got bf16");
  const DeviceOf current(p.weight);
  const auto queue = static_cast<cudaStream_t>(stream);
  const StepCoefficients k = step_coefficients(p.optim, p.m != nullptr);
  const bool aligned = quads_aligned(p);
  switch (p.format) {
    case StateFormat::f32: return launch<StateFormat::f32>(p, k, aligned, queue);
    case StateFormat::bf16: return launch<StateFormat::bf16>(p, k, aligned, queue);
    default: return launch<StateFormat::bits8>(p, k, aligned, queue);
  }
}

}  // namespace ff
