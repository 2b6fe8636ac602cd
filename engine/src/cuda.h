// The part of NVIDIA's driver API that the engine calls, loaded at run time, and thin owners of what it makes.
//
// The driver (libcuda.so.1) is part of every installation that has a GPU, so one binary serves machines with and
// without one. Types and values below are those of cuda.h, whose interface is stable; an entry's symbol carries the
// version of its signature (_v2).
//
// Errors are rlsd::Error: RLSD_NO_DEVICE where there is no usable driver or device, RLSD_OUT_OF_MEMORY where the
// device's memory is spent, RLSD_RUNTIME_ERROR for everything else.
#pragma once

#include "error.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <utility>

namespace rlsd::cuda {

using Result = int;
using DevicePointer = unsigned long long;
struct ContextHandle;
struct StreamHandle;
struct EventHandle;
struct ModuleHandle;
struct FunctionHandle;
struct GraphHandle;

inline constexpr Result success = 0, invalid_value = 1, out_of_memory = 2;

// clang-format off
#define RLSD_CUDA_ENTRIES(X)                                                                                           \
    X(init,              cuInit,                        (unsigned flags))                                              \
    X(device_count,      cuDeviceGetCount,              (int *))                                                       \
    X(device_get,        cuDeviceGet,                   (int *, int ordinal))                                          \
    X(device_name,       cuDeviceGetName,               (char *, int bytes, int device))                               \
    X(device_attribute,  cuDeviceGetAttribute,          (int *, int attribute, int device))                            \
    X(context_retain,    cuDevicePrimaryCtxRetain,      (ContextHandle **, int device))                                \
    X(context_release,   cuDevicePrimaryCtxRelease_v2,  (int device))                                                  \
    X(context_set,       cuCtxSetCurrent,               (ContextHandle *))                                             \
    X(context_get,       cuCtxGetCurrent,               (ContextHandle **))                                            \
    X(context_wait,      cuCtxSynchronize,              ())                                                            \
    X(memory_info,       cuMemGetInfo_v2,               (std::size_t *free, std::size_t *total))                       \
    X(memory_alloc,      cuMemAlloc_v2,                 (DevicePointer *, std::size_t bytes))                          \
    X(memory_free,       cuMemFree_v2,                  (DevicePointer))                                               \
    X(host_alloc,        cuMemHostAlloc,                (void **, std::size_t bytes, unsigned flags))                  \
    X(host_free,         cuMemFreeHost,                 (void *))                                                      \
    X(copy_to_device,    cuMemcpyHtoDAsync_v2,          (DevicePointer, const void *, std::size_t, StreamHandle *))    \
    X(copy_to_host,      cuMemcpyDtoHAsync_v2,          (void *, DevicePointer, std::size_t, StreamHandle *))          \
    X(copy_on_device,    cuMemcpyDtoDAsync_v2,          (DevicePointer, DevicePointer, std::size_t, StreamHandle *))   \
    X(fill_bytes,        cuMemsetD8Async,               (DevicePointer, unsigned char, std::size_t, StreamHandle *))   \
    X(stream_create,     cuStreamCreate,                (StreamHandle **, unsigned flags))                             \
    X(stream_destroy,    cuStreamDestroy_v2,            (StreamHandle *))                                              \
    X(stream_wait,       cuStreamSynchronize,           (StreamHandle *))                                              \
    X(stream_end_capture, cuStreamEndCapture,           (StreamHandle *, GraphHandle **))                              \
    X(event_create,      cuEventCreate,                 (EventHandle **, unsigned flags))                              \
    X(event_destroy,     cuEventDestroy_v2,             (EventHandle *))                                               \
    X(event_record,      cuEventRecord,                 (EventHandle *, StreamHandle *))                               \
    X(event_elapsed,     cuEventElapsedTime,            (float *milliseconds, EventHandle *start, EventHandle *end))   \
    X(module_load,       cuModuleLoadData,              (ModuleHandle **, const void *image))                          \
    X(module_unload,     cuModuleUnload,                (ModuleHandle *))                                              \
    X(module_function,   cuModuleGetFunction,           (FunctionHandle **, ModuleHandle *, const char *name))         \
    X(function_attribute, cuFuncSetAttribute,           (FunctionHandle *, int attribute, int value))                  \
    X(launch,            cuLaunchKernel,                (FunctionHandle *, unsigned gx, unsigned gy, unsigned gz,      \
                                                         unsigned bx, unsigned by, unsigned bz, unsigned shared,       \
                                                         StreamHandle *, void **arguments, void **extra))              \
    X(launch_host,       cuLaunchHostFunc,              (StreamHandle *, void (*)(void *), void *user))                \
    X(pointer_attribute, cuPointerGetAttribute,         (void *value, int attribute, DevicePointer))                   \
    X(error_name,        cuGetErrorName,                (Result, const char **))                                       \
    X(error_string,      cuGetErrorString,              (Result, const char **))
// clang-format on

// The entries as function pointers. One per process and library; never unloaded.
struct Driver {
#define RLSD_CUDA_FIELD(name, symbol, arguments) Result(*name) arguments = nullptr;
    RLSD_CUDA_ENTRIES(RLSD_CUDA_FIELD)
#undef RLSD_CUDA_FIELD

    // $RLSD_LIBCUDA (for debugging), else libcuda.so.1.
    static std::shared_ptr<const Driver> open();

    // Throws unless the call went well; `doing` is the first half of the sentence.
    void check(Result result, const char *doing) const;

    // A stand-in for the driver, whose device memory is host memory: networks then run on the CPU, as host functions
    // of the stream. It says so by exporting the symbol rlsd_fake_driver.
    bool hosted = false;
};

class Device;

// Memory of the device; freed with its owner. Contents are undefined at birth.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Device &device, std::size_t bytes);
    Buffer(Buffer &&other) noexcept { swap(other); }
    Buffer &operator=(Buffer &&other) noexcept {
        swap(other);
        return *this;
    }
    ~Buffer();

    DevicePointer at(std::size_t byte = 0) const noexcept { return address_ + byte; }
    std::size_t bytes() const noexcept { return bytes_; }

  private:
    void swap(Buffer &other) noexcept {
        std::swap(device_, other.device_), std::swap(address_, other.address_), std::swap(bytes_, other.bytes_);
    }

    const Device *device_ = nullptr;
    DevicePointer address_ = 0;
    std::size_t bytes_ = 0;
};

// Page-locked host memory, which the device reads and writes by itself; zeroed at birth.
class Pinned {
  public:
    Pinned(const Device &device, std::size_t bytes);
    Pinned(const Pinned &) = delete;
    Pinned &operator=(const Pinned &) = delete;
    ~Pinned();

    template <class T> T *as(std::size_t byte = 0) const {
        return reinterpret_cast<T *>(static_cast<std::byte *>(memory_) + byte);
    }

  private:
    const Device &device_;
    void *memory_ = nullptr;
};

class Event {
  public:
    explicit Event(const Device &device);
    Event(const Event &) = delete;
    Event &operator=(const Event &) = delete;
    ~Event();

    void record();
    double seconds_until(const Event &later) const;  // both recorded, and waited for

  private:
    const Device &device_;
    EventHandle *handle_ = nullptr;
};

// While it lives the device's context is current on the calling thread: before any other call. Then the caller's is
// again, who may be at work on another GPU.
class Inside {
  public:
    explicit Inside(const Device &device);
    Inside(const Device &device, std::nothrow_t) noexcept;  // for calls that may fail as they like
    ~Inside() { driver_.context_set(before_); }
    Inside(const Inside &) = delete;
    Inside &operator=(const Inside &) = delete;

  private:
    const Driver &driver_;
    ContextHandle *before_ = nullptr;
};

// One GPU through its primary context (so that memory of torch or CuPy is of the same context), and the one stream
// on which the engine works. Everything made from it must go before it, inside its context.
class Device {
  public:
    explicit Device(int ordinal);
    ~Device();
    Device(const Device &) = delete;
    Device &operator=(const Device &) = delete;

    const Driver &driver() const noexcept { return *driver_; }
    void check(Result result, const char *doing) const { driver_->check(result, doing); }
    ContextHandle *context() const noexcept { return context_; }
    int ordinal() const noexcept { return ordinal_; }
    const std::string &name() const noexcept { return name_; }
    int capability() const noexcept { return capability_; }  // 90 is 9.0
    StreamHandle *stream() const noexcept { return stream_; }
    std::size_t free_memory() const;

    void upload(DevicePointer to, const void *from, std::size_t bytes) const;
    void download(void *to, DevicePointer from, std::size_t bytes) const;
    void copy(DevicePointer to, DevicePointer from, std::size_t bytes) const;
    void fill(DevicePointer at, unsigned char value, std::size_t bytes) const;
    void wait() const;  // for everything on the stream
    void leave_capture() const noexcept;  // of a recording on the stream that failed; else nothing happens

    mutable std::int64_t launches = 0, synchronisations = 0;  // counted for rlsd_stats

  private:
    std::shared_ptr<const Driver> driver_;
    int ordinal_, device_ = 0, capability_ = 0;
    std::string name_;
    ContextHandle *context_ = nullptr;
    StreamHandle *stream_ = nullptr;
};

enum class Where { host, device, unknown };

// Where a caller's pointer lies; unknown if the device answers nothing any more.
Where where_is(const Driver &driver, const void *pointer);

}  // namespace rlsd::cuda
