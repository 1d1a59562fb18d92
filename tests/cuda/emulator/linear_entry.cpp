// The emulated kernels of linear_step behind C functions: the arguments of csrc/bindings.cpp.
#include "entry.h"
#include "linear_step.cu.cpp"

// tensors: x, from, a, bias, scale; shape: N, in, out.
extern "C" int emulate_linear_prepare(void* const* tensors, const int64_t* shape, int dtype,
                                      int rms, double eps) {
  ff::LinearStepParams p{};
  p.x = tensors[0], p.from = tensors[1], p.a = tensors[2];
  p.bias = static_cast<float*>(tensors[3]), p.scale = static_cast<float*>(tensors[4]);
  p.N = shape[0], p.in = shape[1], p.out = shape[2];
  p.dtype = ff::DType(dtype), p.rms = rms, p.eps = float(eps);
  return emulator::guarded([&] { ff::linear_prepare_cuda(p, nullptr); });
}

// tensors: da, scale, sums; shape: N, out.
extern "C" int emulate_linear_finish(void* const* tensors, const int64_t* shape, int dtype,
                                     int64_t chunk) {
  ff::LinearStepParams p{};
  p.a = tensors[0], p.scale = static_cast<float*>(tensors[1]);
  p.sums = static_cast<float*>(tensors[2]);
  p.N = shape[0], p.out = shape[1], p.chunk = chunk;
  p.dtype = ff::DType(dtype);
  return emulator::guarded([&] { ff::linear_finish_cuda(p, nullptr); });
}
