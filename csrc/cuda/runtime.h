// Device limits and error checks of the CUDA back-end.
#pragma once
#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <mutex>

#include "../check.h"
#include "plan.h"

namespace ff {

#define FF_CUDA(call)                                                             \
  do {                                                                            \
    const cudaError_t ff_status = (call);                                         \
    FF_CHECK(ff_status == cudaSuccess,                                            \
             "[cuda] expected success of " #call ", got " << cudaGetErrorString(ff_status)); \
  } while (0)

// Makes the device that holds `pointer` current until the end of the scope.
class DeviceOf {
 public:
  explicit DeviceOf(const void* pointer) {
    cudaPointerAttributes attributes;
    FF_CUDA(cudaGetDevice(&before_));
    FF_CUDA(cudaPointerGetAttributes(&attributes, pointer));
    FF_CHECK(attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged,
             "[cuda] expected a device pointer, got host memory");
    device_ = attributes.device;
    if (device_ != before_) FF_CUDA(cudaSetDevice(device_));
  }
  ~DeviceOf() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  DeviceOf(const DeviceOf&) = delete;
  DeviceOf& operator=(const DeviceOf&) = delete;
  int device() const { return device_; }

 private:
  int before_ = 0, device_ = 0;
};

constexpr int kDevices = 64;

// Asked of the driver once a device.
inline const DeviceCaps& device_caps(int device) {
  static std::array<DeviceCaps, kDevices> all;
  static std::array<std::once_flag, kDevices> asked;
  FF_CHECK(device >= 0 && device < kDevices,
           "[cuda] expected a device below " << kDevices << ", got " << device);
  std::call_once(asked[size_t(device)], [device] {
    DeviceCaps caps;
    int major = 0;
    FF_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    // 12 has clusters too, but 99 KB of shared memory a block: not measured, not used
    caps.clusters = major == 9 || major == 10;
    FF_CUDA(cudaDeviceGetAttribute(&caps.multiprocessors, cudaDevAttrMultiProcessorCount, device));
    FF_CUDA(cudaDeviceGetAttribute(&caps.l2_bytes, cudaDevAttrL2CacheSize, device));
    FF_CUDA(cudaDeviceGetAttribute(&caps.shared_per_block,
                                   cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    caps.device = device;
    all[size_t(device)] = caps;
  });
  return all[size_t(device)];
}

// A grid's blocks all lie along x: 2^31 - 1 of them, where y and z have 65535.
inline unsigned grid_of(int64_t blocks) {
  FF_CHECK(blocks <= INT32_MAX, "[cuda] expected at most 2147483647 blocks, got " << blocks);
  return unsigned(blocks);
}
inline unsigned blocks_for(int64_t work, int64_t a_block) {
  return grid_of(std::max<int64_t>(1, (work + a_block - 1) / a_block));
}

// Places inside a sample are ints.
inline void check_sample(const char* op, int64_t elements) {
  FF_CHECK(elements < (int64_t(1) << 30),
           "[" << op << "] expected under 2^30 elements a sample, got " << elements);
}

// Lets a kernel have all the dynamic shared memory of its device; the driver is asked once a device.
template <auto kernel> void allow_shared(const DeviceCaps& caps, int needed) {
  static std::array<std::atomic<int>, kDevices> allowed{};
  std::atomic<int>& so_far = allowed[size_t(caps.device)];
  if (needed <= so_far.load(std::memory_order_relaxed)) return;
  const int most = caps.shared_per_block - kClusterStatic;
  FF_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  so_far.store(most, std::memory_order_relaxed);
}

// Were this device's cluster kernels compiled for an architecture with clusters? Built for an older
// one and compiled from its PTX by the driver, they are empty. Asked once a device.
bool cluster_kernels_built(int device);
// csrc/cuda/local_pass.cu, for every device.
void local_pass_two_sweeps(const LocalPassParams& p, const DeviceCaps& caps, cudaStream_t stream);
// csrc/cuda/local_pass_cluster.cu: the one-read kernel, as planned by use_cluster.
void local_pass_cluster(const LocalPassParams& p, const ClusterPlan& plan, const DeviceCaps& caps,
                        cudaStream_t stream);

}  // namespace ff
