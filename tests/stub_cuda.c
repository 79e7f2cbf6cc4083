/* A stub of the CUDA driver: it records launches and runs nothing; see launch_real.py.
 *
 * Built as libcuda.so.1, with Triton's cuda.h. It defines the functions that Triton 3.6 to 3.9 link
 * against, and those that they look up for a launch. */

#include "cuda.h"

#include <stdlib.h>
#include <string.h>

enum {
  MOST_LAUNCHES = 16, /* per case; same value as in launch_real.py */
  MOST_ATTRIBUTES = 4,
  MOST_PARAMETERS = 64,
  MOST_PARAMETER_BYTES = 4096,
  MOST_TENSOR_DIMENSIONS = 5,
  MOST_THREADS = 1024,
  SHARED_BYTES = 227 * 1024, /* limit per block on sm_90 */
  DRIVER_VERSION = 13020,    /* for older drivers Triton changes encoded tensor maps */
};

/* What a CUfunction points to. Never freed, so no handle is reused. */
struct function {
  int count;
  int bytes[MOST_PARAMETERS];
};

struct attribute {
  cuuint64_t id;
  CUlaunchAttributeValue value;
};

/* A recorded launch. Unused fields are zero, so launches compare as bytes. */
struct launch {
  cuuint64_t function, stream;
  cuuint32_t grid[3], block[3], shared_bytes, attribute_count;
  struct attribute attributes[MOST_ATTRIBUTES];
  unsigned char parameters[MOST_PARAMETER_BYTES]; /* packed, without padding */
};

/* The arguments of cuTensorMapEncodeTiled, stored in place of a real driver's encoded map. */
struct tensor_map {
  cuuint64_t address, sizes[MOST_TENSOR_DIMENSIONS], strides[MOST_TENSOR_DIMENSIONS - 1];
  cuuint32_t box[MOST_TENSOR_DIMENSIONS], element_strides[MOST_TENSOR_DIMENSIONS];
  unsigned char type, rank, interleave, swizzle, promotion, fill;
};

_Static_assert(sizeof(struct tensor_map) <= sizeof(CUtensorMap), "a parameter holds all arguments");

/* Read and cleared by launch_real.py. */
struct launch launches[MOST_LAUNCHES];
const size_t launch_bytes = sizeof(struct launch);
int launch_count = 0;
int recording = 1; /* 0: launches do nothing, for timing the host */
long launches_ever = 0, maps_ever = 0;

/* Called by launch_real.py before a launch: cuLaunchKernelEx does not receive parameter sizes. */
void describe_parameters(CUfunction handle, int count, const int *bytes) {
  struct function *function = (struct function *)handle;
  function->count = count;
  memcpy(function->bytes, bytes, count * sizeof(int));
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction handle, void **parameters,
                          void **extra) {
  const struct function *function = (const struct function *)handle;
  struct launch *launch = &launches[launch_count];
  size_t used = 0;

  if (!recording)
    return CUDA_SUCCESS;
  if (function->count == 0 || extra != NULL || launch_count == MOST_LAUNCHES ||
      config->numAttrs > MOST_ATTRIBUTES)
    return CUDA_ERROR_INVALID_VALUE;
  memset(launch, 0, sizeof(*launch));
  launch->function = (cuuint64_t)handle;
  launch->stream = (cuuint64_t)config->hStream;
  launch->grid[0] = config->gridDimX;
  launch->grid[1] = config->gridDimY;
  launch->grid[2] = config->gridDimZ;
  launch->block[0] = config->blockDimX;
  launch->block[1] = config->blockDimY;
  launch->block[2] = config->blockDimZ;
  launch->shared_bytes = config->sharedMemBytes;
  launch->attribute_count = config->numAttrs;
  for (unsigned int i = 0; i < config->numAttrs; i++) {
    launch->attributes[i].id = config->attrs[i].id;
    launch->attributes[i].value = config->attrs[i].value;
  }
  for (int i = 0; i < function->count; i++) {
    if (used + function->bytes[i] > MOST_PARAMETER_BYTES)
      return CUDA_ERROR_INVALID_VALUE;
    memcpy(launch->parameters + used, parameters[i], function->bytes[i]);
    used += function->bytes[i];
  }
  launch_count++;
  launches_ever++;
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *address, const cuuint64_t *sizes, const cuuint64_t *strides,
                                const cuuint32_t *box, const cuuint32_t *element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  struct tensor_map arguments;

  if (rank < 1 || rank > MOST_TENSOR_DIMENSIONS)
    return CUDA_ERROR_INVALID_VALUE;
  memset(&arguments, 0, sizeof(arguments));
  arguments.address = (cuuint64_t)address;
  memcpy(arguments.sizes, sizes, rank * sizeof(*sizes));
  memcpy(arguments.strides, strides, (rank - 1) * sizeof(*strides));
  memcpy(arguments.box, box, rank * sizeof(*box));
  memcpy(arguments.element_strides, element_strides, rank * sizeof(*element_strides));
  arguments.type = type;
  arguments.rank = rank;
  arguments.interleave = interleave;
  arguments.swizzle = swizzle;
  arguments.promotion = promotion;
  arguments.fill = fill;
  memset(map, 0, sizeof(*map));
  memcpy(map, &arguments, sizeof(arguments));
  maps_ever++;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  static int loaded;
  *module = (CUmodule)&loaded;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *handle, CUmodule module, const char *name) {
  *handle = calloc(1, sizeof(struct function));
  return *handle == NULL ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction handle) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? MOST_THREADS : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction handle, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuCtxGetCurrent(CUcontext *context) {
  static int current;
  *context = (CUcontext)&current;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? SHARED_BYTES : 0;
  return CUDA_SUCCESS;
}

/* Treats every address as one of device memory. */
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)value = address;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = DRIVER_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error of stub_cuda.c";
  return CUDA_SUCCESS;
}

/* Triton's module links these, but does not call them while a context is current. */
#define UNUSED(name, ...) \
  CUresult name(__VA_ARGS__) { return CUDA_ERROR_NOT_SUPPORTED; }

UNUSED(cuCtxGetDevice, CUdevice *device)
UNUSED(cuCtxGetLimit, size_t *value, CUlimit limit)
UNUSED(cuCtxSetCurrent, CUcontext context)
UNUSED(cuCtxSetLimit, CUlimit limit, size_t value)
UNUSED(cuDevicePrimaryCtxRetain, CUcontext *context, CUdevice device)
UNUSED(cuStreamIsCapturing, CUstream stream, CUstreamCaptureStatus *status)
