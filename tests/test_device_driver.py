"""Drivers and ONNX Runtimes that cannot be used, as users meet them: too old, without CUDA, lost in the middle.

The stand-in for the driver with a symbol's name altered in its file is a driver that lacks the function.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from ctypes.util import find_library
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
import fake_cuda
from device_case import NETS, PARAMS, bundle_fixture, fake_fixture  # noqa: F401
from tiny import make_job

from rlsd.engine import Engine, Params, RlsdError, Status, native
from rlsd.engine.native import library

HEADER = Path(__file__).parents[1] / "engine" / "src" / "cuda.h"
FUNCTIONS = re.findall(r"X\(\w+,\s+(cu\w+),", HEADER.read_text())
JOB = make_job(NETS, particles=2, params=Params(gamma=2.0, **{**PARAMS, "steps": 3}))


def without(symbol: str, folder: Path) -> str:
    """A copy of the stand-in that does not export `symbol`."""
    name, contents = symbol.encode() + b"\0", Path(fake_cuda.load().path).read_bytes()
    assert b"\0" + name in contents
    path = folder / "libcuda.so"
    path.write_bytes(contents.replace(b"\0" + name, b"\0" + name[:-2] + b"?\0"))
    return str(path)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_driver_that_lacks_a_function_is_too_old(bundle, tmp_path, monkeypatch, function):
    path = without(function, tmp_path)
    monkeypatch.setenv("RLSD_LIBCUDA", path)
    with pytest.raises(RlsdError, match=f"the NVIDIA driver is too old: {path} has no {function}$") as raised:
        Engine(bundle)
    assert raised.value.status == Status.NO_DEVICE


def test_an_onnxruntime_without_cuda(bundle, tmp_path, monkeypatch):
    """The stand-in, no longer known as one: with a GPU's driver, the package for the CPU is not enough."""
    driver = fake_cuda.FakeCuda(Path(without("rlsd_fake_driver", tmp_path)))
    monkeypatch.setenv("RLSD_LIBCUDA", driver.path)
    for _ in range(2):
        with pytest.raises(RlsdError, match=r"CUDA provider \(is onnxruntime-gpu installed\?\)") as raised:
            Engine(bundle)
        assert raised.value.status == Status.BAD_BUNDLE
    assert driver.count("cuModuleLoadData") == 0 and driver.faults() == driver.live() == ""


def test_the_usual_driver_where_none_is_named(bundle, monkeypatch):
    monkeypatch.setenv("RLSD_LIBCUDA", "")
    with pytest.raises(RlsdError, match=r"no NVIDIA driver here: libcuda\.so\.1 cannot be loaded") as raised:
        Engine(bundle)
    assert raised.value.status == Status.NO_DEVICE


def test_an_error_that_the_driver_has_no_words_for(fake, bundle):
    fake.fail("cuInit", 1, 12345)
    with pytest.raises(RlsdError, match=r"the NVIDIA driver does not start: CUDA error \(no description\)") as raised:
        Engine(bundle)
    assert raised.value.status == Status.RUNTIME_ERROR
    Engine(bundle).close()


@pytest.mark.parametrize("inside", [False, True])
def test_the_context_of_the_calling_thread_stays_what_it_was(fake, bundle, inside):
    """It may be that of another GPU, on which the caller goes on."""
    fake.library.cuInit(0)
    with fake.context() if inside else nullcontext():
        before = fake.current()
        assert (before is not None) == inside
        engine = Engine(bundle)
        handle = engine.submit(JOB)
        engine.tick()
        handle.snapshot()
        engine.run()
        engine.evaluate("decoder", ["image"], z=np.zeros((1, *engine.latent_shape), np.float32))
        fake.fail("cuLaunchKernel", 1, 719)
        with pytest.raises(RlsdError):
            engine.reconstruct([JOB])
        assert fake.current() == before
        engine.close()
        fake.fail("cuModuleLoadData", 2, 719)
        with pytest.raises(RlsdError):
            Engine(bundle)
        assert fake.current() == before


def test_a_device_that_is_lost_while_a_job_is_read(fake, bundle):
    """The driver knows no pointer any more: the job is refused, and where the device is back the next one runs."""
    with Engine(bundle) as engine:
        (wanted,) = engine.reconstruct([JOB])
        before = fake.live()
        for call in ("cuPointerGetAttribute", "cuCtxSynchronize"):
            fake.fail(call, 1, 719)
        with pytest.raises(RlsdError, match="the device failed: CUDA_ERROR_LAUNCH_FAILED") as raised:
            engine.submit(JOB)
        assert raised.value.status == Status.RUNTIME_ERROR and fake.live() == before
        (again,) = engine.reconstruct([JOB])
    assert again.particles.tobytes() == wanted.particles.tobytes()


OLD_RUNTIME = """
struct base { const void *(*get_api)(unsigned); const char *(*get_version)(void); };
static const void *get_api(unsigned version) { (void)version; return 0; }
static const char *get_version(void) { return "1.9.0"; }
extern "C" const base *OrtGetApiBase(void) {
#ifdef NOTHING
    return 0;
#else
    static const base made = {get_api, get_version};
    return &made;
#endif
}
"""


def old_runtime(path: Path, *flags: str) -> Path:
    command = [*fake_cuda.compiler(), "-shared", "-fPIC", "-x", "c++", *flags, "-", "-o", path]
    subprocess.run(command, input=OLD_RUNTIME.encode(), check=True)
    return path


TOO_OLD = "ONNX Runtime 1.9.0 is too old: version 1.20 or newer is needed"


@pytest.mark.parametrize("flags, words", [([], TOO_OLD), (["-DNOTHING"], "has no OrtGetApiBase")])
def test_an_onnxruntime_that_is_too_old(bundle, tmp_path, flags, words):
    path = old_runtime(tmp_path / "libonnxruntime.so", *flags)
    with pytest.raises(RlsdError, match=words) as raised:
        Engine(bundle, onnxruntime=str(path))
    assert raised.value.status == Status.NO_RUNTIME


OPEN = """
import sys
from rlsd.engine import Engine, RlsdError, native
native.find_onnxruntime, native.library_path = lambda: None, lambda: sys.argv[2]
try:
    Engine(sys.argv[1])
except RlsdError as error:
    print(error.status.name, error)
"""


@pytest.mark.skipif(
    find_library("onnxruntime") is not None, reason="an ONNX Runtime is installed where the loader looks"
)
@pytest.mark.parametrize("name", ["libonnxruntime.so.1", "libonnxruntime.so", None])
def test_onnxruntime_where_the_loader_looks(bundle, tmp_path, name):
    """In a process that has none loaded yet."""
    if name is not None:
        old_runtime(tmp_path / name)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    environment.pop("RLSD_ONNXRUNTIME", None)
    command = [sys.executable, "-c", OPEN, str(bundle), str(native.library_path())]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert re.match(f"NO_RUNTIME {TOO_OLD if name else 'cannot find ONNX Runtime: .*RLSD_ONNXRUNTIME'}", said), said


def test_operators_for_an_onnxruntime_that_is_too_old():
    """RegisterCustomOps gets a runtime whose version 1 is there, for making a status, and version 20 is not."""
    said = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(code, message):
        said.append((code, message.decode()))
        return 99

    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    def get_api(version):
        return ctypes.addressof(table) if version == 1 else None

    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), None)
    register = library().RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 99
    assert said == [(2, "ONNX Runtime is too old for the operators of rlsd: 1.20 is needed")]
