// The one pybind11 module, ffengine._C. A kernel takes its tensors' addresses, their sizes, the code
// of the first one's dtype, and its settings by the names of ffengine/ops/params.py, on CUDA and a
// stream; one function a kernel turns them into its params struct.
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
template <size_t count>
using Addresses = std::array<Address, count>;
template <size_t count>
using Sizes = std::array<int64_t, count>;
using NoGil = py::gil_scoped_release;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

int64_t whole(PyObject* number) {
  const int64_t found = PyLong_AsLongLong(number);
  if (found == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return found;
}

// Of a list or tuple.
template <class T, size_t count>
void read(std::array<T, count>& to, const py::object& from) {
  FF_CHECK(size_t(PySequence_Fast_GET_SIZE(from.ptr())) == count,
           "[bindings] expected " << count << " numbers, got " << py::len(from));
  for (size_t i = 0; i < count; ++i) to[i] = T(whole(PySequence_Fast_GET_ITEM(from.ptr(), i)));
}

// name: a literal, whose Python string is made once, and numbers are read without pybind11's casts:
// local_pass's thirty then take 2.0 us a call, not 4.2.
template <class T>
T get(const py::object& object, const char* name) {
  static std::unordered_map<const char*, PyObject*> names;
  PyObject*& key = names[name];
  if (key == nullptr) key = PyUnicode_InternFromString(name);
  const auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), key));
  if (!value) throw py::error_already_set();
  if constexpr (std::is_same_v<T, bool>) {
    return PyObject_IsTrue(value.ptr()) == 1;
  } else if constexpr (std::is_floating_point_v<T>) {
    const double found = PyFloat_AsDouble(value.ptr());
    if (found == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return T(found);
  } else if constexpr (std::is_signed_v<T>) {
    return T(whole(value.ptr()));
  } else {
    return value.cast<T>();
  }
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

// By LocalPassTensors.
LocalPassParams local_pass(const Addresses<13>& t, const Sizes<4>& shape, int dtype,
                           const py::object& call) {
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
  return p;
}

// By BatchPassTensors, whose last eleven are the middle's.
using BatchAddresses = Addresses<20>;
BatchPassParams batch_pass(const BatchAddresses& t, const Sizes<4>& shape, int dtype,
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
BatchMiddleParams batch_middle(const BatchAddresses& t, const py::object& call) {
  BatchMiddleParams m{};
  m.pivot = at<const float>(t[9]);
  m.beta = at<const float>(t[10]);
  m.running_mean = at<float>(t[11]), m.running_var = at<float>(t[12]);
  m.offsets = at<const int64_t>(t[13]);
  m.g = at<float>(t[14]), m.loss = at<float>(t[15]), m.coef = at<float>(t[16]);
  m.dgamma = at<float>(t[17]), m.dbeta = at<float>(t[18]);
  m.work = at<double>(t[19]);
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

// By a StepCall, as all optimizer steps.
using StepAddresses = Addresses<8>;
template <class Params>
Params step_params(const StepAddresses& t, const Sizes<1>& n, int dtype, const py::object& call) {
  Params p{};
  p.grad = at<const void>(t[0]);
  p.weight = at<std::remove_pointer_t<decltype(p.weight)>>(t[1]);
  p.m = at<std::remove_pointer_t<decltype(p.m)>>(t[2]);
  p.v = at<std::remove_pointer_t<decltype(p.v)>>(t[3]);
  p.half = at<void>(t[6]);
  p.grad_dtype = dtype_of(dtype);
  p.half_dtype = dtype_of(get<int>(call, "half_dtype"));
  FF_CHECK(p.half == nullptr || p.half_dtype != DType::f32,
           "[optimizer] a 16-bit copy expected bf16 or fp16, got fp32");
  p.n = n[0];
  p.inv_scale = get<float>(call, "inv_scale");
  p.optim = optim_params(get<py::object>(call, "optim"));
  p.optim.row = at<const float>(t[7]);
  return p;
}

OptimizerStepParams optimizer_step(const StepAddresses& t, const Sizes<1>& n, int dtype,
                                   const py::object& call) {
  return step_params<OptimizerStepParams>(t, n, dtype, call);
}

void step_on_cpu(const OptimizerStepParams& p) {
  optimizer_step_cpu(p.weight, p.m, p.v, static_cast<const float*>(p.grad), p.n, p.inv_scale,
                     p.optim);
}

CompressedStepParams compressed_step(const StepAddresses& t, const Sizes<1>& n, int dtype,
                                     const py::object& call) {
  CompressedStepParams p = step_params<CompressedStepParams>(t, n, dtype, call);
  p.m_scale = at<float>(t[4]);
  p.v_scale = at<float>(t[5]);
  p.format = StateFormat(get<int>(call, "format"));
  p.bf16_weight = get<bool>(call, "bf16_weight");
  p.seed = get<uint64_t>(call, "seed");
  p.stream = get<uint32_t>(call, "stream");
  return p;
}

// s: N, C, H, W, O, P, Q, kH, kW, stride, pad.
WeightUpdateParams weight_update(const Addresses<7>& t, const Sizes<11>& s, int dtype,
                                 const py::object& call) {
  WeightUpdateParams p{};
  p.N = s[0], p.C = s[1], p.H = s[2], p.W = s[3], p.O = s[4], p.P = s[5], p.Q = s[6];
  p.kH = s[7], p.kW = s[8], p.stride = s[9], p.pad = s[10];
  p.dtype = dtype_of(dtype);
  p.x = at<const void>(t[0]);
  p.da = at<const void>(t[1]);
  p.weight = at<float>(t[2]);
  p.m = at<float>(t[3]);
  p.v = at<float>(t[4]);
  p.grad = at<float>(t[5]);
  p.grad_out = at<float>(t[6]);
  p.x_channels_last = get<bool>(call, "x_channels_last");
  p.da_channels_last = get<bool>(call, "da_channels_last");
  p.weight_channels_last = get<bool>(call, "weight_channels_last");
  p.accumulate = get<bool>(call, "accumulate");
  p.finish = get<bool>(call, "finish");
  p.inv_scale = get<float>(call, "inv_scale");
  p.optim = optim_params(get<py::object>(call, "optim"));
  return p;
}

// t: x, from, a, bias, scale; s: N, in, out.
LinearStepParams linear_prepare(const Addresses<5>& t, const Sizes<3>& s, int dtype,
                                const py::object& call) {
  LinearStepParams p{};
  p.x = at<const void>(t[0]);
  p.from = at<const void>(t[1]);
  p.a = at<void>(t[2]);
  p.bias = at<const float>(t[3]);
  p.scale = at<float>(t[4]);
  p.N = s[0], p.in = s[1], p.out = s[2];
  p.dtype = dtype_of(dtype);
  p.rms = get<bool>(call, "rms"), p.eps = get<float>(call, "eps");
  return p;
}

// t: da, scale, sums; s: N, out.
LinearStepParams linear_finish(const Addresses<3>& t, const Sizes<2>& s, int dtype,
                               const py::object& call) {
  LinearStepParams p{};
  p.a = at<void>(t[0]);
  p.scale = at<float>(t[1]);
  p.sums = at<float>(t[2]);
  p.N = s[0], p.out = s[1];
  p.dtype = dtype_of(dtype);
  p.inv_scale = get<float>(call, "inv_scale"), p.chunk = get<int64_t>(call, "chunk");
  return p;
}

// map: a or da.
RoutesParams routes_params(Address map, Address routes, Address dz, const Sizes<4>& shape,
                           int dtype, const py::object& call) {
  RoutesParams p{};
  p.a = p.da = at<void>(map);
  p.routes = at<uint8_t>(routes);
  p.dz = at<const void>(dz);
  p.N = shape[0], p.C = shape[1], p.H = shape[2], p.W = shape[3];
  p.pool = get<bool>(call, "pool"), p.straight = get<bool>(call, "straight");
  p.dtype = dtype_of(dtype);
  return p;
}

// t: a, routes.
RoutesParams routes(const Addresses<2>& t, const Sizes<4>& shape, int dtype,
                    const py::object& call) {
  return routes_params(t[0], t[1], 0, shape, dtype, call);
}

// t: dz, routes, da.
RoutesParams along_routes(const Addresses<3>& t, const Sizes<4>& shape, int dtype,
                          const py::object& call) {
  return routes_params(t[2], t[1], t[0], shape, dtype, call);
}

// Makes a kernel's params of what Python hands over.
template <class Params, size_t tensors, size_t sizes>
using Reader = Params (*)(const Addresses<tensors>&, const Sizes<sizes>&, int, const py::object&);

template <class Params, size_t tensors, size_t sizes>
Params params_of(Reader<Params, tensors, sizes> reader, const py::list& t, const py::tuple& s,
                 int dtype, const py::object& call) {
  Addresses<tensors> addresses;
  Sizes<sizes> shape;
  read(addresses, t), read(shape, s);
  return reader(addresses, shape, dtype, call);
}

template <class Params, size_t tensors, size_t sizes>
void define_cpu(py::module_& module, const char* name, Reader<Params, tensors, sizes> reader,
                void (*kernel)(const Params&)) {
  module.def(name, [reader, kernel](const py::list& t, const py::tuple& s, int dtype,
                                    const py::object& call) {
    const Params p = params_of(reader, t, s, dtype, call);
    NoGil released;
    kernel(p);
  });
}

// Scratch bytes of a kernel, which looks at no address but for whether it is null.
template <class Params, size_t tensors, size_t sizes>
void define_scratch(py::module_& module, const char* name, Reader<Params, tensors, sizes> reader,
                    int64_t (*scratch)(const Params&)) {
  module.def(name, [reader, scratch](const py::list& present, const py::tuple& s, int dtype,
                                     const py::object& call) {
    return scratch(params_of(reader, present, s, dtype, call));
  });
}

#if defined(FFENGINE_CUDA)
template <class Params, size_t tensors, size_t sizes>
void define_cuda(py::module_& module, const char* name, Reader<Params, tensors, sizes> reader,
                 void (*kernel)(const Params&, void*)) {
  module.def(name, [reader, kernel](const py::list& t, const py::tuple& s, int dtype,
                                    const py::object& call, Address stream) {
    const Params p = params_of(reader, t, s, dtype, call);
    NoGil released;
    kernel(p, at<void>(stream));
  });
}

void define_cuda_kernels(py::module_& module) {
  define_cuda(module, "local_pass_cuda", local_pass, local_pass_cuda);
  define_cuda(module, "optimizer_step_cuda", optimizer_step, optimizer_step_cuda);
  define_cuda(module, "compressed_step_cuda", compressed_step, compressed_step_cuda);
  define_cuda(module, "linear_prepare_cuda", linear_prepare, linear_prepare_cuda);
  define_cuda(module, "linear_finish_cuda", linear_finish, linear_finish_cuda);
  module.def("batch_pass_cuda", [](const py::list& t, const py::tuple& s, int dtype,
                                   const py::object& call, Address stream) {
    const BatchPassParams p = params_of(batch_pass, t, s, dtype, call);
    if (p.phase != BatchPhase::middle) {
      NoGil released;
      return batch_pass_cuda(p, at<void>(stream));
    }
    BatchAddresses tensors;
    read(tensors, t);
    const BatchMiddleParams m = batch_middle(tensors, call);
    NoGil released;
    batch_middle_cuda(p, m, at<void>(stream));
  });
}
#endif

int64_t weight_update_scratch(const WeightUpdateParams& p) {
  return weight_update_scratch_cpu(p, num_threads());
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
  module.def("scratch_peak_cpu", &scratch_peak_cpu, py::arg("reset"));
  define_cpu(module, "local_pass_cpu", local_pass, local_pass_cpu);
  define_cpu(module, "batch_pass_cpu", batch_pass, batch_pass_cpu);
  define_cpu(module, "weight_update_cpu", weight_update, weight_update_cpu);
  define_cpu(module, "optimizer_step_cpu", optimizer_step, step_on_cpu);
  define_cpu(module, "compressed_step_cpu", compressed_step, compressed_step_cpu);
  define_cpu(module, "linear_prepare_cpu", linear_prepare, linear_prepare_cpu);
  define_cpu(module, "linear_finish_cpu", linear_finish, linear_finish_cpu);
  define_cpu(module, "routes_cpu", routes, routes_cpu);
  define_cpu(module, "along_routes_cpu", along_routes, along_routes_cpu);
  define_scratch(module, "local_pass_scratch_cpu", local_pass, local_pass_scratch_cpu);
  define_scratch(module, "batch_pass_scratch_cpu", batch_pass, batch_pass_scratch_cpu);
  define_scratch(module, "weight_update_scratch_cpu", weight_update, weight_update_scratch);
#if defined(FFENGINE_CUDA)
  define_cuda_kernels(module);
#endif
}

}  // namespace ff
