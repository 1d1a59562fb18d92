// What every emulated library has beside its own entries: the error of the last call, and what it
// launched.
#pragma once
#include "../../../csrc/check.h"
#include "cuda_runtime.h"

namespace emulator {

inline std::string failure;

// Runs call(); -1 and its ff::Error's text in `failure` if it throws one.
template <class F> int guarded(F call) {
  failure.clear();
  device.error.clear();
  device.launches.clear();
  try {
    call();
    return 0;
  } catch (const ff::Error& error) {
    failure = error.what();
    return -1;
  }
}

}  // namespace emulator

extern "C" const char* emulated_failure() { return emulator::failure.c_str(); }
extern "C" void emulate_dry(int dry) { emulator::device.dry = dry != 0; }

// The i-th launch of the last call: its kernel, or null; numbers: grid x, y, z, threads, bytes of
// dynamic shared memory, blocks a cluster.
extern "C" const char* emulated_launch(int i, int64_t* numbers) {
  if (size_t(i) >= emulator::device.launches.size()) return nullptr;
  const emulator::Launch& l = emulator::device.launches[size_t(i)];
  const int64_t all[] = {l.grid.x, l.grid.y, l.grid.z, l.block.x, int64_t(l.shared), l.cluster};
  std::copy(all, all + 6, numbers);
  return l.kernel;
}

// Why hardware would refuse a launch, or null; numbers: grid and block x, y, z, bytes of dynamic
// shared memory, blocks a cluster.
extern "C" const char* emulated_refusal(const int64_t* n) {
  const auto size = [n](int i) { return dim3(unsigned(n[i]), unsigned(n[i + 1]), unsigned(n[i + 2])); };
  return emulator::refusal({"", size(0), size(3), size_t(n[6]), int(n[7])},
                           emulator::kSharedByDefault);
}

// Calls of cudaFuncSetAttribute so far.
extern "C" int emulated_attributes_set() { return emulator::device.attributes_set; }
