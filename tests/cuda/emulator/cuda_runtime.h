// CUDA on one CPU thread, enough of it to run this project's kernels on small inputs: every CUDA
// thread is a fiber, a cluster's blocks run together, barriers and shuffles switch fibers.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
using std::max;
using std::min;

namespace emulator {

struct Barrier {
  int expected = 0, arrived = 0;
  long generation = 0;
};

struct Block {
  dim3 index;
  std::vector<unsigned char> shared;
  Barrier threads;
  std::vector<Barrier> warps;
  std::vector<uint64_t> slots;
};

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
};

// Contexts start a fiber; jumps go on with it, since a context's switch is a system call.
struct Fiber {
  ucontext_t context;
  jmp_buf stopped;
  unsigned thread = 0;
  int rank = 0;
  long waits_for = -1;
  bool started = false, done = false;
};

struct State {
  jmp_buf scheduler;
  Fiber* fiber = nullptr;
  Cluster* cluster = nullptr;
  dim3 grid, block;
  std::function<void()> body;
};
inline State state;

inline Block& block() { return state.cluster->blocks[size_t(state.fiber->rank)]; }
inline void yield() {
  if (_setjmp(state.fiber->stopped) == 0) _longjmp(state.scheduler, 1);
}
inline void resume(Fiber& f) {
  state.fiber = &f;
  if (_setjmp(state.scheduler) != 0) return;
  if (f.started) _longjmp(f.stopped, 1);
  f.started = true;
  setcontext(&f.context);
}

constexpr size_t kStack = 32768;
// The i-th fiber's, used again by every block.
inline char* stack_of(size_t i) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= i) stacks.push_back(std::make_unique<char[]>(kStack));
  return stacks[i].get();
}

inline long arrive(Barrier& b) {
  const long mine = b.generation;
  if (++b.arrived == b.expected) b.arrived = 0, ++b.generation;
  return mine;
}
inline void wait(Barrier& b, long mine) {
  while (b.generation == mine) yield();
}
inline void sync(Barrier& b) { wait(b, arrive(b)); }

inline void enter() {
  state.body();
  Fiber* self = state.fiber;
  self->done = true;
  Block& mine = block();  // a thread that has left counts as arrived, as on the device
  for (Barrier* b : {&mine.threads, &mine.warps[self->thread / 32]})
    if (--b->expected > 0 && b->arrived == b->expected) b->arrived = 0, ++b->generation;
  yield();
}

inline void run_cluster(unsigned threads, size_t shared, unsigned first, unsigned y, int blocks) {
  Cluster cluster;
  state.cluster = &cluster;
  cluster.blocks.resize(size_t(blocks));
  cluster.barrier.expected = int(threads) * blocks;
  std::vector<Fiber> fibers(size_t(blocks) * threads);
  for (int rank = 0; rank < blocks; ++rank) {
    Block& b = cluster.blocks[size_t(rank)];
    b.index = dim3(first + unsigned(rank), y);
    b.shared.assign(shared + 16, 0xff);  // NaNs: what is read before it is written shows
    b.threads.expected = int(threads);
    b.warps.resize((threads + 31) / 32);
    for (Barrier& w : b.warps) w.expected = 32;
    b.slots.resize(threads);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& f = fibers[size_t(rank) * threads + t];
      f.thread = t, f.rank = rank;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = stack_of(size_t(rank) * threads + t);
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = nullptr;
      makecontext(&f.context, enter, 0);
    }
  }
  for (bool left = true; left;) {
    left = false;
    for (Fiber& f : fibers) {
      if (f.done) continue;
      resume(f);
      left |= !f.done;
    }
  }
}

// What a launch asked of the device.
struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t shared;
  int cluster;
};

// The device's side of the API: what is refused (the last error's text, as the driver would keep its
// code) and what was launched. `dry`: launches are checked and listed, nothing runs.
struct Device {
  std::string error;
  std::vector<Launch> launches;
  std::map<std::pair<int, const void*>, int> shared_allowed;  // set by cudaFuncSetAttribute
  std::vector<std::array<int, 4>> attributes;  // of each device, in the order of their enum
  int number = 0;                              // of the current device
  bool dry = false;
  int attributes_set = 0;  // calls of cudaFuncSetAttribute
};
inline Device device{{}, {}, {}, {{7, 4, 1 << 20, 64 << 10}}};

// Makes a device with these attributes the current one: every one has a number of its own.
inline void use_device(const int64_t* given) {
  const std::array<int, 4> attributes{int(given[0]), int(given[1]), int(given[2]), int(given[3])};
  auto& all = device.attributes;
  device.number = int(std::find(all.begin(), all.end(), attributes) - all.begin());
  if (device.number == int(all.size())) all.push_back(attributes);
}

constexpr int kSharedByDefault = 48 << 10;  // dynamic, without cudaFuncSetAttribute

// Why hardware would refuse this launch, or null.
inline const char* refusal(const Launch& l, int shared_allowed) {
  const auto sizes = [](dim3 d) { return uint64_t(d.x) * d.y * d.z; };
  if (sizes(l.grid) == 0 || sizes(l.block) == 0) return "an empty grid or block";
  if (l.grid.x > 0x7fffffffu) return "grid x above 2147483647";
  if (l.grid.y > 65535 || l.grid.z > 65535) return "grid y or z above 65535";
  if (sizes(l.block) > 1024 || l.block.z > 64) return "more than 1024 threads a block";
  if (l.cluster > 8) return "more than 8 blocks a cluster";
  if (l.cluster < 1 || l.grid.x % unsigned(l.cluster) != 0)
    return "a grid that is not whole clusters";
  if (l.shared > size_t(shared_allowed)) return "more dynamic shared memory than was allowed";
  return nullptr;
}

template <class F>
void launch(const char* kernel, const void* function, dim3 grid, dim3 block, size_t shared, F body,
            int cluster = 1) {
  const Launch asked{kernel, grid, block, shared, cluster};
  const auto found = device.shared_allowed.find({device.number, function});
  const char* why =
      refusal(asked, found == device.shared_allowed.end() ? kSharedByDefault : found->second);
  if (why != nullptr) {
    device.error = std::string(kernel) + ": " + why;
    return;
  }
  device.launches.push_back(asked);
  if (device.dry) return;
  state.grid = grid, state.block = block, state.body = body;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; x += unsigned(cluster))
      run_cluster(block.x, shared, x, y, cluster);
}

inline unsigned char* dynamic_shared() {
  auto at = reinterpret_cast<uintptr_t>(block().shared.data());
  return reinterpret_cast<unsigned char*>((at + 15) / 16 * 16);
}

template <class T> T exchange(T x, int source) {
  static_assert(sizeof(T) <= 8, "one or two registers");
  Block& b = block();
  const unsigned t = state.fiber->thread, warp = t / 32;
  std::memcpy(&b.slots[t], &x, sizeof(T));
  sync(b.warps[warp]);
  std::memcpy(&x, &b.slots[warp * 32 + unsigned(source)], sizeof(T));
  sync(b.warps[warp]);
  return x;
}

}  // namespace emulator

#define threadIdx (dim3(emulator::state.fiber->thread, 0, 0))
#define blockIdx (emulator::block().index)
inline dim3 &blockDim = emulator::state.block, &gridDim = emulator::state.grid;

inline void __syncthreads() { emulator::sync(emulator::block().threads); }
inline void __syncwarp() { emulator::sync(emulator::block().warps[threadIdx.x / 32]); }
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulator::exchange(x, int(threadIdx.x % 32) ^ mask);
}
inline float __shfl_down_sync(unsigned, float x, int by, int width) {
  const int lane = int(threadIdx.x % 32);
  return emulator::exchange(x, lane % width + by < width ? lane + by : lane);
}
inline float __shfl_sync(unsigned, float x, int source) { return emulator::exchange(x, source); }

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0;
constexpr int cudaErrorInvalidConfiguration = 9;
// The text outlives the code: FF_CUDA asks for it with the code in hand.
inline const char* cudaGetErrorString(int) {
  static std::string text;
  text.swap(emulator::device.error);
  emulator::device.error.clear();
  return text.c_str();
}
inline int cudaGetLastError() {
  return emulator::device.error.empty() ? 0 : cudaErrorInvalidConfiguration;
}
inline int cudaGetDevice(int* d) { return *d = emulator::device.number, 0; }
inline int cudaSetDevice(int) { return 0; }
constexpr int cudaMemoryTypeDevice = 2, cudaMemoryTypeManaged = 3;
struct cudaPointerAttributes {
  int type, device;
};
inline int cudaPointerGetAttributes(cudaPointerAttributes* a, const void*) {
  *a = {cudaMemoryTypeDevice, emulator::device.number};
  return 0;
}
enum {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrL2CacheSize,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaLaunchAttributeClusterDimension
};
inline int cudaDeviceGetAttribute(int* value, int which, int number) {
  *value = emulator::device.attributes[size_t(number)][size_t(which)];
  return 0;
}
struct cudaFuncAttributes {
  int ptxVersion;
};
template <class K> int cudaFuncGetAttributes(cudaFuncAttributes* a, K) {
  a->ptxVersion = 90;
  return 0;
}
template <class K> int cudaFuncSetAttribute(K* kernel, int, int bytes) {
  const int number = emulator::device.number;
  ++emulator::device.attributes_set;
  if (bytes > emulator::device.attributes[size_t(number)][cudaDevAttrMaxSharedMemoryPerBlockOptin]) {
    emulator::device.error = "more shared memory than a block can have";
    return cudaErrorInvalidConfiguration;
  }
  emulator::device.shared_allowed[{number, reinterpret_cast<const void*>(kernel)}] = bytes;
  return 0;
}
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  int numAttrs = 0;
};
namespace emulator {
// cudaLaunchKernelEx
template <class K, class... A>
int launch_config(const char* name, cudaLaunchConfig_t* c, K* kernel, A... args) {
  launch(name, reinterpret_cast<const void*>(kernel), c->gridDim, c->blockDim, c->dynamicSmemBytes,
         [=] { kernel(args...); }, int(c->attrs->val.clusterDim.x));
  return cudaGetLastError();
}
}  // namespace emulator
