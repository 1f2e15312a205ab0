// A CUDA driver without a GPU: it loads nothing and computes nothing, but writes down what is launched.
//
// A record of a launch is: function, stream, grid (3), block (3), shared bytes, number of attributes, then each
// attribute's id and first word, all as 64-bit words; then the bytes of each parameter, padded to 64-bit words.
#include <cuda.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define MOST_PARAMETERS 128
#define MOST_FUNCTIONS 4096

static uint64_t log_words[1 << 20];
static size_t log_length;
static int recording;
static struct {
  int count;
  int sizes[MOST_PARAMETERS];
} functions[MOST_FUNCTIONS];
static uint64_t function_count;
static __thread CUcontext context; // as with CUDA, a thread begins without one

EXPORT void pretend_record(int on) {
  recording = on;
  log_length = 0;
}
EXPORT size_t pretend_log(uint64_t **words) {
  *words = log_words;
  return log_length;
}
// The parameters of the function that is loaded next.
EXPORT void pretend_parameters(int count, const int *sizes) {
  functions[function_count + 1].count = count;
  memcpy(functions[function_count + 1].sizes, sizes, count * sizeof(int));
}

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)++function_count;
  return CUDA_SUCCESS;
}

static void put(const void *bytes, size_t size) {
  log_words[log_length + (size - 1) / 8] = 0;
  memcpy(log_words + log_length, bytes, size);
  log_length += (size + 7) / 8;
}
static void put_word(uint64_t word) { log_words[log_length++] = word; }

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  if (!context)
    return CUDA_ERROR_INVALID_CONTEXT;
  if (!recording || log_length > (1 << 19))
    return CUDA_SUCCESS;
  put_word((uint64_t)function);
  put_word((uint64_t)config->hStream);
  put_word(config->gridDimX), put_word(config->gridDimY), put_word(config->gridDimZ);
  put_word(config->blockDimX), put_word(config->blockDimY), put_word(config->blockDimZ);
  put_word(config->sharedMemBytes);
  put_word(config->numAttrs);
  for (unsigned i = 0; i < config->numAttrs; i++) {
    put_word(config->attrs[i].id);
    put_word(config->attrs[i].value.programmaticStreamSerializationAllowed);
  }
  for (int i = 0; i < functions[(uint64_t)function].count; i++)
    put(parameters[i], functions[(uint64_t)function].sizes[i]);
  return CUDA_SUCCESS;
}

// A map that says what it was made of.
EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                       const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                       const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                       CUtensorMapFloatOOBfill fill) {
  uint64_t *word = map->opaque;
  memset(map, 0, sizeof *map);
  *word++ = (uint64_t)address;
  *word++ = type | rank << 8 | interleave << 16 | swizzle << 20 | promotion << 24 | (uint64_t)fill << 28;
  for (cuuint32_t i = 0; i < rank; i++) {
    *word++ = sizes[i];
    *word++ = box[i] | (uint64_t)steps[i] << 32;
    if (i + 1 < rank)
      *word++ = strides[i];
  }
  return (uint64_t)address % 16 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

EXPORT CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448 : 132;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return CUDA_SUCCESS; }
EXPORT CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetCurrent(CUcontext *current) { return *current = context, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(CUcontext current) { return context = current, CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { return *c = (CUcontext)1, CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int *version) { return *version = 13020, CUDA_SUCCESS; }
EXPORT CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "pretended", CUDA_SUCCESS; }
EXPORT CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) {
  return *n = 1, CUDA_SUCCESS;
}
