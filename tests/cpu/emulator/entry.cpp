// weight_update_cpu behind a C function, on a processor that says it has AMX.
#include "../../../csrc/cpu/isa.h"
#include "../../../csrc/ops.h"

namespace ff {

Isa isa() { return Isa::amx; }
int num_threads() { return 1; }
int64_t l2_bytes() { return 1 << 21; }

}  // namespace ff

// shape: N, C, H, W, O, P, Q, kH, kW, stride, pad; then x, da, weight in channels_last. Adds the
// gradient to `grad`.
extern "C" void emulate_gradient(const void* x, const void* da, float* grad,
                                 const int64_t* shape) {
  ff::WeightUpdateParams p{};
  p.x = x, p.da = da, p.grad = grad;
  int64_t* const sizes[] = {&p.N, &p.C, &p.H, &p.W, &p.O, &p.P, &p.Q, &p.kH, &p.kW, &p.stride,
                            &p.pad};
  for (int i = 0; i < 11; ++i) *sizes[i] = shape[i];
  p.dtype = ff::DType::bf16;
  p.x_channels_last = shape[11], p.da_channels_last = shape[12];
  p.weight_channels_last = shape[13];
  p.accumulate = true, p.inv_scale = 1.f;
  ff::weight_update_cpu(p);
}
