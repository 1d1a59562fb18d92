// The emulated kernels of batch_pass behind a C function: csrc/bindings.cpp's arguments as flat
// arrays, `t` in the order of ffengine.ops.params.BatchPassTensors.
#include "batch_middle.cu.cpp"
#include "batch_pass.cu.cpp"
#include "entry.h"

static ff::BatchPassParams batch_params(void* const* t, const int64_t* i) {
  ff::BatchPassParams p{};
  p.a = t[0], p.y = static_cast<int64_t*>(t[1]), p.gamma = static_cast<float*>(t[2]);
  p.table = static_cast<float*>(t[3]), p.weight = static_cast<float*>(t[4]);
  p.moments = static_cast<float*>(t[5]), p.extrema = static_cast<float*>(t[6]);
  p.z = t[7], p.da = t[8];
  p.N = i[0], p.C = i[1], p.H = i[2], p.W = i[3];
  p.dtype = ff::DType(i[4]), p.phase = ff::BatchPhase(i[5]);
  p.channels_last = i[6], p.pool = i[7], p.norm_first = i[8], p.squares = i[9];
  p.straight_through = i[10];
  return p;
}

extern "C" int emulate_batch_pass(void* const* t, const int64_t* i, const int64_t* device) {
  return emulator::guarded([&] {
    emulator::use_device(device);
    ff::batch_pass_cuda(batch_params(t, i), nullptr);
  });
}

// ints: after those of a sweep groups, equal_groups, goodness, loss,
// training, use_running, pixels, pixels_z; reals: momentum, eps, p0, p1, p2, scale, da_scale.
extern "C" int emulate_batch_middle(void* const* t, const int64_t* i, const double* f) {
  const auto floats = [t](int at) { return static_cast<float*>(t[at]); };
  ff::BatchMiddleParams m{};
  m.pivot = floats(9), m.beta = floats(10);
  m.running_mean = floats(11), m.running_var = floats(12);
  m.offsets = static_cast<int64_t*>(t[13]);
  m.g = floats(14), m.loss = floats(15), m.coef = floats(16);
  m.dgamma = floats(17), m.dbeta = floats(18), m.work = static_cast<double*>(t[19]);
  m.K = i[11], m.equal_groups = i[12], m.goodness = ff::Goodness(i[13]);
  m.loss_params.kind = ff::Loss(i[14]);
  m.training = i[15], m.use_running = i[16], m.pixels = i[17], m.pixels_z = i[18];
  m.momentum = f[0], m.eps = f[1];
  m.loss_params.p0 = float(f[2]), m.loss_params.p1 = float(f[3]), m.loss_params.p2 = float(f[4]);
  m.loss_params.scale = float(f[5]), m.da_scale = float(f[6]);
  return emulator::guarded([&] { ff::batch_middle_cuda(batch_params(t, i), m, nullptr); });
}
