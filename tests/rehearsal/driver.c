/* What autograd's engine asks CUDA for before a backward pass: a number of devices while shown, and no contexts.
   libcaffe2_nvrtc.so takes the addresses of the driver's functions and calls one of them. */
#define _GNU_SOURCE
#include <dlfcn.h>

static int shown = 0;
void show_devices(int devices) { shown = devices; }

signed char _ZN3c104cuda12device_countEv(void) {
  static signed char (*real)(void) = 0;
  if (shown) return shown;
  if (!real) real = dlsym(RTLD_NEXT, "_ZN3c104cuda12device_countEv");
  return real ? real() : 0;
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { (void)device; *flags = 0; *active = 0; return 0; }

#define ABSENT(name) int name(void) { return 1; }
ABSENT(cuCtxGetCurrent) ABSENT(cuCtxSetCurrent) ABSENT(cuDeviceGet) ABSENT(cuDeviceGetAttribute)
ABSENT(cuDevicePrimaryCtxRetain) ABSENT(cuFuncGetAttribute) ABSENT(cuFuncSetAttribute) ABSENT(cuFuncSetCacheConfig)
ABSENT(cuGetErrorString) ABSENT(cuLaunchCooperativeKernel) ABSENT(cuLaunchKernel) ABSENT(cuLinkAddData_v2)
ABSENT(cuLinkComplete) ABSENT(cuLinkCreate_v2) ABSENT(cuModuleGetFunction) ABSENT(cuModuleLoad)
ABSENT(cuModuleLoadData) ABSENT(cuModuleLoadDataEx) ABSENT(cuModuleUnload)
ABSENT(cuOccupancyMaxActiveBlocksPerMultiprocessor) ABSENT(cuPointerGetAttribute) ABSENT(cuTensorMapEncodeTiled)
