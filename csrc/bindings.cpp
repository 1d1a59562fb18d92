// The one pybind11 module, ffengine._C. Pointers arrive as integers, settings as the frozen
// dataclasses of ffengine/ops; one function per op turns them into its params struct.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <unordered_map>

#include "check.h"
#include "cpu/isa.h"
#include "ops.h"

namespace py = pybind11;

namespace ff {
namespace {

using Address = std::uintptr_t;
using Shape4 = std::array<int64_t, 4>;
using ConvShape = std::array<int64_t, 11>;  // N, C, H, W, O, P, Q, kH, kW, stride, pad
using NoGil = py::gil_scoped_release;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// name: a literal, whose Python string is made once: local_pass's thirty then take 2.0 us a call, not
// 4.2.
template <class T>
T get(const py::object& object, const char* name) {
  static std::unordered_map<const char*, PyObject*> names;
  PyObject*& key = names[name];
  if (key == nullptr) key = PyUnicode_InternFromString(name);
  PyObject* value = PyObject_GetAttr(object.ptr(), key);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value).cast<T>();
}

DType dtype_of(int code) {
  FF_CHECK(code >= 0 && code <= 2, "[dtype] expected 0 (fp32), 1 (bf16) or 2 (fp16), got " << code);
  return DType(code);
}

void read_loss(LossParams& loss, const py::object& call) {
  loss.kind = Loss(get<int>(call, "loss"));
  loss.p0 = get<float>(call, "p0");
  loss.p1 = get<float>(call, "p1");
  loss.p2 = get<float>(call, "p2");
  loss.scale = get<float>(call, "scale");
}

void read_dropout(DropoutParams& dropout, const py::object& call) {
  dropout.seed = get<uint64_t>(call, "dropout_seed");
  dropout.layer = get<uint32_t>(call, "dropout_layer");
  dropout.step = get<uint32_t>(call, "dropout_step");
  dropout.threshold = get<uint32_t>(call, "dropout_threshold");
  dropout.keep_scale = get<float>(call, "keep_scale");
}

// Every number of ffengine.ops.local_pass.LocalPassCall; the tensors are the caller's to fill.
LocalPassParams local_pass_params(const Shape4& shape, int dtype, const py::object& call) {
  LocalPassParams p{};
  p.N = shape[0], p.C = shape[1], p.H = shape[2], p.W = shape[3];
  p.z_channels = get<int64_t>(call, "z_channels");
  p.K = get<int64_t>(call, "groups");
  p.channels_last = get<bool>(call, "channels_last");
  p.equal_groups = get<bool>(call, "equal_groups");
  p.dtype = dtype_of(dtype);
  p.phase = Phase(get<int>(call, "phase"));
  p.goodness = Goodness(get<int>(call, "goodness"));
  p.norm = NormKind(get<int>(call, "norm"));
  p.norm_rms = get<bool>(call, "norm_rms");
  p.norm_per_group = get<bool>(call, "norm_per_group");
  p.norm_eps = get<float>(call, "norm_eps");
  p.straight_through = get<bool>(call, "straight_through");
  p.pool = get<bool>(call, "pool");
  p.blend = get<float>(call, "blend");
  read_dropout(p.dropout, call);
  read_loss(p.loss_params, call);
  p.da_scale = get<float>(call, "da_scale");
  p.start = get<int64_t>(call, "start");
  p.half = get<int64_t>(call, "half");
  p.half_start = get<int64_t>(call, "half_start");
  return p;
}

// Adds the addresses, in the order of ffengine.ops.local_pass.LocalPassTensors.
template <class Launch>
void local_pass(const std::array<Address, 13>& t, const Shape4& shape, int dtype,
                const py::object& call, Launch launch) {
  LocalPassParams p = local_pass_params(shape, dtype, call);
  p.a = at<const void>(t[0]);
  p.y = at<const int64_t>(t[1]);
  p.g0 = at<const float>(t[2]);
  p.h_prev = at<const void>(t[3]);
  p.shortcut = at<const void>(t[4]);
  p.offsets = at<const int64_t>(t[5]);
  p.z = at<void>(t[6]);
  p.g = at<float>(t[7]);
  p.loss = at<float>(t[8]);
  p.coef = at<float>(t[9]);
  p.da = at<void>(t[10]);
  p.stats = at<float>(t[11]);
  p.dropout.clock = at<const uint32_t>(t[12]);
  NoGil released;
  launch(p);
}

// Pointers in the order of ffengine.ops.batch_call.BatchPassTensors.
BatchPassParams batch_pass_params(const std::array<Address, 9>& t, const Shape4& shape, int dtype,
                                  const py::object& call) {
  BatchPassParams p{};
  p.a = at<const void>(t[0]);
  p.y = at<const int64_t>(t[1]);
  p.gamma = at<const float>(t[2]);
  p.table = at<const float>(t[3]);
  p.weight = at<const float>(t[4]);
  p.moments = at<float>(t[5]);
  p.extrema = at<float>(t[6]);
  p.z = at<void>(t[7]);
  p.da = at<void>(t[8]);
  p.N = shape[0], p.C = shape[1], p.H = shape[2], p.W = shape[3];
  p.dtype = dtype_of(dtype);
  p.phase = BatchPhase(get<int>(call, "phase"));
  p.channels_last = get<bool>(call, "channels_last");
  p.pool = get<bool>(call, "pool");
  p.norm_first = get<bool>(call, "norm_first");
  p.squares = get<bool>(call, "squares");
  p.straight_through = get<bool>(call, "straight_through");
  return p;
}

#if defined(FFENGINE_CUDA)
// Pointers in the order of BatchPassTensors, from pivot on; then work.
BatchMiddleParams batch_middle_params(const std::array<Address, 11>& t, const py::object& call) {
  BatchMiddleParams m{};
  m.pivot = at<const float>(t[0]);
  m.beta = at<const float>(t[1]);
  m.running_mean = at<float>(t[2]), m.running_var = at<float>(t[3]);
  m.offsets = at<const int64_t>(t[4]);
  m.g = at<float>(t[5]), m.loss = at<float>(t[6]), m.coef = at<float>(t[7]);
  m.dgamma = at<float>(t[8]), m.dbeta = at<float>(t[9]);
  m.work = at<double>(t[10]);
  m.K = get<int64_t>(call, "groups");
  m.pixels = get<int64_t>(call, "pixels"), m.pixels_z = get<int64_t>(call, "pixels_z");
  m.equal_groups = get<bool>(call, "equal_groups");
  m.training = get<bool>(call, "training");
  m.use_running = get<bool>(call, "use_running");
  m.goodness = Goodness(get<int>(call, "goodness"));
  m.momentum = get<double>(call, "momentum"), m.eps = get<double>(call, "eps");
  read_loss(m.loss_params, call);
  m.da_scale = get<float>(call, "da_scale");
  return m;
}
#endif

OptimParams optim_params(const py::object& optim) {
  OptimParams o{};
  if (optim.is_none()) return o;
  o.kind = Optim(get<int>(optim, "kind"));
  o.lr = get<double>(optim, "lr");
  o.weight_decay = get<double>(optim, "weight_decay");
  o.beta1 = get<double>(optim, "beta1");
  o.beta2 = get<double>(optim, "beta2");
  o.eps = get<double>(optim, "eps");
  o.momentum = get<double>(optim, "momentum");
  o.nesterov = get<bool>(optim, "nesterov");
  o.step = get<int64_t>(optim, "step");
  return o;
}

// call: ffengine.ops.optim.CompressedCall.
CompressedStepParams compressed_params(Address weight, Address grad, Address m, Address v,
                                       Address m_scale, Address v_scale, int64_t n,
                                       float inv_scale, const py::object& call) {
  CompressedStepParams p{};
  p.weight = at<void>(weight);
  p.grad = at<const void>(grad);
  p.m = at<void>(m);
  p.v = at<void>(v);
  p.m_scale = at<float>(m_scale);
  p.v_scale = at<float>(v_scale);
  p.n = n;
  p.inv_scale = inv_scale;
  p.format = StateFormat(get<int>(call, "format"));
  p.bf16_weight = get<bool>(call, "bf16_weight");
  p.seed = get<uint64_t>(call, "seed");
  p.stream = get<uint32_t>(call, "stream");
  p.optim = optim_params(call.attr("optim"));
  return p;
}

// What an optimizer step on CUDA has besides: its gradient's dtype, where a 16-bit copy of the weight
// goes and in which dtype, a row of numbers on the device.
struct StepExtras {
  int grad_dtype;
  Address half;
  int half_dtype;
  Address row;
};

template <class Params>
void add_extras(Params& p, const StepExtras& extras) {
  p.grad_dtype = dtype_of(extras.grad_dtype);
  p.half = at<void>(extras.half);
  p.half_dtype = dtype_of(extras.half_dtype);
  FF_CHECK(p.half == nullptr || p.half_dtype != DType::f32,
           "[optimizer] a 16-bit copy expected bf16 or fp16, got fp32");
  p.optim.row = at<const float>(extras.row);
}

void read_conv_shape(WeightUpdateParams& p, const ConvShape& s, int dtype) {
  p.N = s[0], p.C = s[1], p.H = s[2], p.W = s[3], p.O = s[4], p.P = s[5], p.Q = s[6];
  p.kH = s[7], p.kW = s[8], p.stride = s[9], p.pad = s[10];
  p.dtype = dtype_of(dtype);
}

void weight_update(Address x, Address da, Address weight, Address m, Address v, Address grad,
                   Address grad_out, const ConvShape& s, int dtype, const py::object& call) {
  WeightUpdateParams p{};
  p.x = at<const void>(x);
  p.da = at<const void>(da);
  p.weight = at<float>(weight);
  p.m = at<float>(m);
  p.v = at<float>(v);
  p.grad = at<float>(grad);
  p.grad_out = at<float>(grad_out);
  read_conv_shape(p, s, dtype);
  p.x_channels_last = get<bool>(call, "x_channels_last");
  p.da_channels_last = get<bool>(call, "da_channels_last");
  p.weight_channels_last = get<bool>(call, "weight_channels_last");
  p.accumulate = get<bool>(call, "accumulate");
  p.finish = get<bool>(call, "finish");
  p.inv_scale = get<float>(call, "inv_scale");
  p.optim = optim_params(call.attr("optim"));
  NoGil released;
  weight_update_cpu(p);
}

using MatrixShape = std::array<int64_t, 2>;  // N, out

LinearStepParams linear_params(Address a, Address scale, const MatrixShape& s, int dtype) {
  LinearStepParams p{};
  p.a = at<void>(a);
  p.scale = at<float>(scale);
  p.N = s[0], p.out = s[1];
  p.dtype = dtype_of(dtype);
  return p;
}

// `launch` takes the params of the pass before local_pass, or after it.
template <class Launch>
void linear_prepare(Address x, Address from, Address a, Address bias, Address scale,
                    const std::array<int64_t, 3>& s, int dtype, bool rms, float eps,
                    Launch launch) {
  LinearStepParams p = linear_params(a, scale, {s[0], s[2]}, dtype);
  p.x = at<const void>(x);
  p.from = at<const void>(from);
  p.bias = at<const float>(bias);
  p.in = s[1];
  p.rms = rms, p.eps = eps;
  NoGil released;
  launch(p);
}

void linear_finish(Address da, Address scale, Address sums, const MatrixShape& s, int dtype,
                   float inv_scale) {
  LinearStepParams p = linear_params(da, scale, s, dtype);
  p.sums = at<float>(sums);
  p.inv_scale = inv_scale;
  NoGil released;
  linear_finish_cpu(p);
}

RoutesParams routes_params(Address map, Address routes, Address dz, const Shape4& shape, bool pool,
                           bool straight, int dtype) {
  RoutesParams p{};
  p.a = p.da = at<void>(map);
  p.routes = at<uint8_t>(routes);
  p.dz = at<const void>(dz);
  p.N = shape[0], p.C = shape[1], p.H = shape[2], p.W = shape[3];
  p.pool = pool, p.straight = straight, p.dtype = DType(dtype);
  return p;
}

// The enum values, for the test that holds them against ffengine/ops/config.py.
py::dict codes() {
  py::dict loss, goodness, norm, phase, optim, dtype, state;
  loss["none"] = int(Loss::none), loss["ce"] = int(Loss::ce), loss["cwc"] = int(Loss::cwc);
  loss["pvn"] = int(Loss::pvn), loss["threshold"] = int(Loss::threshold);
  loss["symba"] = int(Loss::symba), loss["sparsemax"] = int(Loss::sparsemax);
  loss["cwg"] = int(Loss::cwg), loss["margin"] = int(Loss::margin);
  goodness["mean"] = int(Goodness::mean), goodness["sum_sq"] = int(Goodness::sum_sq);
  goodness["mean_sq"] = int(Goodness::mean_sq);
  norm["none"] = int(NormKind::none), norm["group"] = int(NormKind::group);
  norm["layer"] = int(NormKind::layer), norm["length"] = int(NormKind::length);
  phase["fused"] = int(Phase::fused), phase["stats"] = int(Phase::stats);
  phase["apply"] = int(Phase::apply);
  optim["sgd"] = int(Optim::sgd), optim["adam"] = int(Optim::adam);
  optim["adamw"] = int(Optim::adamw);
  dtype["float32"] = int(DType::f32), dtype["bfloat16"] = int(DType::bf16);
  dtype["float16"] = int(DType::f16);
  state["fp32"] = int(StateFormat::f32), state["bf16"] = int(StateFormat::bf16);
  state["8bit"] = int(StateFormat::bits8);
  py::dict all;
  all["loss"] = loss, all["goodness"] = goodness, all["norm"] = norm;
  all["phase"] = phase, all["optim"] = optim, all["dtype"] = dtype;
  all["state"] = state;
  return all;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = FF_COMPILER;
  info["isas"] = FF_ISAS;
  info["cuda_architectures"] = FF_CUDA_ARCHITECTURES;
#if defined(FFENGINE_CUDA)
  info["cuda_toolkit"] = FF_CUDA_TOOLKIT;
#else
  info["cuda_toolkit"] = "";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      py::set_error(PyExc_ValueError, error.what());
    }
  });
  module.doc() = "C++ and CUDA kernels of ffengine; called through ffengine.ops.";
#if defined(FFENGINE_CUDA)
  module.attr("has_cuda") = true;
#else
  module.attr("has_cuda") = false;
#endif
  module.def("codes", &codes);
  module.def("build_info", &build_info);
  module.def("isa", &isa_name);
  module.def("isas", &isas);
  module.def("set_isa", &set_isa, py::arg("name"));
  module.def("num_threads", &num_threads);
  module.def("set_num_threads", &set_num_threads, py::arg("n"));
  module.def("flush_denormals", &flush_denormals, py::arg("on"));
  module.def("local_pass_cpu",
             [](const std::array<Address, 13>& tensors, const Shape4& shape, int dtype,
                const py::object& call) {
               local_pass(tensors, shape, dtype, call,
                          [](const LocalPassParams& p) { local_pass_cpu(p); });
             });
  module.def("local_pass_scratch_cpu", [](const Shape4& shape, int dtype, const py::object& call,
                                         bool has_h_prev, bool has_shortcut, bool has_z) {
    LocalPassParams p = local_pass_params(shape, dtype, call);
    float there = 0.f;
    p.h_prev = has_h_prev ? &there : nullptr;
    p.shortcut = has_shortcut ? &there : nullptr;
    p.z = has_z ? &there : nullptr;
    return local_pass_scratch_cpu(p);
  });
  module.def("batch_pass_cpu", [](const std::array<Address, 9>& tensors, const Shape4& shape,
                                  int dtype, const py::object& call) {
    const BatchPassParams p = batch_pass_params(tensors, shape, dtype, call);
    NoGil released;
    batch_pass_cpu(p);
  });
  module.def("batch_pass_scratch_cpu", [](const Shape4& shape, int dtype, const py::object& call) {
    return batch_pass_scratch_cpu(batch_pass_params({}, shape, dtype, call));
  });
  module.def("weight_update_cpu", &weight_update);
  module.def("weight_update_scratch_cpu",
             [](const ConvShape& s, int dtype, bool has_grad, int threads) {
               WeightUpdateParams p{};
               float none = 0.f;
               p.grad = has_grad ? &none : nullptr;
               read_conv_shape(p, s, dtype);
               return weight_update_scratch_cpu(p, threads);
             });
  module.def("linear_prepare_cpu",
             [](Address x, Address from, Address a, Address bias, Address scale,
                const std::array<int64_t, 3>& s, int dtype, bool rms, float eps) {
               linear_prepare(x, from, a, bias, scale, s, dtype, rms, eps,
                              [](const LinearStepParams& p) { linear_prepare_cpu(p); });
             });
  module.def("linear_finish_cpu", &linear_finish);
  module.def("scratch_peak_cpu", &scratch_peak_cpu, py::arg("reset"));
  module.def("optimizer_step_cpu",
             [](Address weight, Address m, Address v, Address grad, int64_t n, float inv_scale,
                const py::object& optim) {
               const OptimParams o = optim_params(optim);
               NoGil released;
               optimizer_step_cpu(at<float>(weight), at<float>(m), at<float>(v),
                                  at<const float>(grad), n, inv_scale, o);
             });
  module.def("compressed_step_cpu",
             [](Address weight, Address grad, Address m, Address v, Address m_scale,
                Address v_scale, int64_t n, float inv_scale, const py::object& call) {
               const CompressedStepParams p =
                   compressed_params(weight, grad, m, v, m_scale, v_scale, n, inv_scale, call);
               NoGil released;
               compressed_step_cpu(p);
             });
  module.def("routes_cpu", [](Address a, Address routes, const Shape4& shape, bool pool,
                              bool straight, int dtype) {
    const RoutesParams p = routes_params(a, routes, 0, shape, pool, straight, dtype);
    NoGil released;
    routes_cpu(p);
  });
  module.def("along_routes_cpu", [](Address routes, Address dz, Address da, const Shape4& shape,
                                    bool pool, int dtype) {
    const RoutesParams p = routes_params(da, routes, dz, shape, pool, false, dtype);
    NoGil released;
    along_routes_cpu(p);
  });
#if defined(FFENGINE_CUDA)
  module.def("local_pass_cuda",
             [](const std::array<Address, 13>& tensors, const Shape4& shape, int dtype,
                const py::object& call, Address stream) {
               local_pass(tensors, shape, dtype, call, [stream](const LocalPassParams& p) {
                 local_pass_cuda(p, at<void>(stream));
               });
             });
  module.def("batch_pass_cuda", [](const std::array<Address, 9>& tensors, const Shape4& shape,
                                   int dtype, const py::object& call, Address stream) {
    const BatchPassParams p = batch_pass_params(tensors, shape, dtype, call);
    NoGil released;
    batch_pass_cuda(p, at<void>(stream));
  });
  module.def("batch_middle_cuda",
             [](const std::array<Address, 9>& swept, const std::array<Address, 11>& tensors,
                const Shape4& shape, int dtype, const py::object& call, Address stream) {
               const BatchPassParams p = batch_pass_params(swept, shape, dtype, call);
               const BatchMiddleParams m = batch_middle_params(tensors, call);
               NoGil released;
               batch_middle_cuda(p, m, at<void>(stream));
             });
  module.def("optimizer_step_cuda",
             [](Address weight, Address m, Address v, Address grad, int64_t n, float inv_scale,
                const py::object& optim, int grad_dtype, Address half, int half_dtype, Address row,
                Address stream) {
               OptimizerStepParams p{};
               p.weight = at<float>(weight), p.m = at<float>(m), p.v = at<float>(v);
               p.grad = at<const void>(grad);
               p.n = n, p.inv_scale = inv_scale;
               p.optim = optim_params(optim);
               add_extras(p, {grad_dtype, half, half_dtype, row});
               NoGil released;
               optimizer_step_cuda(p, at<void>(stream));
             });
  module.def("compressed_step_cuda",
             [](Address weight, Address grad, Address m, Address v, Address m_scale,
                Address v_scale, int64_t n, float inv_scale, const py::object& call,
                int grad_dtype, Address half, int half_dtype, Address row, Address stream) {
               CompressedStepParams p =
                   compressed_params(weight, grad, m, v, m_scale, v_scale, n, inv_scale, call);
               add_extras(p, {grad_dtype, half, half_dtype, row});
               NoGil released;
               compressed_step_cuda(p, at<void>(stream));
             });
  module.def("linear_prepare_cuda",
             [](Address x, Address from, Address a, Address bias, Address scale,
                const std::array<int64_t, 3>& s, int dtype, bool rms, float eps, Address stream) {
               linear_prepare(x, from, a, bias, scale, s, dtype, rms, eps,
                              [stream](const LinearStepParams& p) {
                                linear_prepare_cuda(p, at<void>(stream));
                              });
             });
  module.def("linear_finish_cuda",
             [](Address da, Address scale, Address sums, const MatrixShape& s, int dtype,
                int64_t chunk, Address stream) {
               LinearStepParams p = linear_params(da, scale, s, dtype);
               p.sums = at<float>(sums);
               p.chunk = chunk;
               NoGil released;
               linear_finish_cuda(p, at<void>(stream));
             });
#endif
}

}  // namespace ff
