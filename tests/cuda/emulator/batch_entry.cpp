// The emulated kernels of batch_pass behind a C function: csrc/bindings.cpp's arguments as flat
// arrays, `t` in the order of ffengine.ops.batch_call.BatchPassTensors.
#include "batch_pass.cu.cpp"
#include "entry.h"

extern "C" int emulate_batch_pass(void** t, const int64_t* i) {
  ff::BatchPassParams p{};
  p.a = t[0], p.y = static_cast<int64_t*>(t[1]), p.gamma = static_cast<float*>(t[2]);
  p.table = static_cast<float*>(t[3]), p.weight = static_cast<float*>(t[4]);
  p.moments = static_cast<float*>(t[5]), p.extrema = static_cast<float*>(t[6]);
  p.z = t[7], p.da = t[8];
  p.N = i[0], p.C = i[1], p.H = i[2], p.W = i[3];
  p.dtype = ff::DType(i[4]), p.phase = ff::BatchPhase(i[5]);
  p.channels_last = i[6], p.pool = i[7], p.norm_first = i[8], p.squares = i[9];
  p.straight_through = i[10];
  return emulator::guarded([&] { ff::batch_pass_cuda(p, nullptr); });
}
