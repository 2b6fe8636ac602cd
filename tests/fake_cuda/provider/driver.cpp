// A stand-in for libcuda.so.1 beneath ONNX Runtime's own CUDA provider, which with runtime.cpp, blas.cpp and dnn.cpp
// opens sessions, places nodes, allocates, launches and records as on a GPU: only that its kernels do nothing. The
// engine takes it for a GPU. tests/fake_provider.py builds all four.
#define FAKE_CUDA_FOR_PROVIDER
#include "../fake_cuda.cpp"
#include "work.h"

EXPORT int fake_cuda_work(CUstream stream, const char *what) {
    return call("work", READY | CONTEXT, [&](std::string &line) {
        line += " " + driver->name(stream) + " " + what;
        return driver->known(stream) ? driver->submit(stream, [] { return code::SUCCESS; }) : code::INVALID_HANDLE;
    });
}

EXPORT CUresult cuTensorMapEncodeTiled() { return static_cast<CUresult>(801); } // not supported
