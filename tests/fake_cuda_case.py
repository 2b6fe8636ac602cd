"""What the tests of the fake CUDA driver share: its functions by name, a fixture, its error codes."""

import ctypes
import re

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import fake_cuda
import torch

from rlsd.kernels import aot

if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, INVALID_IMAGE, INVALID_CONTEXT, NO_BINARY = 1, 2, 3, 200, 201, 209
INVALID_HANDLE, ILLEGAL_STATE, NOT_FOUND, NOT_READY, ILLEGAL_ADDRESS, NOT_PERMITTED = 400, 401, 500, 600, 700, 800
UNSUPPORTED, INVALIDATED, UNJOINED, ISOLATION, IMPLICIT = 900, 901, 904, 905, 906
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
NON_BLOCKING = 1
FAKE = fake_cuda.load()


class Cuda:
    """The driver's functions by name; Python integers are 64 bits wide, which all integer registers are."""

    def result(self, name, *arguments):
        wide = [ctypes.c_size_t(each & 2**64 - 1) if isinstance(each, int) else each for each in arguments]
        return getattr(FAKE.library, name)(*wide)

    def __call__(self, name, *arguments):
        assert self.result(name, *arguments) == 0, FAKE.faults()

    def get(self, name, *arguments):
        """What a function writes to the place that its first argument names, or its second after a stream."""
        place, second = ctypes.c_uint64(0), name in ("cuStreamEndCapture", "cuStreamIsCapturing")
        self(name, *arguments[:second], ctypes.byref(place), *arguments[second:])
        return place.value

    def put(self, values):
        values = np.ascontiguousarray(values)
        pointer = self.get("cuMemAlloc_v2", values.nbytes)
        self("cuMemcpyHtoD_v2", pointer, values.ctypes.data, values.nbytes)
        return pointer

    def read(self, pointer, shape, dtype=np.float32):
        values = np.empty(shape, dtype)
        self("cuMemcpyDtoH_v2", values.ctypes.data, pointer, values.nbytes)
        return values

    def load(self, name):
        cubin = fake_cuda.fake_cubin(KERNELS[name], 90)
        function = self.get("cuModuleGetFunction", self.get("cuModuleLoadData", cubin.binary), cubin.entry.encode())
        if cubin.shared > 49152:
            self("cuFuncSetAttribute", function, 8, cubin.shared)
        return function, cubin

    def launch(self, loaded, grid, values, stream=0, block=None, shared=None):
        function, cubin = loaded
        kinds = {"fp32": ctypes.c_float, "i32": ctypes.c_int32}
        numbers = [kinds.get(kind, ctypes.c_uint64)(v) for (_, kind), v in zip(cubin.arguments, [*values, 0, 0])]
        places = (ctypes.c_void_p * len(numbers))(*[ctypes.addressof(each) for each in numbers])
        grid, block = (*grid, 1, 1)[:3], block or (32 * cubin.kernel.warps, 1, 1)
        shared = cubin.shared if shared is None else shared
        return self.result("cuLaunchKernel", function, *grid, *block, shared, stream, places, None)


KERNELS = {kernel.name: kernel for kernel in aot.kernels(precise=True)}


@pytest.fixture(name="cuda")
def cuda_fixture():
    """An initialised driver with a current context; no test may leave a fault that it has not cleared."""
    FAKE.reset()
    cuda = Cuda()
    cuda("cuInit", 0)
    cuda("cuCtxSetCurrent", cuda.get("cuDevicePrimaryCtxRetain", 0))
    yield cuda
    FAKE.check()


def faulty(text):
    """These faults and no others, each found by a pattern in its line."""
    lines = FAKE.faults().splitlines()
    FAKE.clear_faults()
    patterns = [text] if isinstance(text, str) else text
    assert len(lines) == len(patterns) and all(re.search(p, line) for p, line in zip(patterns, lines)), lines


def capture(cuda, stream, work, mode=0):
    cuda("cuStreamBeginCapture_v2", stream, mode)
    work()
    return cuda.get("cuGraphInstantiateWithFlags", cuda.get("cuStreamEndCapture", stream), 0)
