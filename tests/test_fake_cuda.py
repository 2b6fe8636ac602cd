"""The fake CUDA driver itself: lazy streams, captures, memory, faults."""

import ctypes
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import fake_cuda
from fake_cuda_case import (
    FAKE,
    HOST_FUNCTION,
    ILLEGAL_ADDRESS,
    ILLEGAL_STATE,
    IMPLICIT,
    INVALID_CONTEXT,
    INVALID_HANDLE,
    INVALID_VALUE,
    INVALIDATED,
    ISOLATION,
    KERNELS,
    NON_BLOCKING,
    NOT_INITIALIZED,
    NOT_PERMITTED,
    NOT_READY,
    OUT_OF_MEMORY,
    UNJOINED,
    UNSUPPORTED,
    Cuda,
    capture,
    cuda_fixture,  # noqa: F401
    faulty,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_it_exports_the_symbols_of_a_driver():
    source = "".join(path.read_text() for path in sorted(fake_cuda.SOURCES.glob("*_api.h")))
    symbols = re.findall(r"^EXPORT CUresult (cu\w+)\(", source, re.MULTILINE)
    assert sorted(symbols) == sorted(SYMBOLS.split())
    for symbol in symbols:
        assert getattr(FAKE.library, symbol)
    assert ctypes.c_int.in_dll(FAKE.library, "rlsd_fake_driver").value == 1


SYMBOLS = """
cuCtxGetCurrent cuCtxPopCurrent_v2 cuCtxPushCurrent_v2 cuCtxSetCurrent cuCtxSynchronize cuDeviceGet
cuDeviceGetAttribute cuDeviceGetCount cuDeviceGetName cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxRetain
cuDeviceTotalMem_v2 cuDriverGetVersion cuEventCreate cuEventDestroy_v2 cuEventElapsedTime cuEventQuery cuEventRecord
cuEventSynchronize cuFuncSetAttribute cuGetErrorName cuGetErrorString cuGraphDestroy cuGraphExecDestroy
cuGraphInstantiateWithFlags cuGraphLaunch cuInit cuLaunchHostFunc cuLaunchKernel cuMemAlloc_v2 cuMemFreeHost
cuMemFree_v2 cuMemGetInfo_v2 cuMemHostAlloc cuMemcpyAsync cuMemcpyDtoDAsync_v2 cuMemcpyDtoHAsync_v2 cuMemcpyDtoH_v2
cuMemcpyHtoDAsync_v2 cuMemcpyHtoD_v2 cuMemsetD32Async cuMemsetD8Async cuModuleGetFunction cuModuleLoadData
cuModuleUnload cuPointerGetAttribute cuStreamBeginCapture_v2 cuStreamCreate cuStreamDestroy_v2 cuStreamEndCapture
cuStreamIsCapturing cuStreamQuery cuStreamSynchronize cuStreamWaitEvent
"""


def test_its_declarations_are_those_of_cuda_h():
    """Triton brings NVIDIA's header, which is included in place of the fake's own types."""
    import triton

    header = Path(triton.__file__).parent / "backends/nvidia/include/cuda.h"
    if not header.exists():
        pytest.skip("this Triton has no cuda.h")
    command = [*fake_cuda.compiler(), "-std=c++20", "-fsyntax-only", f'-DFAKE_CUDA_HEADER="{header}"']
    subprocess.run([*command, fake_cuda.SOURCES / "fake_cuda.cpp"], check=True)


def test_its_cubins_say_what_the_compiler_says():
    """Entry and arguments, for one kernel of each room."""
    names = ["repulsion_distances_4", "bias_residual_fp16", "operator_input_fp16_nchw"]
    program = "from rlsd.kernels import aot\nfor kernel in aot.kernels():\n"
    program += f"    if kernel.name in {names}: print(aot.compile_kernel(kernel, 90).line)"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    given = {name: fake_cuda.fake_cubin(KERNELS[name], 90).line.split(" ") for name in names}
    for line in ran.stdout.splitlines():
        words = line.split(" ")
        wanted = given.pop(words[1])
        assert words[:6] + words[7:] == wanted[:6] + wanted[7:]  # all but the shared memory
    assert not given


def test_the_device(cuda):
    assert cuda.get("cuDeviceGetCount") == 1 and cuda.result("cuDeviceGet", ctypes.byref(ctypes.c_int()), 1) == 101
    FAKE.set_capability(8, 6)
    assert [cuda.get("cuDeviceGetAttribute", each, 0) for each in (75, 76, 16, 97)] == [8, 6, 132, 101376]
    FAKE.set_memory(2**20)
    cuda.get("cuMemAlloc_v2", 1000)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    cuda("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    assert (free.value, total.value) == (2**20 - 1000, 2**20)
    text = ctypes.c_char_p()
    cuda("cuGetErrorName", 901, ctypes.byref(text))
    assert text.value == b"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
    assert cuda.result("cuGetErrorString", 12345, ctypes.byref(text)) == INVALID_VALUE and text.value is None


def test_nothing_works_without_initialisation_and_context():
    FAKE.reset()
    cuda, place = Cuda(), ctypes.byref(ctypes.c_uint64())
    assert cuda.result("cuDeviceGetCount", place) == NOT_INITIALIZED
    cuda("cuInit", 0)
    assert cuda.result("cuMemAlloc_v2", place, 16) == INVALID_CONTEXT
    context = cuda.get("cuDevicePrimaryCtxRetain", 0)
    cuda("cuCtxPushCurrent_v2", context)
    assert cuda.get("cuMemAlloc_v2", 16) and cuda.get("cuCtxGetCurrent") == context
    in_thread = []
    thread = threading.Thread(target=lambda: in_thread.append(cuda.result("cuMemAlloc_v2", place, 16)))
    thread.start()
    thread.join()
    assert in_thread == [INVALID_CONTEXT]
    assert cuda.get("cuCtxPopCurrent_v2") == context and not cuda.get("cuCtxGetCurrent")


def test_a_stream_runs_when_it_is_waited_for(cuda):
    first, second = (cuda.get("cuStreamCreate", NON_BLOCKING) for _ in range(2))
    pointer = cuda.put(np.zeros(4, np.int32))
    seen = FAKE.library, (ctypes.c_int * 4).from_address(pointer)
    cuda("cuMemsetD32Async", pointer, 7, 4, first)
    cuda("cuMemsetD8Async", pointer, 1, 4, first)
    assert list(seen[1]) == [0, 0, 0, 0]
    cuda("cuStreamSynchronize", second)
    assert list(seen[1]) == [0, 0, 0, 0]
    assert cuda.result("cuStreamQuery", first) == NOT_READY and list(seen[1]) == [7, 7, 7, 7]
    assert cuda.result("cuStreamQuery", first) == 0 and seen[1][0] == 0x01010101
    assert FAKE.log()[-1] == "cuStreamQuery stream 1" and FAKE.log()[-2] == "cuStreamQuery stream 1 -> 600"


def test_the_null_stream_waits_for_blocking_streams_alone(cuda):
    blocking, other = cuda.get("cuStreamCreate", 0), cuda.get("cuStreamCreate", NON_BLOCKING)
    a, b = cuda.put(np.zeros(1, np.int32)), cuda.put(np.zeros(1, np.int32))
    cuda("cuMemsetD32Async", a, 7, 1, blocking)
    cuda("cuMemsetD32Async", b, 7, 1, other)
    assert cuda.read(a, 1, np.int32) == 7 and cuda.read(b, 1, np.int32) == 0
    cuda("cuCtxSynchronize")
    assert cuda.read(b, 1, np.int32) == 7


def test_pinned_memory_is_read_late_and_pageable_memory_early(cuda):
    stream, size = cuda.get("cuStreamCreate", NON_BLOCKING), 16
    place = cuda.get("cuMemHostAlloc", size, 0)
    pinned, pageable = np.ctypeslib.as_array((ctypes.c_float * 4).from_address(place)), np.ones(4, np.float32)
    assert np.isnan(pinned).all()
    to_a, to_b = (cuda.get("cuMemAlloc_v2", size) for _ in range(2))
    cuda("cuMemcpyHtoDAsync_v2", to_a, place, size, stream)
    cuda("cuMemcpyHtoDAsync_v2", to_b, pageable.ctypes.data, size, stream)
    pinned[:], pageable[:] = 5, 6
    cuda("cuStreamSynchronize", stream)
    assert (cuda.read(to_a, 4) == 5).all() and (cuda.read(to_b, 4) == 1).all()
    cuda("cuMemcpyDtoHAsync_v2", place, to_b, size, stream)
    assert (pinned == 5).all()
    cuda("cuMemcpyDtoHAsync_v2", pageable.ctypes.data, to_a, size, stream)  # pageable: over at the return
    assert (pinned == 1).all() and (pageable == 5).all()
    assert cuda.get("cuPointerGetAttribute", 2, to_a) == 2 and cuda.get("cuPointerGetAttribute", 2, place) == 1
    place = ctypes.byref(ctypes.c_uint64())
    assert cuda.result("cuPointerGetAttribute", place, 2, pageable.ctypes.data) == INVALID_VALUE


def test_an_event_is_what_links_two_streams(cuda):
    first, second = (cuda.get("cuStreamCreate", NON_BLOCKING) for _ in range(2))
    event, end = cuda.get("cuEventCreate", 0), cuda.get("cuEventCreate", 0)
    a, b, c = (cuda.put(np.full(1, n, np.int32)) for n in (1, 2, 3))
    cuda("cuMemcpyDtoDAsync_v2", b, a, 4, first)
    cuda("cuEventRecord", event, first)
    cuda("cuMemsetD32Async", a, 9, 1, first)
    cuda("cuStreamWaitEvent", second, event, 0)
    cuda("cuMemcpyAsync", c, b, 4, second)
    cuda("cuEventRecord", end, second)
    assert cuda.result("cuEventElapsedTime", ctypes.byref(ctypes.c_float()), event, end) == NOT_READY
    cuda("cuEventSynchronize", end)
    assert cuda.read(c, 1, np.int32) == 1 and cuda.read(a, 1, np.int32) == 1
    assert cuda.result("cuEventQuery", event) == 0 and cuda.result("cuStreamQuery", first) == 0
    took = ctypes.c_float(-1)
    cuda("cuEventElapsedTime", ctypes.byref(took), event, end)
    assert took.value >= 0 and cuda.read(a, 1, np.int32) == 9


def test_host_functions_may_use_stream_0_alone(cuda):
    stream, pointer, results = cuda.get("cuStreamCreate", 0), cuda.put(np.zeros(1, np.int32)), []

    @HOST_FUNCTION
    def work(data):
        results.append(data)
        results.append(cuda.result("cuMemsetD32Async", pointer, 5, 1, 0))
        results.append(int(cuda.read(pointer, 1, np.int32)[0]))
        results.append(cuda.result("cuStreamSynchronize", stream))
        results.append(cuda.result("cuMemsetD32Async", pointer, 6, 1, stream))

    cuda("cuLaunchHostFunc", stream, work, 99)
    cuda("cuMemsetD32Async", pointer, 7, 1, stream)
    assert results == []
    cuda("cuStreamSynchronize", stream)
    assert results == [99, 0, 5, NOT_PERMITTED, NOT_PERMITTED] and cuda.read(pointer, 1, np.int32) == 7
    faulty(["stream 1 inside a callback"] * 2)


def test_a_graph_replays_its_arguments_on_present_memory(cuda):
    stream = cuda.get("cuStreamCreate", NON_BLOCKING)
    a, b = cuda.put(np.zeros(1, np.int32)), cuda.put(np.zeros(1, np.int32))

    def work():
        assert cuda.get("cuStreamIsCapturing", stream) == 1
        cuda("cuMemcpyDtoDAsync_v2", b, a, 4, stream)
        cuda("cuMemsetD32Async", a, 8, 1, stream)

    graph = capture(cuda, stream, work)
    cuda("cuStreamSynchronize", stream)
    assert cuda.read(a, 1, np.int32) == 0 and cuda.get("cuStreamIsCapturing", stream) == 0
    for old, new in ((0, 0), (8, 8)):
        cuda("cuGraphLaunch", graph, stream)
        assert cuda.read(a, 1, np.int32) == old
        cuda("cuStreamSynchronize", stream)
        assert cuda.read(b, 1, np.int32) == new and cuda.read(a, 1, np.int32) == 8
    cuda("cuMemFree_v2", b)
    cuda("cuGraphLaunch", graph, stream)
    assert cuda.result("cuStreamSynchronize", stream) == ILLEGAL_ADDRESS
    faulty(r"cuMemcpyDtoDAsync_v2 .*: memory 2 \(freed\) is not device memory")


def test_a_capture_takes_in_other_streams_by_events(cuda):
    first, second = (cuda.get("cuStreamCreate", NON_BLOCKING) for _ in range(2))
    event, a = cuda.get("cuEventCreate", 2), cuda.put(np.zeros(1, np.int32))

    def fork():
        cuda("cuEventRecord", event, first)
        cuda("cuStreamWaitEvent", second, event, 0)
        cuda("cuMemsetD32Async", a, 4, 1, second)

    def fork_and_join():
        fork()
        cuda("cuEventRecord", event, second)
        cuda("cuStreamWaitEvent", first, event, 0)

    cuda("cuGraphLaunch", capture(cuda, first, fork_and_join), first)
    assert cuda.read(a, 1, np.int32) == 0
    cuda("cuStreamSynchronize", first)
    assert cuda.read(a, 1, np.int32) == 4
    cuda("cuStreamBeginCapture_v2", first, 0)
    fork()
    assert cuda.result("cuStreamEndCapture", first, ctypes.byref(ctypes.c_uint64())) == UNJOINED
    assert cuda.get("cuStreamIsCapturing", second) == 0


FORBIDDEN = [
    (lambda cuda, stream: cuda.result("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), 4), UNSUPPORTED, (0, 1)),
    (lambda cuda, stream: cuda.result("cuMemFree_v2", cuda.pointer), UNSUPPORTED, (0, 1)),
    (lambda cuda, stream: cuda.result("cuMemcpyDtoH_v2", b"1234", cuda.pointer, 4), UNSUPPORTED, (0, 1)),
    (lambda cuda, stream: cuda.result("cuStreamSynchronize", stream), UNSUPPORTED, (0, 1, 2)),
    (lambda cuda, stream: cuda.result("cuStreamQuery", stream), UNSUPPORTED, (0, 1, 2)),
    (lambda cuda, stream: cuda.result("cuCtxSynchronize"), UNSUPPORTED, (0, 1, 2)),
    (lambda cuda, stream: cuda.result("cuMemsetD8Async", cuda.pointer, 0, 1, 0), IMPLICIT, (0, 1, 2)),
    (lambda cuda, stream: cuda.result("cuStreamWaitEvent", stream, cuda.event, 0), ISOLATION, (0, 1, 2)),
]


@pytest.mark.parametrize("call, code, modes", FORBIDDEN)
def test_what_a_capture_forbids_also_ends_it(cuda, call, code, modes):
    stream = cuda.get("cuStreamCreate", 0)
    cuda.pointer, cuda.event, graph = cuda.put(np.zeros(4, np.int32)), cuda.get("cuEventCreate", 0), ctypes.c_uint64(1)
    cuda("cuEventRecord", cuda.event, 0)
    for mode in modes:
        cuda("cuStreamBeginCapture_v2", stream, mode)
        assert cuda.result("cuStreamBeginCapture_v2", stream, mode) == ILLEGAL_STATE
        cuda("cuMemGetInfo_v2", ctypes.byref(ctypes.c_size_t()), ctypes.byref(ctypes.c_size_t()))
        assert call(cuda, stream) == code
        assert cuda.get("cuStreamIsCapturing", stream) == 2
        assert cuda.result("cuMemsetD8Async", cuda.pointer, 0, 1, stream) == INVALIDATED
        assert cuda.result("cuStreamEndCapture", stream, ctypes.byref(graph)) == INVALIDATED and graph.value == 0
    assert cuda.result("cuStreamEndCapture", stream, ctypes.byref(graph)) == ILLEGAL_STATE


def test_a_relaxed_capture_allows_allocation(cuda):
    stream, made = cuda.get("cuStreamCreate", 0), []
    capture(cuda, stream, lambda: made.append(cuda.get("cuMemAlloc_v2", 4)), mode=2)
    cuda("cuMemFree_v2", made[0])


def test_wrong_copies(cuda):
    a, b, host = cuda.put(np.zeros(4, np.int32)), cuda.put(np.zeros(4, np.int32)), np.zeros(8, np.int32)
    copies = [
        ("cuMemcpyHtoD_v2", (a + 4, host.ctypes.data, 16), r"16 bytes at memory 1\+4, which has 12 left"),
        ("cuMemcpyHtoD_v2", (host.ctypes.data, host.ctypes.data, 16), "host is not device memory"),
        ("cuMemcpyDtoH_v2", (host.ctypes.data, a - 8, 4), "host is not device memory"),
        ("cuMemcpyDtoH_v2", (b, a, 4), "memory 2 is device memory, not host memory"),
        ("cuMemcpyDtoDAsync_v2", (b, a, 17, 0), "17 bytes at memory 2"),
        ("cuMemcpyAsync", (b, 0, 4, 0), "null pointer"),
        ("cuMemsetD32Async", (a, 0, 5, 0), "20 bytes at memory 1, which has 16 left"),
    ]
    for name, arguments, text in copies:
        assert cuda.result(name, *arguments) == ILLEGAL_ADDRESS
        faulty(f"^{name} .*: {text}")
    cuda("cuMemFree_v2", a)
    assert cuda.result("cuMemcpyDtoH_v2", host.ctypes.data, a, 4) == ILLEGAL_ADDRESS
    assert cuda.result("cuMemFree_v2", a) == INVALID_VALUE and cuda.result("cuMemFreeHost", b) == INVALID_VALUE
    faulty([r"memory 1 \(freed\) is not device", r"free of memory 1 \(freed\)", "free of memory 2.*not pinned"])


def test_memory_is_poisoned_aligned_and_guarded(cuda):
    pointers = [cuda.get("cuMemAlloc_v2", size) for size in (4, 5, 300)]
    assert all(pointer % 256 == 0 for pointer in pointers) and np.isnan(cuda.read(pointers[0], 1))
    assert [FAKE.extent(pointers[2] + n) for n in (-1, 0, 299, 300)] == [0, 300, 1, 0]
    ctypes.memset(pointers[1] + 5, 0, 1)
    faulty("now: write behind memory 2")
    ctypes.memset(pointers[2] - 1, 0, 1)
    assert cuda.result("cuMemFree_v2", pointers[0]) == ILLEGAL_ADDRESS
    faulty("free: write before memory 3")
    stream = cuda.get("cuStreamCreate", 0)
    work = HOST_FUNCTION(lambda data: ctypes.memset(pointers[1] + 5, 0, 1))
    cuda("cuLaunchHostFunc", stream, work, None)
    assert cuda.result("cuStreamSynchronize", stream) == ILLEGAL_ADDRESS
    faulty("host function: write behind memory 2")


def test_memory_ends(cuda):
    FAKE.set_memory(1000)
    first = cuda.get("cuMemAlloc_v2", 600)
    assert cuda.result("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), 401) == OUT_OF_MEMORY
    cuda("cuMemFree_v2", first)
    assert cuda.get("cuMemAlloc_v2", 1000)
    assert FAKE.log()[-4:] == [
        "cuMemAlloc_v2 600 bytes at memory 1",
        "cuMemAlloc_v2 401 bytes -> 2",
        "cuMemFree_v2 memory 1",
        "cuMemAlloc_v2 1000 bytes at memory 2",
    ]


def test_calls_fail_as_told(cuda):
    FAKE.fail("cuMemAlloc_v2", 2, 2)
    FAKE.fail("cuMemAlloc_v2", 3, 999)
    FAKE.fail("cuCtxSynchronize", 1, 719)
    place = ctypes.byref(ctypes.c_uint64())
    assert [cuda.result("cuMemAlloc_v2", place, 4) for _ in range(4)] == [0, 2, 999, 0]
    assert [cuda.result("cuCtxSynchronize") for _ in range(2)] == [719, 0] and FAKE.count("cuMemAlloc_v2") == 4


def test_leaks_are_listed(cuda):
    assert FAKE.live() == "context retained 1 times\n"
    memory, pinned = cuda.get("cuMemAlloc_v2", 7), cuda.get("cuMemHostAlloc", 9, 0)
    stream, event = cuda.get("cuStreamCreate", 0), cuda.get("cuEventCreate", 0)
    module = cuda.get("cuModuleLoadData", fake_cuda.fake_cubin(KERNELS["start"], 90).binary)
    cuda("cuStreamBeginCapture_v2", stream, 0)
    graph = cuda.get("cuStreamEndCapture", stream)
    execution = cuda.get("cuGraphInstantiateWithFlags", graph, 0)
    kinds = ("memory 1: 7 bytes", "pinned 1: 9 bytes", "stream 1", "event 1", "graph 1", "graph exec 1")
    kinds = (*kinds, "module 1 start", "context retained 1 times")
    assert sorted(FAKE.live().splitlines()) == sorted(kinds)
    ends = {"cuMemFree_v2": memory, "cuMemFreeHost": pinned, "cuStreamDestroy_v2": stream, "cuEventDestroy_v2": event}
    ends |= {"cuModuleUnload": module, "cuGraphDestroy": graph, "cuGraphExecDestroy": execution}
    for name, handle in ends.items():
        cuda(name, handle)
        assert cuda.result(name, handle) in (INVALID_VALUE, INVALID_HANDLE)
    cuda("cuDevicePrimaryCtxRelease_v2", 0)
    assert FAKE.live() == "" and cuda.result("cuCtxSynchronize") == 709
    faulty(["free of", "free of", *["handle that does not exist"] * 5])
