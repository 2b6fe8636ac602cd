"""The structs and functions of rlsd.h through ctypes, and where the libraries lie."""

from __future__ import annotations

import contextlib
import ctypes as c
import functools
import importlib.util
import sys
from enum import IntEnum
from numbers import Integral
from pathlib import Path

import numpy as np

STREAM_USER = 0xC0000000  # first of the random streams that are free for callers
INT32, UINT32, UINT64 = (-(2**31), 2**31 - 1), (0, 2**32 - 1), (0, 2**64 - 1)


class Status(IntEnum):
    """rlsd_status."""

    OK = 0
    INVALID_ARGUMENT = 1
    BAD_BUNDLE = 2
    NO_RUNTIME = 3
    RUNTIME_ERROR = 4
    OUT_OF_MEMORY = 5
    NON_FINITE = 6
    CANCELLED = 7
    INTERNAL = 8
    NO_DEVICE = 9


class RlsdError(RuntimeError):
    """A call into the engine failed; `status` says how, the message is one sentence."""

    def __init__(self, status: Status, message: str):
        super().__init__(message)
        self.status = status


class ProgressStruct(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("jobs_queued", c.c_int64),
        ("jobs_active", c.c_int64),
        ("jobs_done", c.c_int64),
        ("particle_steps", c.c_int64),
        ("particle_steps_left", c.c_int64),
        ("seconds", c.c_double),
    ]


PROGRESS = c.CFUNCTYPE(c.c_int, c.c_void_p, c.POINTER(ProgressStruct))
LOG = c.CFUNCTYPE(None, c.c_void_p, c.c_int, c.c_char_p)
GATHER = c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_int64, c.c_int64)


class OptionsStruct(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("onnxruntime", c.c_char_p),
        ("device", c.c_char_p),
        ("threads", c.c_int32),
        ("max_particles", c.c_int32),
        ("progress", PROGRESS),
        ("log", LOG),
        ("user", c.c_void_p),
        ("progress_interval", c.c_double),
    ]


class ParamsStruct(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("variant", c.c_int32),
        ("steps", c.c_int32),
        ("rho", c.c_double),
        ("lambda_", c.c_double),
        ("lr_x", c.c_double),
        ("lr_z", c.c_double),
        ("gamma", c.c_double),
        ("repulsion_until", c.c_double),
        ("repulsion", c.c_int32),
        ("guidance", c.c_double),
        ("beta1", c.c_double),
        ("beta2", c.c_double),
        ("adam_eps", c.c_double),
    ]


class TensorStruct(c.Structure):
    _fields_ = [("name", c.c_char_p), ("data", c.c_void_p), ("count", c.c_size_t), ("dtype", c.c_int32)]


class RequestStruct(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("op", c.c_char_p),
        ("y", c.c_void_p),
        ("y_count", c.c_size_t),
        ("params", c.POINTER(TensorStruct)),
        ("param_count", c.c_size_t),
        ("context", c.c_void_p),
        ("context_count", c.c_size_t),
        ("particles", c.c_int32),
        ("seed", c.c_uint64),
        ("item", c.c_uint32),
        ("out", c.c_void_p),
        ("out_count", c.c_size_t),
        ("out_latents", c.c_void_p),
        ("out_latents_count", c.c_size_t),
        ("out_trace", c.c_void_p),
        ("out_trace_count", c.c_size_t),
        ("first_particle", c.c_int32),
        ("all_particles", c.c_int32),
        ("gather", GATHER),
        ("gather_user", c.c_void_p),
        ("snapshot", c.c_char_p),
        ("snapshot_size", c.c_size_t),
    ]


class JobInfoStruct(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("state", c.c_int32),
        ("status", c.c_int32),
        ("step", c.c_int32),
        ("steps", c.c_int32),
        ("seconds", c.c_double),
        ("message", c.c_char_p),
    ]


class StatsStruct(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        *(
            (name, c.c_int64)
            for name in ("ticks", "particle_steps", "denoiser_runs", "decoder_runs", "decoder_pull_runs")
        ),
        *((name, c.c_double) for name in ("denoiser", "decoder", "decoder_pull", "features", "operators")),
        *((name, c.c_double) for name in ("repulsion", "elementwise", "idle", "wall")),
        *((name, c.c_int64) for name in ("launches", "synchronisations", "redone", "not_recorded")),
    ]


def library_path() -> Path:
    """Path of librlsd.so; FileNotFoundError when it was not built."""
    import rlsd.engine

    folders = [Path(folder) for folder in rlsd.engine.__path__]
    for folder in folders:
        if (folder / "librlsd.so").is_file():
            return folder / "librlsd.so"
    raise FileNotFoundError(
        f"librlsd.so is not in {', '.join(map(str, folders))}: install rlsd, or build it with cmake"
    )


def find_onnxruntime() -> str | None:
    """ONNX Runtime's library in the wheel onnxruntime or onnxruntime-gpu, which is not imported; None without one."""
    spec = importlib.util.find_spec("onnxruntime")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder, "capi").glob("libonnxruntime.so*")):
            return str(path)
    return None


CUDA_LIBRARIES = ("cudart", "nvrtc", "nvJitLink", "cublasLt", "cublas", "cufft", "curand", "cudnn")


@functools.cache
def preload_cuda() -> tuple[str, ...]:
    """Loads CUDA's libraries from NVIDIA's wheels, where the loader would not look; returns the files.

    ONNX Runtime's CUDA provider then finds them by their names. What is not in a wheel may be installed in the system.
    """
    loaded = []
    folders = [folder for entry in sys.path for folder in sorted(Path(entry, "nvidia").glob("*/lib"))]
    for name in CUDA_LIBRARIES:
        for path in (path for folder in folders for path in sorted(folder.glob(f"lib{name}*.so*"))):
            with contextlib.suppress(OSError):  # one of another driver, say
                c.CDLL(str(path), mode=c.RTLD_GLOBAL)
                loaded.append(str(path))
    return tuple(loaded)


@functools.cache
def library() -> c.CDLL:
    """librlsd with its functions' types set."""
    lib = c.CDLL(str(library_path()))
    handle, size, real = c.c_void_p, c.c_size_t, c.c_void_p
    for name, result, arguments in (
        ("rlsd_last_error", c.c_char_p, []),
        ("rlsd_version", c.c_char_p, []),
        ("rlsd_usable_processors", c.c_int32, []),
        ("rlsd_engine_options_init", c.c_int, [c.POINTER(OptionsStruct), size]),
        ("rlsd_engine_open", c.c_int, [c.c_char_p, c.POINTER(OptionsStruct), c.POINTER(handle)]),
        ("rlsd_engine_close", None, [handle]),
        ("rlsd_engine_describe", c.c_char_p, [handle]),
        ("rlsd_params_init", c.c_int, [c.POINTER(ParamsStruct), size]),
        ("rlsd_request_init", c.c_int, [c.POINTER(RequestStruct), size]),
        ("rlsd_submit", c.c_int, [handle, c.POINTER(ParamsStruct), c.POINTER(RequestStruct), c.POINTER(handle)]),
        ("rlsd_tick", c.c_int, [handle, c.POINTER(c.c_int64)]),
        ("rlsd_run", c.c_int, [handle]),
        ("rlsd_cancel", None, [handle]),
        ("rlsd_job_query", c.c_int, [handle, c.POINTER(JobInfoStruct)]),
        ("rlsd_job_snapshot", c.c_int, [handle, real, size, c.POINTER(size)]),
        ("rlsd_job_release", None, [handle]),
        (
            "rlsd_evaluate",
            c.c_int,
            [handle, c.c_char_p, c.c_int64, c.POINTER(TensorStruct), size, c.POINTER(TensorStruct), size],
        ),
        ("rlsd_normal", None, [c.c_uint64, c.c_uint32, c.c_uint32, c.c_uint32, real, size]),
        (
            "rlsd_repulsion_gradient",
            c.c_int,
            [real, c.c_int64, c.c_int64, c.c_uint64, c.c_uint32, c.c_uint32, real, real],
        ),
        ("rlsd_engine_stats", c.c_int, [handle, c.POINTER(StatsStruct)]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def check(status: int) -> None:
    """Raises RlsdError unless `status` is 0."""
    if status:
        raise RlsdError(Status(status), library().rlsd_last_error().decode(errors="replace"))


def version() -> str:
    """The library's version."""
    return library().rlsd_version().decode()


def usable_processors() -> int:
    """How many processors this process may keep busy, its control group's share of their time considered."""
    return int(library().rlsd_usable_processors())


def check_whole(name: str, value: object, limits: tuple[int, int]) -> None:
    """Raises ValueError for what C's type would not hold; ctypes takes the lowest bits of any number."""
    if not (isinstance(value, Integral) and limits[0] <= int(value) <= limits[1]):
        raise ValueError(f"{name} is {value}, allowed is a whole number from {limits[0]} to {limits[1]}")


def _check_address(seed: int, **parts: int) -> None:
    check_whole("seed", seed, UINT64)
    for name, value in parts.items():
        check_whole(name, value, UINT32)


def normal(seed: int, item: int, particle: int, stream: int, count: int) -> np.ndarray:
    """The engine's standard normal numbers: float32 [count], a function of the four addresses alone.

    Raises ValueError for a seed beyond 64 bits, or another address beyond 32.
    """
    _check_address(seed, item=item, particle=particle, stream=stream)
    out = np.empty(count, np.float32)
    library().rlsd_normal(seed, item, particle, stream, out.ctypes.data, count)
    return out


def repulsion(phi: np.ndarray, seed: int = 0, item: int = 0, step: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The engine's repulsion among particles: phi [N, D] -> (g [N, D], bandwidths h [N]); see engine/reference.py.

    Raises RlsdError for an empty phi, ValueError for a seed beyond 64 bits, an item or a step beyond 32.
    """
    _check_address(seed, item=item, step=step)
    phi = np.ascontiguousarray(phi, np.float32)
    n, d = phi.shape
    g, bandwidth = np.empty_like(phi), np.empty(n, np.float32)
    check(
        library().rlsd_repulsion_gradient(phi.ctypes.data, n, d, seed, item, step, g.ctypes.data, bandwidth.ctypes.data)
    )
    return g, bandwidth
