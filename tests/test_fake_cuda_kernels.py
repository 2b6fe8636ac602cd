"""The fake CUDA driver: modules, launches, and kernels by Triton's interpreter."""

import ctypes
import threading

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import fake_cuda
import torch
from fake_cuda_case import (
    FAKE,
    HOST_FUNCTION,
    ILLEGAL_ADDRESS,
    INVALID_IMAGE,
    INVALID_VALUE,
    KERNELS,
    NON_BLOCKING,
    NOT_FOUND,
    capture,
    cuda_fixture,  # noqa: F401
    faulty,
)

from rlsd.kernels.repulsion import naive as repulsion
from rlsd.kernels.step import Lanes
from rlsd.kernels.step import naive as step

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_modules(cuda):
    cubin, place = fake_cuda.fake_cubin(KERNELS["start"], 90), ctypes.byref(ctypes.c_uint64())
    for image in (b"\x7fELF", b"fake cubin\n", b"fake cubin\nkernel start 90 file start_kernel 4 0 whole:*i32\n"):
        assert cuda.result("cuModuleLoadData", place, image) == INVALID_IMAGE
    for arch, capability, code in ((80, (8, 6), 0), (86, (8, 0), 209), (90, (10, 0), 209), (120, (12, 0), 0)):
        FAKE.set_capability(*capability)
        assert cuda.result("cuModuleLoadData", place, fake_cuda.fake_cubin(KERNELS["start"], arch).binary) == code
    FAKE.set_capability(9, 0)
    module = cuda.get("cuModuleLoadData", cubin.binary + b"anything")
    assert cuda.result("cuModuleGetFunction", place, module, b"start") == NOT_FOUND
    assert cuda.get("cuModuleGetFunction", module, b"start_kernel")


def start_arguments(cuda, rows=1, size=512):
    """Arguments of the kernel `start` for one lane."""
    state = [cuda.get("cuMemAlloc_v2", 4 * rows * size) for _ in range(3)]
    lanes = Lanes.pack([{"slot": 0, "seed": 2**40 + 5, "item": 3, "particle": 2}])
    return [cuda.put(lanes.whole.numpy()), *state, -1, size]


def test_wrong_launches(cuda):
    start, good = cuda.load("start"), start_arguments(cuda)
    host = np.zeros(64, np.int32)
    assert cuda.launch(start, (1,), good) == 0  # without run_kernels it is only written down
    assert FAKE.log()[-1] == "cuLaunchKernel start grid 1,1,1 stream 0"
    wrong = [
        ({"values": [host.ctypes.data, *good[1:]]}, "whole is host, not device memory"),
        ({"values": [0, *good[1:]]}, "whole is null, not device memory"),
        ({"values": [good[0], good[1] + 4, *good[2:]]}, r"value is memory 1\+4, not aligned"),
        ({"values": [*good, good[0]]}, "global_scratch is not null"),
        ({"grid": (0,)}, "grid is out of range"),
        ({"grid": (1, 65536)}, "grid is out of range"),
        ({"block": (64, 1, 1)}, "block is not 128,1,1"),
        ({"shared": 0}, "0 bytes of shared memory, not 1024"),
    ]
    for change, text in wrong:
        assert cuda.launch(start, **{"grid": (1,), "values": good, **change}) == INVALID_VALUE
        faulty(f"^cuLaunchKernel start grid .*: .*{text}")
    function, cubin = cuda.load("repulsion_gradient")
    assert cuda.result("cuFuncSetAttribute", function, 8, 2**20) == INVALID_VALUE
    cuda("cuFuncSetAttribute", function, 8, 49152)
    assert cuda.launch((function, cubin), (1,), [good[0]] * 9 + [16] * 7) == INVALID_VALUE
    faulty("more shared memory than cuFuncSetAttribute asked for")


def test_the_kernel_start(cuda):
    FAKE.run_kernels()
    stream, arguments = cuda.get("cuStreamCreate", NON_BLOCKING), start_arguments(cuda, size=528)
    assert cuda.launch(cuda.load("start"), (2, 1), arguments, stream) == 0
    assert np.isnan(cuda.read(arguments[1], 528)).all()
    cuda("cuStreamSynchronize", stream)
    lanes = Lanes.pack([{"slot": 0, "seed": 2**40 + 5, "item": 3, "particle": 2}])
    wanted = step.start(lanes, *[torch.zeros(1, 528)] * 3, -1)
    for pointer, each in zip(arguments[1:4], wanted):
        np.testing.assert_array_equal(cuda.read(pointer, (1, 528)), each.numpy())


def test_the_kernel_noise_zt_from_a_graph(cuda):
    """Two lanes of three rows; a replay sees the tables and latents of its time."""
    FAKE.run_kernels()
    stream, z = cuda.get("cuStreamCreate", NON_BLOCKING), torch.randn(3, 144)
    row = {"seed": 9, "item": 1, "signal": 0.8, "noise": 0.6}
    tables = [Lanes.pack([{**row, "slot": 2, "step": n}, {}]) for n in (4, 5)]
    inputs = [cuda.put(each.numpy()) for each in (tables[0].whole, tables[0].real, z)]
    outputs = [cuda.get("cuMemAlloc_v2", 2 * 144 * size) for size in (4, 2, 2)]
    kernel, results = cuda.load("noise_zt_fp16_nchw"), []
    graph = capture(cuda, stream, lambda: results.append(cuda.launch(kernel, (2, 2), [*inputs, *outputs, 144], stream)))
    assert results == [0]
    for lanes in tables:
        cuda("cuMemcpyHtoD_v2", inputs[0], lanes.whole.numpy().ctypes.data, 4 * lanes.whole.numel())
        cuda("cuGraphLaunch", graph, stream)
        cuda("cuStreamSynchronize", stream)
        wanted = step.noise_zt(lanes, z, torch.float16)
        got = [cuda.read(p, (2, 144), np.float32 if n == 0 else np.float16) for n, p in enumerate(outputs)]
        np.testing.assert_array_equal(got[0], wanted[0].numpy())
        np.testing.assert_array_equal(got[2], wanted[2].numpy())
        np.testing.assert_allclose(got[1], wanted[1].numpy(), rtol=1e-3, atol=1e-3)


def test_the_kernels_of_repulsion(cuda):
    """One job of 3 particles, two of them in one place, and one of 2: distances, then crowd. Rows are padded."""
    FAKE.run_kernels()
    P, D, values, splits, chunk, jobs, cuts, most = 5, 144, 133, 5, 32, 2, 2, 16
    phi, offsets = torch.randn(P, D), torch.tensor([0, 3, 5], dtype=torch.int32)
    phi[1], phi[:, values:] = phi[0], 0
    words = [torch.tensor(each) for each in ([7, 8], [0, 1], [2, 3])]
    given = [cuda.put(each.numpy()) for each in (phi, offsets, *words)]
    partials, squares, weights, out, h = (
        cuda.get("cuMemAlloc_v2", 4 * count)
        for count in (jobs * splits * most**2, jobs * splits, cuts * jobs * most**2, P * D, P)
    )
    sizes = [D, D, 0, most, most, 1, chunk, 1]
    arguments = [*given[:2], partials, squares, *sizes]
    assert not cuda.launch(cuda.load("repulsion_distances_16"), (1, splits, jobs), arguments)
    arguments = [*given, partials, squares, weights, out, h, D, values, D, splits, 1]
    assert not cuda.launch(cuda.load("repulsion_crowd_16"), (cuts, 1, jobs), arguments)
    FAKE.check()
    R, bandwidths = repulsion.repulsion(phi[:, :values], offsets, *words)
    np.testing.assert_allclose(cuda.read(out, (P, D))[:, :values], R.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cuda.read(h, P), bandwidths.numpy(), rtol=1e-5)
    assert not cuda.read(out, (P, D))[:, values:].any()


def test_the_kernel_of_repulsion_passes_over_a_job_that_is_under_none(cuda):
    FAKE.run_kernels()
    P, D, jobs, most = 5, 16, 2, 16
    steps = np.array([-(2**63), 3], np.int64)
    given = [cuda.put(each) for each in (np.zeros((P, D), np.float32), np.array([0, 3, 5], np.int32),
                                         np.array([7, 8]), np.array([0, 1]), steps)]  # fmt: skip
    partials, squares, weights = (cuda.put(np.zeros(jobs * most**2, np.float32)) for _ in range(3))
    out, h = cuda.put(np.full((P, D), 5, np.float32)), cuda.put(np.full(P, 6, np.float32))
    arguments = [*given, partials, squares, weights, out, h, D, D, D, 1, 1]
    assert not cuda.launch(cuda.load("repulsion_crowd_16"), (1, 1, jobs), arguments)
    FAKE.check()
    assert (cuda.read(out, (P, D))[:3] == 5).all() and (cuda.read(h, P)[:3] == 6).all()
    assert (cuda.read(out, (P, D))[3:] != 5).all() and (cuda.read(h, P)[3:] != 6).all()


def test_what_a_kernel_raises_is_kept(cuda):
    FAKE.run_kernels()
    arguments = start_arguments(cuda)
    assert cuda.launch(cuda.load("start"), (1, 1), [*arguments[:5], 500]) == 0
    with pytest.raises(AssertionError, match="size is 500, promised is a multiple of 16"):
        FAKE.check()


def test_a_kernel_that_writes_too_far_is_named(cuda):
    FAKE.run_kernels()
    arguments = start_arguments(cuda, size=496)
    assert cuda.launch(cuda.load("start"), (1, 1), [*arguments[:5], 512]) == ILLEGAL_ADDRESS
    faulty([f"run of start: write behind memory {n}" for n in (1, 2, 3)])


def test_threads_share_a_stream(cuda):
    """Whoever waits runs the work, in order, once."""
    stream, seen, context = cuda.get("cuStreamCreate", NON_BLOCKING), [], cuda.get("cuCtxGetCurrent")
    works = [HOST_FUNCTION(lambda data, n=n: seen.append(n)) for n in range(200)]

    def wait():
        cuda("cuCtxSetCurrent", context)
        cuda("cuStreamSynchronize", stream)

    for work in works:
        cuda("cuLaunchHostFunc", stream, work, None)
    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == list(range(200))
