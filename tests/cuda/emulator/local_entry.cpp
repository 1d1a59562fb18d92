// The emulated kernels of local_pass behind a C function: csrc/bindings.cpp's arguments as flat arrays.
#include "entry.h"
#include "local_pass.cu.cpp"
#include "local_pass_cluster.cu.cpp"

namespace {

void fill_numbers(ff::LocalPassParams& p, const int64_t* i, const double* f) {
  p.N = i[0], p.C = i[1], p.H = i[2], p.W = i[3], p.K = i[4];
  p.channels_last = i[5], p.equal_groups = i[6];
  p.dtype = ff::DType(i[7]), p.phase = ff::Phase(i[8]);
  p.goodness = ff::Goodness(i[9]), p.norm = ff::NormKind(i[10]);
  p.norm_rms = i[11], p.norm_per_group = i[12], p.straight_through = i[13], p.pool = i[14];
  p.dropout.seed = uint64_t(i[15]), p.dropout.layer = uint32_t(i[16]);
  p.dropout.step = uint32_t(i[17]), p.dropout.threshold = uint32_t(i[18]);
  p.loss_params.kind = ff::Loss(i[19]);
  p.start = i[20], p.half = i[21], p.half_start = i[22], p.z_channels = i[23];
  p.norm_eps = float(f[0]), p.blend = float(f[1]), p.dropout.keep_scale = float(f[2]);
  p.loss_params.p0 = float(f[3]), p.loss_params.p1 = float(f[4]), p.loss_params.p2 = float(f[5]);
  p.loss_params.scale = float(f[6]), p.da_scale = float(f[7]);
}

}  // namespace

// -1 after an error. `t` in the order of ffengine.ops.params.LocalPassTensors; planned: blocks, vector,
// slab, tile_bytes, shared_bytes and read's width and lanes of ClusterPlan.
extern "C" int emulate_local_pass(void** t, const int64_t* numbers, const double* reals,
                                  const int64_t* device, int64_t* planned) {
  ff::LocalPassParams p{};
  fill_numbers(p, numbers, reals);
  p.a = t[0], p.y = static_cast<int64_t*>(t[1]), p.g0 = static_cast<float*>(t[2]), p.h_prev = t[3];
  p.shortcut = t[4], p.offsets = static_cast<int64_t*>(t[5]), p.z = t[6];
  p.g = static_cast<float*>(t[7]), p.loss = static_cast<float*>(t[8]);
  p.coef = static_cast<float*>(t[9]), p.da = t[10], p.stats = static_cast<float*>(t[11]);
  p.dropout.clock = static_cast<uint32_t*>(t[12]);
  return emulator::guarded([&] {
    emulator::use_device(device);
    const ff::ClusterPlan plan = ff::use_cluster(p, ff::device_caps(emulator::device.number));
    const int64_t all[] = {plan.blocks,       plan.vector, plan.slab, plan.tile_bytes,
                           plan.shared_bytes, plan.read.width, plan.read.lanes};
    std::copy(all, all + 7, planned);
    ff::local_pass_cuda(p, nullptr);
  });
}
