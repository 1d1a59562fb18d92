// FF_HD marks the functions that the C++ and the CUDA kernels share. On the CPU they must inline:
// kernels are compiled once per instruction set, and an out-of-line copy would be one weak symbol
// for all of them (csrc/cpu/isa.h).
#pragma once
#if defined(__CUDACC__)
#define FF_HD __host__ __device__ __forceinline__
#else
#define FF_HD inline __attribute__((always_inline))
#endif
