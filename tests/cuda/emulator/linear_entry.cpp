// The emulated kernels of linear_step behind C functions: the arguments of csrc/bindings.cpp.
#include "linear_step.cu.cpp"

extern "C" void emulate_prepare(const void* x, const void* from, void* a, const float* bias,
                                float* scale, const int64_t* shape, int dtype, int rms,
                                double eps) {
  ff::LinearStepParams p{};
  p.x = x, p.from = from, p.a = a, p.bias = bias, p.scale = scale;
  p.N = shape[0], p.in = shape[1], p.out = shape[2];
  p.dtype = ff::DType(dtype), p.rms = rms, p.eps = float(eps);
  ff::linear_prepare_cuda(p, nullptr);
}

extern "C" void emulate_finish(void* da, float* scale, float* sums, const int64_t* shape,
                               int dtype, int64_t chunk) {
  ff::LinearStepParams p{};
  p.a = da, p.scale = scale, p.sums = sums;
  p.N = shape[0], p.out = shape[1], p.chunk = chunk;
  p.dtype = ff::DType(dtype);
  ff::linear_finish_cuda(p, nullptr);
}
