// The entry points of csrc/ops.h and csrc/cpu/isa.h, each run in another process. Linked with
// csrc/bindings.cpp in place of the kernels, it is an ffengine._C whose kernels are those of
// $FFENGINE_GUEST, a command that runs guest.cpp.
#include <sys/wait.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <string>
#include <vector>

#include "../../csrc/check.h"
#include "../../csrc/cpu/isa.h"
#include "../../csrc/ops.h"
#include "wire.h"

namespace ff {
namespace {

using wire::Call;

struct Answer {
  int64_t value;
  std::string text;
};

class Guest {
 public:
  Guest() {
    const char* command = std::getenv("FFENGINE_GUEST");
    FF_CHECK(command != nullptr, "[guest] expected a command in FFENGINE_GUEST, got none");
    int to[2], from[2];
    FF_CHECK(pipe(to) == 0 && pipe(from) == 0, "[guest] no pipe");
    std::signal(SIGPIPE, SIG_IGN);
    const pid_t child = fork();
    FF_CHECK(child >= 0, "[guest] no process");
    if (child == 0) {
      dup2(to[0], 0), dup2(from[1], 1);
      for (int file : {to[0], to[1], from[0], from[1]}) close(file);
      execl("/bin/sh", "sh", "-c", (std::string("exec ") + command).c_str(), nullptr);
      _exit(127);
    }
    close(to[0]), close(from[1]);
    out_ = to[1], in_ = from[0];
  }

  template <class P>
  Answer call(Call what, P params) {
    const std::lock_guard<std::mutex> alone(mutex_);
    std::vector<wire::Region> regions;
    wire::pointers(params, [&](const auto* pointer, int64_t bytes) {
      if (pointer != nullptr) regions.push_back({reinterpret_cast<uint64_t>(pointer), bytes});
    });
    merge(regions);
    const wire::Request request{what, int32_t(regions.size()), int64_t(sizeof params)};
    send(&request, sizeof request);
    send(&params, sizeof params);
    for (const wire::Region& r : regions) {
      send(&r, sizeof r);
      send(reinterpret_cast<const void*>(r.address), r.bytes);
    }
    wire::Reply reply;
    receive(&reply, sizeof reply);
    std::string text(size_t(reply.text), ' ');
    receive(text.data(), reply.text);
    for (const wire::Region& r : regions) receive(reinterpret_cast<void*>(r.address), r.bytes);
    FF_CHECK(!reply.failed, text);
    return {reply.value, text};
  }

 private:
  // What overlaps goes over as one region, so that aliases stay aliases.
  static void merge(std::vector<wire::Region>& regions) {
    std::sort(regions.begin(), regions.end(),
              [](auto& a, auto& b) { return a.address < b.address; });
    size_t kept = 0;
    for (const wire::Region& r : regions) {
      wire::Region* last = kept > 0 ? &regions[kept - 1] : nullptr;
      if (last != nullptr && (r.address == last->address ||
                              r.address < last->address + uint64_t(last->bytes)))
        last->bytes = std::max(last->bytes, int64_t(r.address - last->address) + r.bytes);
      else
        regions[kept++] = r;
    }
    regions.resize(kept);
  }
  void send(const void* from, int64_t bytes) {
    FF_CHECK(wire::write_all(out_, from, bytes), "[guest] gone");
  }
  void receive(void* to, int64_t bytes) {
    FF_CHECK(wire::read_all(in_, to, bytes), "[guest] gone");
  }

  int in_, out_;
  std::mutex mutex_;
};

Guest& guest() {
  static Guest only;
  return only;
}
template <class P>
Answer forward(Call what, const P& params) {
  return guest().call(what, params);
}
int64_t number(Call what, int64_t value = 0) { return forward(what, wire::Number{value}).value; }

}  // namespace

void local_pass_cpu(const LocalPassParams& p) { forward(Call::local_pass, p); }
void batch_pass_cpu(const BatchPassParams& p) { forward(Call::batch_pass, p); }
void weight_update_cpu(const WeightUpdateParams& p) { forward(Call::weight_update, p); }
void compressed_step_cpu(const CompressedStepParams& p) { forward(Call::compressed_step, p); }
void routes_cpu(const RoutesParams& p) { forward(Call::routes, p); }
void along_routes_cpu(const RoutesParams& p) { forward(Call::along_routes, p); }
void linear_prepare_cpu(const LinearStepParams& p) { forward(Call::linear_prepare, p); }
void linear_finish_cpu(const LinearStepParams& p) { forward(Call::linear_finish, p); }
void optimizer_step_cpu(float* weight, float* m, float* v, const float* grad, int64_t n,
                        float inv_scale, const OptimParams& optim) {
  forward(Call::optimizer_step, wire::Step{weight, m, v, grad, n, inv_scale, optim});
}
int64_t local_pass_scratch_cpu(const LocalPassParams& p) {
  return forward(Call::local_pass_scratch, wire::Scratch<LocalPassParams>{p, 0}).value;
}
int64_t batch_pass_scratch_cpu(const BatchPassParams& p) {
  return forward(Call::batch_pass_scratch, wire::Scratch<BatchPassParams>{p, 0}).value;
}
int64_t weight_update_scratch_cpu(const WeightUpdateParams& p, int threads) {
  return forward(Call::weight_update_scratch, wire::Scratch<WeightUpdateParams>{p, threads}).value;
}
int64_t scratch_peak_cpu(bool reset) { return number(Call::scratch_peak, reset); }
bool flush_denormals(bool on) { return number(Call::flush_denormals, on) != 0; }

const char* isa_name() {
  static std::string name;
  name = forward(Call::isa_name, wire::Number{0}).text;
  return name.c_str();
}
void set_isa(const std::string& name) {
  wire::Name wanted{};
  name.copy(wanted.text, sizeof wanted.text - 1);
  forward(Call::set_isa, wanted);
}
std::vector<std::string> isas() {
  std::istringstream names(forward(Call::isas, wire::Number{0}).text);
  return {std::istream_iterator<std::string>(names), {}};
}
int num_threads() { return int(number(Call::num_threads)); }
void set_num_threads(int n) { number(Call::set_num_threads, n); }

}  // namespace ff
