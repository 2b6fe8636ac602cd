"""The fake CUDA driver of tests/fake_cuda: builds it, drives it, and lets Triton's interpreter run its kernels.

fake = fake_cuda.load()  # the engine loads the same file: RLSD_LIBCUDA=fake.path
fake.reset()
fake.run_kernels()
...
fake.check()  # what went wrong in a kernel, or a fault
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import struct
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

from rlsd.kernels import aot

SOURCES = Path(__file__).parent / "fake_cuda"
FLAGS = shlex.split("-std=c++20 -O1 -fPIC -fvisibility=hidden -pthread -Wall -Wextra -Wpedantic -Werror")
POINTEES = {
    **{"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64},
    **{"i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64},
}
NUMBERS = {"i32": "<i4x", "i64": "<q", "u32": "<I4x", "u64": "<Q", "fp32": "<f4x", "fp64": "<d"}
SHARED = {"repulsion_gradient": 65536}  # more than 48 KiB must be asked for
CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_char * 8), ctypes.c_int
)
_ANSWERS = {"log": ctypes.c_char_p, "faults": ctypes.c_char_p, "live": ctypes.c_char_p}
_ANSWERS |= {"count": ctypes.c_long, "extent": ctypes.c_size_t}


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def build() -> Path:
    """The library, compiled unless these sources have been before."""
    command = [*compiler(), *FLAGS]
    contents = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.is_file()]
    key = hashlib.sha256(b"\0".join([*contents, " ".join(command).encode()])).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"rlsd-fake-cuda-{os.getuid()}-{key}"
    library = folder / "libfake_cuda.so"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        fresh = folder / f"{os.getpid()}.so"
        subprocess.run([*command, "-shared", SOURCES / "fake_cuda.cpp", "-o", fresh], check=True)
        fresh.replace(library)
    return library


@functools.cache
def load() -> FakeCuda:
    return FakeCuda(build())


class FakeCuda:
    """The fake's controls, as tests/fake_cuda/control.h has them; `library` also has the driver's own functions."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)
        for name, kind in _ANSWERS.items():
            getattr(self.library, f"fake_cuda_{name}").restype = kind
        self._raised: list[Exception] = []
        self._callback = CALLBACK()

    def reset(self) -> None:
        """All as at first: nothing is allocated, logged, armed or run; 80 GiB of memory, capability 9.0."""
        self.library.fake_cuda_reset()
        self.run_kernels(False)
        self._raised.clear()

    def set_memory(self, size: int) -> None:
        self.library.fake_cuda_set_memory(ctypes.c_size_t(size))

    def set_capability(self, major: int, minor: int) -> None:
        self.library.fake_cuda_set_capability(major, minor)

    def fail(self, function: str, nth: int = 1, code: int = 2) -> None:
        """The nth call of that function from now on does nothing and returns this code."""
        self.library.fake_cuda_fail(function.encode(), ctypes.c_long(nth), code)

    def count(self, function: str) -> int:
        return self.library.fake_cuda_count(function.encode())

    def log(self) -> list[str]:
        """Every call so far: `cuLaunchKernel step_z_fp16_nchw grid 4,2,1 stream 3`, and ` -> code` if it failed."""
        return self.library.fake_cuda_log().decode().splitlines()

    def clear_log(self) -> None:
        self.library.fake_cuda_clear_log()

    def faults(self) -> str:
        return self.library.fake_cuda_faults().decode()

    def clear_faults(self) -> None:
        self.library.fake_cuda_clear_faults()

    def live(self) -> str:
        """What has not been given back, one a line."""
        return self.library.fake_cuda_live().decode()

    def extent(self, pointer: int) -> int:
        return self.library.fake_cuda_extent(ctypes.c_ulonglong(pointer))

    @contextlib.contextmanager
    def context(self):
        """The device's context is current on this thread, as torch's or CuPy's allocations make it."""
        library, context = self.library, ctypes.c_void_p()
        assert library.cuInit(0) == library.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
        assert library.cuCtxSetCurrent(context) == 0
        yield
        assert library.cuCtxSetCurrent(None) == library.cuDevicePrimaryCtxRelease_v2(0) == 0

    def current(self) -> int | None:
        """The context that is current on this thread."""
        context = ctypes.c_void_p()
        assert self.library.cuCtxGetCurrent(ctypes.byref(context)) == 0
        return context.value

    def run_kernels(self, run: bool = True) -> None:
        """Run every kernel that is launched by Triton's interpreter; without this they only are written down."""
        known = {kernel.name: kernel for kernel in aot.kernels(precise=True)} if run else {}
        one_at_a_time = threading.Lock()  # the interpreter's grid belongs to the process

        def launch(line, grid, arguments, count):
            try:
                with one_at_a_time:
                    self._run(known, line.decode(), tuple(grid[:3]), [arguments[i].raw for i in range(count)])
            except Exception as error:
                self._raised.append(error)

        callback = CALLBACK(launch) if run else CALLBACK()
        self.library.fake_cuda_on_launch(callback)
        self._callback = callback  # only now: the one before was in use

    def check(self) -> None:
        """Raise what a kernel raised first; there are no faults."""
        if self._raised:
            raise self._raised.pop(0)
        assert self.faults() == ""

    def _run(self, known: dict, line: str, grid: tuple[int, ...], values: list[bytes]) -> None:
        words = line.split()
        kernel = known[words[1]]
        types = [word.split(":") for word in words if ":" in word]
        given = {name: self._argument(kind, raw) for (name, kind), raw in zip(types[:-2], values)}
        for name, kind in kernel.signature.items():
            if kind.endswith(":16") and not kind.startswith("*"):
                assert given[name] % 16 == 0, f"{kernel.name}: {name} is {given[name]}, promised is a multiple of 16"
        kernel.function[grid](**given, **kernel.constants)

    def _argument(self, kind: str, raw: bytes) -> object:
        """A number, or a flat tensor over the memory from here to the end of its allocation."""
        if not kind.startswith("*"):
            return struct.unpack(NUMBERS[kind], raw)[0]
        pointer, dtype = int.from_bytes(raw, "little"), POINTEES[kind[1:]]
        extent = self.extent(pointer) or dtype.itemsize  # of host memory, where networks run on the host: an anchor
        memory = (ctypes.c_char * extent).from_address(pointer)
        return torch.frombuffer(memory, dtype=dtype, count=extent // dtype.itemsize)


def fake_cubin(kernel: aot.Kernel, arch: int) -> aot.Cubin:
    """What aot.compile_kernel gives, without compiling: the fake's text for a binary."""
    arguments = aot.arguments(kernel)
    entry, shared = kernel.function.__name__, SHARED.get(kernel.name, 1024)
    line = aot.Cubin(kernel, arch, b"", entry, shared, arguments).line
    return aot.Cubin(kernel, arch, f"fake cubin\n{line}\n".encode(), entry, shared, arguments)


def fake_cubin_bundle_lines(arch: int) -> list[tuple[str, bytes, str]]:
    """(file name, contents, manifest line) of every kernel."""
    cubins = [fake_cubin(kernel, arch) for kernel in aot.kernels(precise=True)]
    return [(cubin.file, cubin.binary, cubin.line) for cubin in cubins]
