// A stand-in for libcudart.so.13: the part of CUDA's runtime that ONNX Runtime 1.31's CUDA provider calls, by means of
// the driver's stand-in. A kernel is its name. Memory pools are said not to be supported.
#include "work.h"

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

EXPORT CUresult cuInit(unsigned);
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *, CUdevice);
EXPORT CUresult cuCtxGetCurrent(CUcontext *);
EXPORT CUresult cuCtxSetCurrent(CUcontext);
EXPORT CUresult cuCtxSynchronize();
EXPORT CUresult cuDeviceGetAttribute(int *, CUdevice_attribute, CUdevice);
EXPORT CUresult cuDeviceTotalMem_v2(size_t *, CUdevice);
EXPORT CUresult cuGetErrorName(CUresult, const char **);
EXPORT CUresult cuGetErrorString(CUresult, const char **);
EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *, size_t);
EXPORT CUresult cuMemFree_v2(CUdeviceptr);
EXPORT CUresult cuMemHostAlloc(void **, size_t, unsigned);
EXPORT CUresult cuMemFreeHost(void *);
EXPORT CUresult cuMemGetInfo_v2(size_t *, size_t *);
EXPORT CUresult cuMemcpyAsync(CUdeviceptr, CUdeviceptr, size_t, CUstream);
EXPORT CUresult cuMemsetD8Async(CUdeviceptr, unsigned char, size_t, CUstream);
EXPORT CUresult cuPointerGetAttribute(void *, CUpointer_attribute, CUdeviceptr);
EXPORT CUresult cuStreamCreate(CUstream *, unsigned);
EXPORT CUresult cuStreamDestroy_v2(CUstream);
EXPORT CUresult cuStreamSynchronize(CUstream);
EXPORT CUresult cuStreamWaitEvent(CUstream, CUevent, unsigned);
EXPORT CUresult cuStreamBeginCapture_v2(CUstream, CUstreamCaptureMode);
EXPORT CUresult cuStreamEndCapture(CUstream, CUgraph *);
EXPORT CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus *);
EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec *, CUgraph, unsigned long long);
EXPORT CUresult cuGraphLaunch(CUgraphExec, CUstream);
EXPORT CUresult cuGraphDestroy(CUgraph);
EXPORT CUresult cuGraphExecDestroy(CUgraphExec);
EXPORT CUresult cuEventCreate(CUevent *, unsigned);
EXPORT CUresult cuEventDestroy_v2(CUevent);
EXPORT CUresult cuEventRecord(CUevent, CUstream);
EXPORT CUresult cuEventSynchronize(CUevent);
EXPORT CUresult cuEventElapsedTime(float *, CUevent, CUevent);
EXPORT CUresult cuLaunchHostFunc(CUstream, CUhostFn, void *);

namespace {

constexpr int SUCCESS = 0, NOT_SUPPORTED = 801;
constexpr int VERSION = 13000;
thread_local int last_error = 0;

// The runtime makes the primary context current on a thread that has none.
void enter() {
    static std::once_flag once;
    static CUcontext context = nullptr;
    std::call_once(once, [] {
        cuInit(0);
        cuDevicePrimaryCtxRetain(&context, 0);
    });
    CUcontext current = nullptr;
    cuCtxGetCurrent(&current);
    if (current == nullptr)
        cuCtxSetCurrent(context);
}

template <class... Parameters, class... Arguments>
int forward(CUresult (*function)(Parameters...), Arguments... arguments) {
    enter();
    int result = static_cast<int>(function(arguments...));
    if (result != SUCCESS)
        last_error = result;
    return result;
}

CUdeviceptr address(const void *pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

struct Three {
    unsigned x, y, z;
};

struct Launch { // what the <<<...>>> of a caller says, until its kernel's launch asks for it
    Three grid, block;
    size_t shared;
    void *stream;
};
thread_local Launch configured;

std::map<const void *, std::string> &kernels() {
    static auto *names = new std::map<const void *, std::string>; // registered before main, used to the end
    return *names;
}

int launch(const void *kernel, void *stream) {
    auto found = kernels().find(kernel);
    enter();
    int result = fake_cuda_work(static_cast<CUstream>(stream), found == kernels().end() ? "?" : found->second.c_str());
    if (result != SUCCESS)
        last_error = result;
    return result;
}

// CUDA 13's cudaDeviceProp: as much as anybody reads.
struct Properties {
    char name[256];
    unsigned char identity[32];
    size_t total_memory, shared_of_block;
    int registers_of_block, warp;
    size_t pitch;
    int threads_of_block, block[3], grid[3];
    size_t constant_memory;
    int major, minor;
    size_t alignment[2];
    int processors, integrated;
    unsigned char rest[1008 - 392];
};
static_assert(offsetof(Properties, total_memory) == 288 && offsetof(Properties, major) == 360 &&
              offsetof(Properties, processors) == 384 && sizeof(Properties) == 1008);
constexpr size_t L2 = 596, THREADS = 604, SHARED = 624, REGISTERS = 632, SHARED_OPTIN = 672; // offsets

template <class Value> void put(Properties &properties, size_t offset, Value value) {
    std::memcpy(reinterpret_cast<char *>(&properties) + offset, &value, sizeof value);
}

int attribute(int which) {
    int value = 0;
    cuDeviceGetAttribute(&value, static_cast<CUdevice_attribute>(which), 0);
    return value;
}

} // namespace

// ------------------------------------------------------------ kernels

EXPORT void **__cudaRegisterFatBinary(void *) {
    static void *handle = nullptr;
    return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void **) {}
EXPORT void __cudaUnregisterFatBinary(void **) {}
EXPORT void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
EXPORT void __cudaRegisterFunction(void **, const char *function, char *, const char *name, int, void *, void *, void *,
                                   void *, int *) {
    kernels()[function] = name;
}
EXPORT unsigned __cudaPushCallConfiguration(Three grid, Three block, size_t shared, void *stream) {
    configured = {grid, block, shared, stream};
    return SUCCESS;
}
EXPORT int __cudaPopCallConfiguration(Three *grid, Three *block, size_t *shared, void *stream) {
    *grid = configured.grid, *block = configured.block, *shared = configured.shared;
    *static_cast<void **>(stream) = configured.stream;
    return SUCCESS;
}
EXPORT int __cudaGetKernel(const void **kernel, const void *function) {
    *kernel = function;
    return SUCCESS;
}
EXPORT int __cudaLaunchKernel(const void *kernel, Three, Three, void **, size_t, void *stream) {
    return launch(kernel, stream);
}
EXPORT int cudaLaunchKernel(const void *function, Three, Three, void **, size_t, void *stream) {
    return launch(function, stream);
}
EXPORT int cudaLaunchCooperativeKernel(const void *function, Three, Three, void **, size_t, void *stream) {
    return launch(function, stream);
}

struct Configuration { // cudaLaunchConfig_t
    Three grid, block;
    size_t shared;
    void *stream, *attributes;
    unsigned count;
};
static_assert(sizeof(Configuration) == 56);

EXPORT int cudaLaunchKernelExC(const Configuration *configuration, const void *function, void **) {
    return launch(function, configuration->stream);
}
EXPORT int cudaLaunchHostFunc(CUstream stream, void (*function)(void *), void *data) {
    return forward(cuLaunchHostFunc, stream, function, data);
}
EXPORT int cudaLibraryLoadData(void **library, const void *, void *, void **, unsigned, void *, void **, unsigned) {
    static char one;
    *library = &one;
    return SUCCESS;
}
EXPORT int cudaLibraryUnload(void *) { return SUCCESS; }
EXPORT int cudaLibraryGetKernel(const void **kernel, void *, const char *name) {
    auto *kept = new std::string(name); // its address is the kernel's
    kernels()[kept] = name;
    *kernel = kept;
    return SUCCESS;
}
EXPORT int cudaKernelSetAttributeForDevice(const void *, int, int, int) { return SUCCESS; }
EXPORT int cudaFuncSetAttribute(const void *, int, int) { return SUCCESS; }
EXPORT int cudaFuncGetAttributes(void *attributes, const void *) {
    struct {
        size_t memory[3];
        int threads, registers, ptx, binary, cache, dynamic_shared;
        unsigned char rest[96];
    } said{{}, 1024, 32, 90, 90, 0, 49152, {}};
    static_assert(sizeof said == 144);
    std::memcpy(attributes, &said, sizeof said);
    return SUCCESS;
}
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *, int, size_t, unsigned) {
    *blocks = 2;
    return SUCCESS;
}

// ------------------------------------------------------------ the device, errors

EXPORT int cudaGetDeviceCount(int *count) {
    enter();
    *count = 1;
    return SUCCESS;
}
EXPORT int cudaGetDevice(int *device) {
    *device = 0;
    return SUCCESS;
}
EXPORT int cudaSetDevice(int) {
    enter();
    return SUCCESS;
}
EXPORT int cudaDriverGetVersion(int *version) {
    *version = VERSION;
    return SUCCESS;
}
EXPORT int cudaRuntimeGetVersion(int *version) {
    *version = VERSION;
    return SUCCESS;
}
EXPORT int cudaGetDeviceProperties(Properties *properties, int) {
    enter();
    *properties = Properties{};
    std::strcpy(properties->name, "Fake GPU");
    cuDeviceTotalMem_v2(&properties->total_memory, 0);
    properties->shared_of_block = 49152;
    properties->registers_of_block = 65536;
    properties->warp = 32;
    properties->threads_of_block = 1024;
    for (int axis = 0; axis < 3; ++axis)
        properties->block[axis] = attribute(2 + axis), properties->grid[axis] = attribute(5 + axis);
    properties->major = attribute(75), properties->minor = attribute(76);
    properties->processors = attribute(16);
    put(*properties, L2, attribute(38));
    put(*properties, THREADS, attribute(39));
    put(*properties, SHARED, size_t(233472));
    put(*properties, REGISTERS, 65536);
    put(*properties, SHARED_OPTIN, size_t(attribute(97)));
    return SUCCESS;
}
EXPORT int cudaDeviceGetAttribute(int *value, CUdevice_attribute which, int device) {
    return forward(cuDeviceGetAttribute, value, which, device);
}
EXPORT int cudaDeviceSynchronize() { return forward(cuCtxSynchronize); }
EXPORT int cudaGetDriverEntryPointByVersion(const char *, void **function, unsigned, unsigned long long, int *found) {
    *function = nullptr;
    *found = 1; // no such symbol
    return SUCCESS;
}
EXPORT int cudaPeekAtLastError() { return last_error; }
EXPORT int cudaGetLastError() {
    int result = last_error;
    last_error = SUCCESS;
    return result;
}
EXPORT const char *cudaGetErrorName(int error) {
    const char *text = nullptr;
    cuGetErrorName(static_cast<CUresult>(error), &text);
    return text != nullptr ? text : "unknown";
}
EXPORT const char *cudaGetErrorString(int error) {
    const char *text = nullptr;
    cuGetErrorString(static_cast<CUresult>(error), &text);
    return text != nullptr ? text : "unknown error";
}

// ------------------------------------------------------------ memory

EXPORT int cudaMalloc(void **pointer, size_t bytes) {
    CUdeviceptr found = 0;
    int result = bytes == 0 ? SUCCESS : forward(cuMemAlloc_v2, &found, bytes);
    *pointer = reinterpret_cast<void *>(found);
    return result;
}
EXPORT int cudaFree(void *pointer) { return pointer == nullptr ? SUCCESS : forward(cuMemFree_v2, address(pointer)); }
EXPORT int cudaMallocHost(void **pointer, size_t bytes) { return forward(cuMemHostAlloc, pointer, bytes, 0u); }
EXPORT int cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    return forward(cuMemHostAlloc, pointer, bytes, flags);
}
EXPORT int cudaFreeHost(void *pointer) { return forward(cuMemFreeHost, pointer); }
EXPORT int cudaMemGetInfo(size_t *free, size_t *total) { return forward(cuMemGetInfo_v2, free, total); }
EXPORT int cudaMallocFromPoolAsync(void **, size_t, void *, void *) { return NOT_SUPPORTED; }
EXPORT int cudaFreeAsync(void *, void *) { return NOT_SUPPORTED; }
EXPORT int cudaMemPoolCreate(void **, const void *) { return NOT_SUPPORTED; }
EXPORT int cudaMemPoolDestroy(void *) { return NOT_SUPPORTED; }
EXPORT int cudaMemPoolGetAttribute(void *, int, void *) { return NOT_SUPPORTED; }
EXPORT int cudaMemPoolSetAttribute(void *, int, void *) { return NOT_SUPPORTED; }
EXPORT int cudaMemPoolTrimTo(void *, size_t) { return NOT_SUPPORTED; }
EXPORT int cudaMemcpyFromSymbol(void *, const void *, size_t, size_t, int) { return NOT_SUPPORTED; }
EXPORT int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int, CUstream stream) {
    return forward(cuMemcpyAsync, address(to), address(from), bytes, stream);
}
EXPORT int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
    return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
EXPORT int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows,
                             int kind, CUstream stream) {
    int result = SUCCESS;
    for (size_t row = 0; row < rows && result == SUCCESS; ++row)
        result = cudaMemcpyAsync(static_cast<char *>(to) + row * to_pitch,
                                 static_cast<const char *>(from) + row * from_pitch, width, kind, stream);
    return result;
}
EXPORT int cudaMemsetAsync(void *to, int value, size_t bytes, CUstream stream) {
    return forward(cuMemsetD8Async, address(to), static_cast<unsigned char>(value), bytes, stream);
}
EXPORT int cudaMemset(void *to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, nullptr); }
EXPORT int cudaPointerGetAttributes(void *attributes, const void *pointer) {
    struct {
        int type = 0, device = 0; // type 0: memory of which nothing is known
        const void *on_device = nullptr, *on_host = nullptr;
        unsigned char rest[64] = {};
    } said;
    static_assert(sizeof said == 88);
    enter();
    unsigned kind = 0;
    if (static_cast<int>(cuPointerGetAttribute(&kind, static_cast<CUpointer_attribute>(2), address(pointer))) == SUCCESS)
        said.type = static_cast<int>(kind), said.on_device = pointer;
    std::memcpy(attributes, &said, sizeof said);
    return SUCCESS;
}

// ------------------------------------------------------------ streams, events, graphs

EXPORT int cudaStreamCreateWithFlags(CUstream *stream, unsigned flags) { return forward(cuStreamCreate, stream, flags); }
EXPORT int cudaStreamCreate(CUstream *stream) { return cudaStreamCreateWithFlags(stream, 0); }
EXPORT int cudaStreamDestroy(CUstream stream) { return forward(cuStreamDestroy_v2, stream); }
EXPORT int cudaStreamSynchronize(CUstream stream) { return forward(cuStreamSynchronize, stream); }
EXPORT int cudaStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    return forward(cuStreamWaitEvent, stream, event, flags);
}
EXPORT int cudaStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
    return forward(cuStreamBeginCapture_v2, stream, mode);
}
EXPORT int cudaStreamEndCapture(CUstream stream, CUgraph *graph) { return forward(cuStreamEndCapture, stream, graph); }
EXPORT int cudaStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    return forward(cuStreamIsCapturing, stream, status);
}
EXPORT int cudaGraphInstantiate(CUgraphExec *exec, CUgraph graph, unsigned long long flags) {
    return forward(cuGraphInstantiateWithFlags, exec, graph, flags);
}
EXPORT int cudaGraphLaunch(CUgraphExec exec, CUstream stream) { return forward(cuGraphLaunch, exec, stream); }
EXPORT int cudaGraphDestroy(CUgraph graph) { return forward(cuGraphDestroy, graph); }
EXPORT int cudaGraphExecDestroy(CUgraphExec exec) { return forward(cuGraphExecDestroy, exec); }
EXPORT int cudaEventCreateWithFlags(CUevent *event, unsigned flags) { return forward(cuEventCreate, event, flags); }
EXPORT int cudaEventCreate(CUevent *event) { return cudaEventCreateWithFlags(event, 0); }
EXPORT int cudaEventDestroy(CUevent event) { return forward(cuEventDestroy_v2, event); }
EXPORT int cudaEventRecord(CUevent event, CUstream stream) { return forward(cuEventRecord, event, stream); }
EXPORT int cudaEventRecordWithFlags(CUevent event, CUstream stream, unsigned) { return cudaEventRecord(event, stream); }
EXPORT int cudaEventSynchronize(CUevent event) { return forward(cuEventSynchronize, event); }
EXPORT int cudaEventElapsedTime(float *milliseconds, CUevent from, CUevent to) {
    return forward(cuEventElapsedTime, milliseconds, from, to);
}
