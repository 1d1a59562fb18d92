// The emulated kernels behind C functions: csrc/bindings.cpp's arguments as flat arrays.
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

// Runs the call as on a device of this capability (or, with `dry`, only plans it); returns the
// blocks of a cluster, 0 for two sweeps. `t` in the order of ffengine.ops.local_pass.LocalPassTensors.
extern "C" int emulate(void** t, const int64_t* numbers, const double* reals, int major, int shared,
                       int dry) {
  ff::LocalPassParams p{};
  fill_numbers(p, numbers, reals);
  p.a = t[0], p.y = static_cast<int64_t*>(t[1]), p.g0 = static_cast<float*>(t[2]), p.h_prev = t[3];
  p.shortcut = t[4], p.offsets = static_cast<int64_t*>(t[5]), p.z = t[6];
  p.g = static_cast<float*>(t[7]), p.loss = static_cast<float*>(t[8]);
  p.coef = static_cast<float*>(t[9]), p.da = t[10], p.stats = static_cast<float*>(t[11]);
  p.dropout.clock = static_cast<uint32_t*>(t[12]);
  const ff::DeviceCaps caps{major == 9 || major == 10, 4, 1 << 20, shared};
  const ff::ClusterPlan plan = ff::use_cluster(p, caps);
  if (dry) return plan.blocks;
  if (plan.blocks > 0) {
    ff::local_pass_cluster(p, plan, nullptr);
    return plan.blocks;
  }
  ff::local_pass_two_sweeps(p, caps, nullptr);
  return 0;
}
