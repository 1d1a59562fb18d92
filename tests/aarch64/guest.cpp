// Runs the calls that host.cpp forwards: reads one from standard input, copies its regions between
// guard bands of NaN, makes the call, and writes back what the regions then hold.
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/check.h"
#include "../../csrc/cpu/isa.h"
#include "../../csrc/ops.h"
#include "wire.h"

namespace ff {
namespace {

using wire::Call;

constexpr int64_t kGuard = 256, kLine = 64;

// A copy of a region, at the same place within a cache line.
class Copy {
 public:
  explicit Copy(const wire::Region& region)
      : region_(region), memory_(new unsigned char[size_t(region.bytes + 2 * kGuard + kLine)]) {
    std::memset(memory_.get(), 0xff, size_t(region.bytes + 2 * kGuard + kLine));
    begin_ = memory_.get() + kGuard;
    begin_ += (region.address - reinterpret_cast<uint64_t>(begin_)) % kLine;
  }
  bool holds(uint64_t address) const {
    return address == region_.address ||
           (address > region_.address && address < region_.address + uint64_t(region_.bytes));
  }
  unsigned char* at(uint64_t address) const { return begin_ + (address - region_.address); }
  unsigned char* begin() const { return begin_; }
  int64_t bytes() const { return region_.bytes; }
  bool intact() const {
    for (int64_t i = 0; i < kGuard; ++i)
      if (begin_[-1 - i] != 0xff || begin_[region_.bytes + i] != 0xff) return false;
    return true;
  }

 private:
  wire::Region region_;
  std::unique_ptr<unsigned char[]> memory_;
  unsigned char* begin_;
};

// The struct that follows a request, its pointers into the copies.
template <class P>
P received(const std::vector<char>& body, const std::vector<Copy>& copies) {
  P p;
  std::memcpy(&p, body.data(), sizeof p);
  wire::pointers(p, [&](auto*& pointer, int64_t) {
    for (const Copy& copy : copies)
      if (pointer != nullptr && copy.holds(reinterpret_cast<uint64_t>(pointer))) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(
            copy.at(reinterpret_cast<uint64_t>(pointer)));
        return;
      }
  });
  return p;
}

int64_t answer(Call call, const std::vector<char>& body, const std::vector<Copy>& copies,
               std::string& text) {
  const auto as = [&](auto kind) { return received<decltype(kind)>(body, copies); };
  const auto number = [&] { return as(wire::Number{}).value; };
  switch (call) {
    case Call::local_pass: local_pass_cpu(as(LocalPassParams{})); return 0;
    case Call::batch_pass: batch_pass_cpu(as(BatchPassParams{})); return 0;
    case Call::weight_update: weight_update_cpu(as(WeightUpdateParams{})); return 0;
    case Call::compressed_step: compressed_step_cpu(as(CompressedStepParams{})); return 0;
    case Call::routes: routes_cpu(as(RoutesParams{})); return 0;
    case Call::along_routes: along_routes_cpu(as(RoutesParams{})); return 0;
    case Call::linear_prepare: linear_prepare_cpu(as(LinearStepParams{})); return 0;
    case Call::linear_finish: linear_finish_cpu(as(LinearStepParams{})); return 0;
    case Call::optimizer_step: {
      const auto p = as(wire::Step{});
      optimizer_step_cpu(p.weight, p.m, p.v, p.grad, p.n, p.inv_scale, p.optim);
      return 0;
    }
    case Call::local_pass_scratch:
      return local_pass_scratch_cpu(as(wire::Scratch<LocalPassParams>{}).p);
    case Call::batch_pass_scratch:
      return batch_pass_scratch_cpu(as(wire::Scratch<BatchPassParams>{}).p);
    case Call::weight_update_scratch: {
      const auto s = as(wire::Scratch<WeightUpdateParams>{});
      return weight_update_scratch_cpu(s.p, s.threads);
    }
    case Call::scratch_peak: return scratch_peak_cpu(number() != 0);
    case Call::flush_denormals: return flush_denormals(number() != 0);
    case Call::isa_name: text = isa_name(); return 0;
    case Call::set_isa: set_isa(as(wire::Name{}).text); return 0;
    case Call::isas:
      for (const std::string& name : isas()) text += name + " ";
      return 0;
    case Call::num_threads: return num_threads();
    case Call::set_num_threads: set_num_threads(int(number())); return 0;
  }
  FF_CHECK(false, "[guest] unknown call " << int(call));
  return 0;
}

// One call; false at the end of the stream.
bool serve() {
  wire::Request request;
  if (!wire::read_all(0, &request, sizeof request)) return false;
  std::vector<char> body(size_t(request.size));
  wire::read_all(0, body.data(), request.size);
  std::vector<Copy> copies;
  for (int32_t i = 0; i < request.regions; ++i) {
    wire::Region region;
    wire::read_all(0, &region, sizeof region);
    copies.emplace_back(region);
    wire::read_all(0, copies.back().begin(), region.bytes);
  }
  wire::Reply reply{0, 0, 0};
  std::string text;
  try {
    reply.value = answer(request.call, body, copies, text);
    for (const Copy& copy : copies)
      FF_CHECK(copy.intact(), "[guest] call " << int(request.call) << " wrote outside its "
                                              << copy.bytes() << " bytes");
  } catch (const Error& error) {
    text = error.what(), reply.failed = 1;
  }
  reply.text = int32_t(text.size());
  wire::write_all(1, &reply, sizeof reply);
  wire::write_all(1, text.data(), reply.text);
  for (const Copy& copy : copies) wire::write_all(1, copy.begin(), copy.bytes());
  return true;
}

}  // namespace
}  // namespace ff

int main() {
  while (ff::serve()) {
  }
}
