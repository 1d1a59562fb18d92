// Run-time choice of the instruction set, with no -march=native in what is shipped.
//
// A file csrc/cpu/<op>_kernel.cpp is compiled once per instruction set (CMakeLists.txt), each time
// with FF_ISA set to the namespace its functions belong in: ff::baseline, ff::avx2, ff::avx512.
// It declares what it exports in csrc/cpu/<op>_kernel.h through FF_ISA_DECLARE, and the ordinary
// file csrc/cpu/<op>.cpp calls it through FF_ISA_CALL. A file csrc/cpu/<op>_amx.cpp is compiled
// once, with AVX-512 and AMX flags, and may be called only where amx_bf16() is true.
//
// In a kernel file every function must be `static`, in an anonymous namespace or in namespace
// ff::FF_ISA, and anything from a header must inline (FF_HD does, std::vector does not): an
// out-of-line inline function is one weak symbol, and the linker may keep the AVX-512 copy of it
// for the baseline. tests/build checks the objects for weak symbols.
#pragma once
#include <string>

namespace ff {

enum class Isa { baseline, avx2, avx512 };

// The instruction set in use: the best one that was compiled in and that this processor has.
// avx2 includes FMA and F16C; avx512 is F, BW, DQ, VL and BF16.
Isa isa();
const char* isa_name();
// Uses `name` from now on; ff::Error if it is not available. "auto" goes back to the best one.
void set_isa(const std::string& name);
// AMX bf16 tiles are there, allowed by the operating system, and isa() is avx512.
bool amx_bf16();

// Threads of a kernel's parallel region; 0 sets it back to OpenMP's own default.
int num_threads();
void set_num_threads(int n);

}  // namespace ff

#define FF_ISA_DECLARE(...)               \
  namespace ff::baseline { __VA_ARGS__; } \
  namespace ff::avx2 { __VA_ARGS__; }     \
  namespace ff::avx512 { __VA_ARGS__; }

#if defined(FF_HAS_AVX512)
#define FF_CASE_AVX512(call) case ::ff::Isa::avx512: ::ff::avx512::call; break;
#else
#define FF_CASE_AVX512(call)
#endif
#if defined(FF_HAS_AVX2)
#define FF_CASE_AVX2(call) case ::ff::Isa::avx2: ::ff::avx2::call; break;
#else
#define FF_CASE_AVX2(call)
#endif
#define FF_ISA_CALL(call)               \
  switch (::ff::isa()) {                \
    FF_CASE_AVX512(call)                \
    FF_CASE_AVX2(call)                  \
    default: ::ff::baseline::call;      \
  }
