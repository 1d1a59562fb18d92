// FF_HD marks the functions that the C++ and the CUDA kernels share.
#pragma once
#if defined(__CUDACC__)
#define FF_HD __host__ __device__ __forceinline__
#else
#define FF_HD inline
#endif
