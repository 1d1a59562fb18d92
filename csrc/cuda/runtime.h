// Device limits and error checks of the CUDA back-end.
#pragma once
#include <cuda_runtime.h>

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

const DeviceCaps& device_caps(int device);

// Were the cluster kernels compiled for an architecture with clusters? Built for an older one and
// compiled from its PTX by the driver, they are empty.
bool cluster_kernels_built();
// csrc/cuda/local_pass.cu, for every device.
void local_pass_two_sweeps(const LocalPassParams& p, const DeviceCaps& caps, cudaStream_t stream);
// csrc/cuda/local_pass_cluster.cu: the one-read kernel, as planned by use_cluster.
void local_pass_cluster(const LocalPassParams& p, const ClusterPlan& plan, cudaStream_t stream);

}  // namespace ff
