// Allocation, copies, fills, and what kind of memory a pointer is.
#pragma once

#include "control.h"

EXPORT CUresult cuMemGetInfo_v2(size_t *free, size_t *total) {
    return call("cuMemGetInfo_v2", READY | CONTEXT, [&](std::string &) {
        *total = driver->memory.total;
        *free = driver->memory.free();
        return code::SUCCESS;
    });
}

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t bytes) {
    return call("cuMemAlloc_v2", READY | CONTEXT | NO_CAPTURE, [&](std::string &line) {
        line += " " + std::to_string(bytes) + " bytes";
        if (bytes == 0)
            return code::INVALID_VALUE;
        Memory &memory = driver->memory;
        if (bytes > memory.free() || (*pointer = memory.allocate(bytes, true)) == 0)
            return code::OUT_OF_MEMORY;
        line += " at " + memory.describe(*pointer);
        return code::SUCCESS;
    });
}

// Waits for all work first, as drivers do.
inline int release(std::string &line, uintptr_t pointer, bool device) {
    line += " " + driver->memory.describe(pointer);
    int result = inside > 0 ? code::SUCCESS : driver->drain_all();
    int released = driver->memory.release(pointer, device);
    return released != code::SUCCESS ? released : result;
}

EXPORT CUresult cuMemFree_v2(CUdeviceptr pointer) {
    return call("cuMemFree_v2", READY | CONTEXT | NO_CAPTURE,
                [&](std::string &line) { return release(line, pointer, true); });
}

EXPORT CUresult cuMemHostAlloc(void **pointer, size_t bytes, unsigned int flags) {
    return call("cuMemHostAlloc", READY | CONTEXT | NO_CAPTURE, [&](std::string &line) {
        line += " " + std::to_string(bytes) + " bytes";
        if (bytes == 0 || flags > 7)
            return code::INVALID_VALUE;
        uintptr_t start = driver->memory.allocate(bytes, false);
        if (start == 0)
            return code::OUT_OF_MEMORY;
        *pointer = reinterpret_cast<void *>(start);
        line += " at " + driver->memory.describe(start);
        return code::SUCCESS;
    });
}

EXPORT CUresult cuMemFreeHost(void *pointer) {
    return call("cuMemFreeHost", READY | CONTEXT | NO_CAPTURE,
                [&](std::string &line) { return release(line, reinterpret_cast<uintptr_t>(pointer), false); });
}

enum class Side { DEVICE, HOST, ANY };

struct Range {
    uintptr_t address;
    Side side;

    bool check(size_t bytes, const std::string &what) const {
        Memory &memory = driver->memory;
        return side == Side::DEVICE ? memory.check_device(address, bytes, what)
               : side == Side::HOST ? memory.check_host(address, bytes, what)
                                    : memory.check_any(address, bytes, what);
    }

    bool pageable() const { return side != Side::DEVICE && driver->memory.find(address) == nullptr; }
};

inline Range device(CUdeviceptr pointer) { return {pointer, Side::DEVICE}; }
inline Range any(CUdeviceptr pointer) { return {pointer, Side::ANY}; }
inline Range host(const void *pointer) { return {reinterpret_cast<uintptr_t>(pointer), Side::HOST}; }

// Memory is checked when the copy is asked for and again when it happens, which for a graph is each time.
inline Item copy_item(const std::string &what, Range to, Range from, size_t bytes) {
    return [=] {
        if (!to.check(bytes, what) || !from.check(bytes, what))
            return code::ILLEGAL_ADDRESS;
        std::memmove(reinterpret_cast<void *>(to.address), reinterpret_cast<const void *>(from.address), bytes);
        return code::SUCCESS;
    };
}

inline Item staged_copy_item(const std::string &what, Range to, Range from, size_t bytes) {
    const auto *first = reinterpret_cast<const char *>(from.address);
    auto staged = std::make_shared<std::vector<char>>(first, first + bytes);
    return [staged, run = copy_item(what, to, host(staged->data()), bytes)] { return run(); };
}

// Pageable memory is read at the call, and a copy into it is over at the return; a graph does either when it runs.
inline int copy(std::string &line, Range to, Range from, size_t bytes, CUstream stream) {
    line += " " + driver->memory.describe(to.address) + " <- " + driver->memory.describe(from.address) + " " +
            std::to_string(bytes) + " bytes " + driver->name(stream);
    if (!driver->known(stream))
        return code::INVALID_HANDLE;
    if (bytes == 0)
        return code::SUCCESS;
    if (!to.check(bytes, line) || !from.check(bytes, line))
        return code::ILLEGAL_ADDRESS;
    bool captured = stream != nullptr && stream->capture != nullptr;
    bool staged = from.pageable() && !captured;
    int result = driver->submit(stream, (staged ? staged_copy_item : copy_item)(line, to, from, bytes));
    return result == code::SUCCESS && to.pageable() && !captured ? driver->drain(stream) : result;
}

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    return call("cuMemcpyHtoDAsync_v2", READY | CONTEXT,
                [&](std::string &line) { return copy(line, device(to), host(from), bytes, stream); });
}

EXPORT CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return call("cuMemcpyDtoHAsync_v2", READY | CONTEXT,
                [&](std::string &line) { return copy(line, host(to), device(from), bytes, stream); });
}

EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return call("cuMemcpyDtoDAsync_v2", READY | CONTEXT,
                [&](std::string &line) { return copy(line, device(to), device(from), bytes, stream); });
}

EXPORT CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return call("cuMemcpyAsync", READY | CONTEXT,
                [&](std::string &line) { return copy(line, any(to), any(from), bytes, stream); });
}

EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) {
    return call("cuMemcpyHtoD_v2", READY | CONTEXT | NO_CAPTURE,
                [&](std::string &line) { return copy(line, device(to), host(from), bytes, nullptr); });
}

EXPORT CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) {
    return call("cuMemcpyDtoH_v2", READY | CONTEXT | NO_CAPTURE,
                [&](std::string &line) { return copy(line, host(to), device(from), bytes, nullptr); });
}

template <class Value> int fill(std::string &line, CUdeviceptr to, Value value, size_t count, CUstream stream) {
    line += " " + driver->memory.describe(to) + " = " + std::to_string(value) + " x " + std::to_string(count) + " " +
            driver->name(stream);
    if (!driver->known(stream))
        return code::INVALID_HANDLE;
    if (to % sizeof(Value) != 0)
        return code::INVALID_VALUE;
    Item item = [to, value, count, what = line] {
        if (!driver->memory.check_device(to, count * sizeof(Value), what))
            return code::ILLEGAL_ADDRESS;
        std::fill_n(reinterpret_cast<Value *>(to), count, value);
        return code::SUCCESS;
    };
    bool sound = count == 0 || driver->memory.check_device(to, count * sizeof(Value), line);
    return !sound ? code::ILLEGAL_ADDRESS : count == 0 ? code::SUCCESS : driver->submit(stream, std::move(item));
}

EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
    return call("cuMemsetD8Async", READY | CONTEXT,
                [&](std::string &line) { return fill(line, to, value, count, stream); });
}

EXPORT CUresult cuMemsetD32Async(CUdeviceptr to, unsigned int value, size_t count, CUstream stream) {
    return call("cuMemsetD32Async", READY | CONTEXT,
                [&](std::string &line) { return fill(line, to, value, count, stream); });
}

EXPORT CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    return call("cuPointerGetAttribute", READY | CONTEXT, [&](std::string &line) {
        line += " " + std::to_string(attribute) + " " + driver->memory.describe(pointer);
        const Allocation *found = driver->memory.find(pointer);
        if (found == nullptr)
            return code::INVALID_VALUE;
        switch (attribute) {
        case 1:
            *static_cast<CUcontext *>(data) = &driver->context;
            return code::SUCCESS;
        case 2: // 1: host, 2: device
            *static_cast<unsigned int *>(data) = found->device ? 2 : 1;
            return code::SUCCESS;
        case 3:
            *static_cast<CUdeviceptr *>(data) = pointer;
            return code::SUCCESS;
        case 9:
            *static_cast<int *>(data) = 0;
            return code::SUCCESS;
        default:
            return code::INVALID_VALUE;
        }
    });
}
