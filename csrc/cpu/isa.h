// Run-time choice of the instruction set, with no -march=native in what is shipped.
//
// A file csrc/cpu/<op>_kernel.cpp is compiled once per instruction set (CMakeLists.txt), each time
// with FF_ISA set to the namespace its functions belong in: ff::baseline, ff::avx2, ff::avx512.
// It declares what it exports in csrc/cpu/<op>_kernel.h through FF_ISA_DECLARE, and the ordinary
// file csrc/cpu/<op>.cpp calls it through FF_ISA_CALL. The two levels above differ only in how they
// multiply 16-bit matrices: a file csrc/cpu/<op>_bf16.cpp is compiled once, for AVX-512 BF16, and
// may be called only where bf16_dot() is true; <op>_amx.cpp likewise, where amx_bf16() is.
//
// In a kernel file every function must be `static`, in an anonymous namespace or in namespace
// ff::FF_ISA, and anything from a header must inline (FF_HD does, std::vector does not): an
// out-of-line inline function is one weak symbol, and the linker may keep the AVX-512 copy of it
// for the baseline. tests/build checks the objects for weak symbols.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace ff {

// Each level has what those before it have. avx2: FMA and F16C too; avx512: F, BW, DQ and VL.
enum class Isa { baseline, avx2, avx512, avx512bf16, amx };

// The level in use.
Isa isa();
const char* isa_name();
// The levels that were compiled in and that this processor has.
std::vector<std::string> isas();
// Uses level `name` from now on; ff::Error if it was not compiled or this processor lacks it. "auto"
// is what the environment variable FFENGINE_ISA names, or else the best one.
void set_isa(const std::string& name);
// Products of pairs of bf16 (vdpbf16ps).
inline bool bf16_dot() { return isa() >= Isa::avx512bf16; }
// bf16 tiles, there and allowed by the operating system.
inline bool amx_bf16() { return isa() == Isa::amx; }

// Bytes of a core's second-level cache, 1 MiB where the system does not tell.
int64_t l2_bytes();

// Threads of a kernel's parallel region; 0 sets it back to OpenMP's own default.
int num_threads();
void set_num_threads(int n);

}  // namespace ff

#define FF_ISA_DECLARE(...)               \
  namespace ff::baseline { __VA_ARGS__; } \
  namespace ff::avx2 { __VA_ARGS__; }     \
  namespace ff::avx512 { __VA_ARGS__; }

#if defined(FF_HAS_AVX512)
#define FF_IF_AVX512(call) \
  if (::ff::isa() >= ::ff::Isa::avx512) { ::ff::avx512::call; } else
#else
#define FF_IF_AVX512(call)
#endif
#if defined(FF_HAS_AVX2)
#define FF_IF_AVX2(call) \
  if (::ff::isa() >= ::ff::Isa::avx2) { ::ff::avx2::call; } else
#else
#define FF_IF_AVX2(call)
#endif
#define FF_ISA_CALL(call) \
  { FF_IF_AVX512(call) FF_IF_AVX2(call) { ::ff::baseline::call; } }
