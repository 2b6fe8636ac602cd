// A stand-in for libcuda.so.1 that needs no GPU: device memory is host memory, streams are lazy, every call is written
// down, misuse is recorded as a fault. tests/fake_cuda.py builds and drives it; control.h says what it can be told.
//
//     g++ -std=c++20 -O1 -fPIC -shared -fvisibility=hidden fake_cuda.cpp -o libfake_cuda.so
//
// What differs from a driver: the null stream runs its work at once; the work of other streams is run by whoever waits
// for it; only the null stream may be used from inside a callback; errors of work that is run late are given once, to
// the caller that waits, and do not stick to the context.
#include "driver.h"
#include "control.h"
#include "basic_api.h"
#include "memory_api.h"
#include "stream_api.h"
#include "graph_api.h"
#include "kernel_api.h"
