// A CUDA driver that accepts every call and does nothing: Triton's own loader and launcher run on a
// machine without a GPU. Pointers pass through unread, so CPU tensors serve as arguments.
#include <cuda.h>

long stub_launches = 0;
unsigned stub_grid[3];  // of the last launch

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *v) { *v = 13000; return 0; }
CUresult cuGetErrorString(CUresult r, const char **s) { *s = "stub"; return 0; }
CUresult cuDeviceGet(CUdevice *d, int ordinal) { *d = 0; return 0; }
CUresult cuDeviceGetCount(int *n) { *n = 1; return 0; }
// shared memory of sm_90, the one attribute that is compared with what a kernel needs
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) { *v = 232448; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)1; return 0; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)1; return 0; }
CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; return 0; }
CUresult cuCtxGetLimit(size_t *v, CUlimit l) { *v = 1 << 20; return 0; }
CUresult cuCtxSetLimit(CUlimit l, size_t v) { return 0; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = (CUmodule)1; return 0; }
CUresult cuModuleUnload(CUmodule m) { return 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  *f = (CUfunction)1;
  return 0;
}
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return 0;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) {
  *n = 1;
  return 0;
}
CUresult cuPointerGetAttribute(void *out, CUpointer_attribute a, CUdeviceptr p) {
  *(CUdeviceptr *)out = p;
  return 0;
}
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *c) {
  *c = CU_STREAM_CAPTURE_STATUS_NONE;
  return 0;
}
// A real driver refuses a grid y or z above 65,535, and so does this one.
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **arguments, void **extra) {
  if (c->gridDimX > 2147483647u || c->gridDimY > 65535u || c->gridDimZ > 65535u)
    return CUDA_ERROR_INVALID_VALUE;
  ++stub_launches;
  stub_grid[0] = c->gridDimX, stub_grid[1] = c->gridDimY, stub_grid[2] = c->gridDimZ;
  return 0;
}
// Looked up by name, never called: no kernel here uses tensor maps.
CUresult stub_tiled(void) __asm__("cuTensorMapEncodeTiled");
CUresult stub_tiled(void) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult stub_im2col(void) __asm__("cuTensorMapEncodeIm2col");
CUresult stub_im2col(void) { return CUDA_ERROR_NOT_SUPPORTED; }
