/* A driver and CUDA's runtime library for machines without a GPU: memory is the host's and starts as zeros, copies
 * copy, events are reached at once, and kernels do nothing but be counted. For programs that are to be run up to
 * their launches. Built twice, as libcuda.so.1 and as libcudart.so.13 (tests/stand_in_cuda.py). */

#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

#define OK 0
#define NO_MEMORY 2
#define TOTAL (80ull << 30)

/* Device attributes, by number: multiprocessors, capability, warp size, threads of a block. */
static int attribute(int number) {
  switch (number) {
    case 16: return 132;
    case 75: return 9;
    case 76: return 0;
    case 10: return 32;
    case 1: return 1024;
    default: return 232448; /* bytes of shared memory, of whichever kind */
  }
}

#ifdef DRIVER

long stand_in_launches;
long stand_in_modules;

int cuInit(unsigned flags) { return OK; }
int cuDriverGetVersion(int* version) { *version = 13000; return OK; }
int cuDeviceGetCount(int* count) { *count = 1; return OK; }
int cuDeviceGet(int* device, int index) { *device = 0; return OK; }
int cuDeviceGetName(char* name, int size, int device) { strncpy(name, "NVIDIA H100 stand-in", size); return OK; }
int cuDeviceGetAttribute(int* value, int number, int device) { *value = attribute(number); return OK; }
int cuFuncSetAttribute(void* function, int number, int value) { return OK; }
int cuGetErrorName(int code, const char** text) { *text = "an error"; return OK; }
int cuGetErrorString(int code, const char** text) { *text = "an error"; return OK; }
int cuLaunchKernelEx(const void* config, void* function, void** arguments, void** more) { stand_in_launches++; return OK; }
int cuModuleLoadData(void** module, const void* image) {
  if (memcmp(image, "\x7f" "ELF", 4)) return 200; /* an invalid image: no cubin */
  *module = (void*)++stand_in_modules;
  return OK;
}
int cuModuleGetFunction(void** function, void* module, const char* name) { *function = module; return OK; }
int cuModuleUnload(void* module) { return OK; }
int cuTensorMapEncodeTiled(void* map, ...) { return OK; }

#else

static size_t used;
static int thing; /* what every stream, event and graph is */

static int make(void** made) { *made = &thing; return OK; }

int cudaMalloc(void** address, size_t size) {
  if (size > TOTAL - used) return NO_MEMORY;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  *address = mmap(NULL, size + 1, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (*address == MAP_FAILED) return NO_MEMORY;
  used += size;
  return OK;
}
int cudaMallocHost(void** address, size_t size) { return cudaMalloc(address, size); }
int cudaHostAlloc(void** address, size_t size, unsigned flags) { return cudaMalloc(address, size); }
int cudaFree(void* address) { return OK; }
int cudaFreeHost(void* address) { return OK; }
int cudaMemGetInfo(size_t* free, size_t* total) { *free = TOTAL - used; *total = TOTAL; return OK; }
int cudaMemcpyAsync(void* to, const void* from, size_t size, int kind, void* stream) {
  memcpy(to, from, size);
  return OK;
}
int cudaMemcpy2DAsync(char* to, size_t to_pitch, const char* from, size_t from_pitch, size_t width, size_t rows, int kind,
                      void* stream) {
  for (size_t row = 0; row < rows; row++) memcpy(to + row * to_pitch, from + row * from_pitch, width);
  return OK;
}
int cudaMemcpyPeerAsync(void* to, int a, const void* from, int b, size_t size, void* stream) { return 1; }

int cudaSetDevice(int device) { return OK; }
int cudaGetDevice(int* device) { *device = 0; return OK; }
int cudaGetDeviceCount(int* count) { *count = 1; return OK; }
int cudaDeviceGetAttribute(int* value, int number, int device) { *value = attribute(number); return OK; }
int cudaGetDeviceProperties(void* properties, int device) { return 1; }

int cudaStreamCreate(void** stream) { return make(stream); }
int cudaStreamCreateWithFlags(void** stream, unsigned flags) { return make(stream); }
int cudaStreamDestroy(void* stream) { return OK; }
int cudaStreamSynchronize(void* stream) { return OK; }
int cudaStreamWaitEvent(void* stream, void* event, unsigned flags) { return OK; }
int cudaStreamBeginCapture(void* stream, int mode) { return OK; }
int cudaStreamEndCapture(void* stream, void** graph) { return make(graph); }
int cudaEventCreate(void** event) { return make(event); }
int cudaEventCreateWithFlags(void** event, unsigned flags) { return make(event); }
int cudaEventDestroy(void* event) { return OK; }
int cudaEventRecord(void* event, void* stream) { return OK; }
int cudaEventQuery(void* event) { return OK; }
int cudaEventSynchronize(void* event) { return OK; }
int cudaEventElapsedTime(float* taken, void* start, void* end) { *taken = 1; return OK; }
int cudaGraphInstantiate(void** made, void* graph, unsigned long long flags) { return make(made); }
int cudaGraphDestroy(void* graph) { return OK; }
int cudaGraphExecDestroy(void* graph) { return OK; }
int cudaGraphLaunch(void* graph, void* stream) { return OK; }
int cudaGetLastError(void) { return OK; }
int cudaPeekAtLastError(void) { return OK; }
const char* cudaGetErrorName(int code) { return "an error"; }
const char* cudaGetErrorString(int code) { return "an error"; }

#endif
