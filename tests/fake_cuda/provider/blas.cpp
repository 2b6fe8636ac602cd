// Stand-ins for libcublas.so.13 and libcublasLt.so.13: a product is queued as `cublasX MxNxK of B`, and computes nothing.
#include "work.h"

#include <cstdlib>
#include <cstring>
#include <string>

namespace {

constexpr int EXECUTION_FAILED = 13;

int product(CUstream stream, const char *name, long m, long n, long k, long batch = 1) {
    std::string line = std::string(name) + " " + std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k);
    if (batch != 1)
        line += " of " + std::to_string(batch);
    return fake_cuda_work(stream, line.c_str()) == 0 ? 0 : EXECUTION_FAILED;
}

int made(void **object) {
    *object = std::calloc(1, 256);
    return *object != nullptr ? 0 : 3;
}

int freed(void *object) {
    std::free(object);
    return 0;
}

} // namespace

EXPORT int cublasCreate_v2(Handle **handle) { return make(handle); }
EXPORT int cublasDestroy_v2(Handle *handle) { return unmake(handle); }
EXPORT int cublasSetStream_v2(Handle *handle, CUstream stream) { return put_on(handle, stream); }
EXPORT int cublasSetMathMode(Handle *, int) { return 0; }
EXPORT int cublasGetMathMode(Handle *, int *mode) {
    *mode = 0;
    return 0;
}
EXPORT const char *cublasGetStatusName(int) { return "status of the stand-in"; }
EXPORT const char *cublasGetStatusString(int) { return "status of the stand-in"; }

// Both operands may be transposed, which is neither here nor there.
EXPORT int cublasSgemm_v2(Handle *handle, int, int, int m, int n, int k) { return product(handle->stream, "cublasSgemm", m, n, k); }
EXPORT int cublasDgemm_v2(Handle *handle, int, int, int m, int n, int k) { return product(handle->stream, "cublasDgemm", m, n, k); }
EXPORT int cublasGemmEx(Handle *handle, int, int, int m, int n, int k) { return product(handle->stream, "cublasGemmEx", m, n, k); }
EXPORT int cublasSgeam(Handle *handle, int, int, int m, int n) { return product(handle->stream, "cublasSgeam", m, n, 1); }
EXPORT int cublasDgeam(Handle *handle, int, int, int m, int n) { return product(handle->stream, "cublasDgeam", m, n, 1); }
EXPORT int cublasSgemmBatched(Handle *handle, int, int, int m, int n, int k, const void *, const void *, int, const void *,
                              int, const void *, void *, int, int batch) {
    return product(handle->stream, "cublasSgemmBatched", m, n, k, batch);
}
EXPORT int cublasDgemmBatched(Handle *handle, int, int, int m, int n, int k, const void *, const void *, int, const void *,
                              int, const void *, void *, int, int batch) {
    return product(handle->stream, "cublasDgemmBatched", m, n, k, batch);
}
EXPORT int cublasGemmBatchedEx(Handle *handle, int, int, int m, int n, int k, const void *, const void *, int, int,
                               const void *, int, int, const void *, void *, int, int, int batch) {
    return product(handle->stream, "cublasGemmBatchedEx", m, n, k, batch);
}
EXPORT int cublasSgemmStridedBatched(Handle *handle, int, int, int m, int n, int k, const void *, const void *, int,
                                     long long, const void *, int, long long, const void *, void *, int, long long,
                                     int batch) {
    return product(handle->stream, "cublasSgemmStridedBatched", m, n, k, batch);
}
EXPORT int cublasDgemmStridedBatched(Handle *handle, int, int, int m, int n, int k, const void *, const void *, int,
                                     long long, const void *, int, long long, const void *, void *, int, long long,
                                     int batch) {
    return product(handle->stream, "cublasDgemmStridedBatched", m, n, k, batch);
}
EXPORT int cublasGemmStridedBatchedEx(Handle *handle, int, int, int m, int n, int k, const void *, const void *, int, int,
                                      long long, const void *, int, int, long long, const void *, void *, int, int,
                                      long long, int batch) {
    return product(handle->stream, "cublasGemmStridedBatchedEx", m, n, k, batch);
}

#define NOT_EXPECTED(name)                                                                                             \
    EXPORT int name(Handle *handle) { return product(handle->stream, #name, 0, 0, 0); }
NOT_EXPECTED(cublasDgetrfBatched)
NOT_EXPECTED(cublasDgetriBatched)
NOT_EXPECTED(cublasSgetrfBatched)
NOT_EXPECTED(cublasSgetriBatched)
NOT_EXPECTED(cublasScopy_v2)
NOT_EXPECTED(cublasSscal_v2)

// ------------------------------------------------------------ cuBLASLt

struct Layout {
    unsigned long long rows, columns;
};

EXPORT int cublasLtCreate(void **handle) { return made(handle); }
EXPORT int cublasLtDestroy(void *handle) { return freed(handle); }
EXPORT int cublasLtMatmulDescCreate(void **object, int, int) { return made(object); }
EXPORT int cublasLtMatmulDescDestroy(void *object) { return freed(object); }
EXPORT int cublasLtMatmulDescSetAttribute(void *, int, const void *, size_t) { return 0; }
EXPORT int cublasLtMatmulPreferenceCreate(void **object) { return made(object); }
EXPORT int cublasLtMatmulPreferenceDestroy(void *object) { return freed(object); }
EXPORT int cublasLtMatmulPreferenceSetAttribute(void *, int, const void *, size_t) { return 0; }
EXPORT int cublasLtMatrixTransformDescCreate(void **object, int) { return made(object); }
EXPORT int cublasLtMatrixTransformDescDestroy(void *object) { return freed(object); }
EXPORT int cublasLtMatrixTransform() { return EXECUTION_FAILED; }
EXPORT int cublasLtMatmulAlgoInit() { return 0; }
EXPORT int cublasLtMatmulAlgoConfigSetAttribute() { return 0; }
EXPORT int cublasLtMatrixLayoutCreate(Layout **layout, int, unsigned long long rows, unsigned long long columns, long long) {
    *layout = new Layout{rows, columns};
    return 0;
}
EXPORT int cublasLtMatrixLayoutDestroy(Layout *layout) {
    delete layout;
    return 0;
}
EXPORT int cublasLtMatrixLayoutSetAttribute(Layout *, int, const void *, size_t) { return 0; }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int, void *results,
                                          int *count) {
    std::memset(results, 0, 64); // one, which needs no workspace
    *count = 1;
    return 0;
}
EXPORT int cublasLtMatmul(void *, void *, const void *, const void *, const Layout *a, const void *, const Layout *,
                          const void *, const void *, const Layout *, void *, const Layout *d, const void *, void *, size_t,
                          CUstream stream) {
    auto depth = a->rows == d->rows ? a->columns : a->rows; // a may be transposed
    return product(stream, "cublasLtMatmul", long(d->rows), long(d->columns), long(depth));
}
