// What the stand-ins for NVIDIA's libraries share: work that does nothing, by its name.
#pragma once

#include "../types.h"

#ifndef EXPORT
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// A kernel or a library's call is queued, or recorded in a capture: `work stream 1 NAME` in the log. Returns the
// driver's error code.
EXPORT int fake_cuda_work(CUstream stream, const char *what);
EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *, size_t);
EXPORT CUresult cuMemFree_v2(CUdeviceptr);

// What a caller gets of cuBLAS and cuDNN: it works on a stream, and has a little of the device's memory, which cannot be
// had while anybody records.
struct Handle {
    CUstream stream = nullptr;
    CUdeviceptr room = 0;
};

inline int make(Handle **handle) {
    *handle = new Handle;
    return cuMemAlloc_v2(&(*handle)->room, 4096) == 0 ? 0 : 1;
}
inline int unmake(Handle *handle) {
    cuMemFree_v2(handle->room);
    delete handle;
    return 0;
}
inline int put_on(Handle *handle, CUstream stream) {
    handle->stream = stream;
    return 0;
}
