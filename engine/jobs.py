"""A measurement to reconstruct, a submitted job, and what comes out."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlsd.engine import native
from rlsd.engine.native import INT32, UINT32, UINT64, RlsdError, Status, check, check_whole, library
from rlsd.engine.params import Params


@dataclass(frozen=True)
class OperatorInfo:
    """A forward operator of a bundle: shape of an item's measurement y, and of each of its parameters."""

    measurement_shape: tuple[int, ...]
    params: dict[str, tuple[int, ...]]


def operators_in(facts: Mapping[str, Sequence[str]]) -> dict[str, OperatorInfo]:
    """The forward operators among a bundle's facts, by name. ValueError where a line is not that of an operator."""
    params: dict[str, dict[str, tuple[int, ...]]] = {}
    for line in facts.get("operator_param", ()):
        operator, name, *shape = line.split()
        params.setdefault(operator, {})[name] = tuple(map(int, shape))
    found = {}
    for line in facts.get("operator", ()):
        name, *shape = line.split()
        found[name] = OperatorInfo(tuple(map(int, shape)), params.get(name, {}))
    return found


Gather = Callable[[Any, int, int], None]


@dataclass(frozen=True)
class Job:
    """One measurement to reconstruct.

    Arrays may lie in the memory of the engine's GPU: anything with `__dlpack__`, float32 and contiguous.
    y: the measurement, in the operator's measurement shape. operator: its name in the bundle. operator_params: this
    item's parameters by name (a mask, a blur kernel). particles: N. The random numbers depend on seed, item, particle
    and step alone. context: conditioning [L, C], None for the null context. trace: whether the result has one.
    first_particle, all_particles, gather: for one measurement over several processes; the job's particles are then
    those from first_particle on, of all_particles. In each step with repulsion gather(rows, first, count) is called,
    rows being [all_particles, D] float32 (a NumPy array, or on a GPU one that has `__cuda_array_interface__`): it fills
    in the others' rows. snapshot: of `Handle.snapshot`, to go on from there.
    """

    y: np.ndarray
    operator: str
    operator_params: Mapping[str, np.ndarray] = field(default_factory=dict)
    particles: int = 4
    seed: int = 0
    item: int = 0
    context: np.ndarray | None = None
    params: Params = Params()  # noqa: RUF009 (frozen: one for all is fine)
    trace: bool = False
    first_particle: int = 0
    all_particles: int = 0
    gather: Gather | None = None
    snapshot: bytes | None = None


def check_numbers(job: Job) -> None:
    """Raises ValueError for what the fields of rlsd_request do not hold."""
    for name in ("particles", "first_particle", "all_particles"):
        check_whole(name, getattr(job, name), INT32)
    check_whole("seed", job.seed, UINT64)
    check_whole("item", job.item, UINT32)


@dataclass(frozen=True)
class Result:
    """particles: [N, C, H, W] float32, nominally in [-1, 1]. latents: [N, ...]. seconds: from first to last tick.

    Both are NumPy arrays, or those that were given to `submit` to be filled. trace: [K - 1, N, 3] for a job that asked:
    for each step and particle the data loss, the bandwidth of the repulsion (NaN without), and how far the particle's
    latent is from the others' (NaN for N = 1); see rlsd.h.
    """

    particles: Any
    latents: Any
    seconds: float
    trace: np.ndarray | None = None


@dataclass(frozen=True)
class Progress:
    """What the engine has done in this run and what is left; see rlsd_progress in rlsd.h."""

    jobs_queued: int
    jobs_active: int
    jobs_done: int
    particle_steps: int
    particle_steps_left: int
    seconds: float


class Handle:
    """A submitted job. `result()` once it is done; `release()` drops it at once."""

    def __init__(
        self, pointer: c.c_void_p, particles: Any, latents: Any, trace: np.ndarray | None, callback: Any = None
    ):
        self._pointer, self._particles, self._latents, self._trace = pointer, particles, latents, trace
        self._callback = callback  # which the core calls

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Frees the job; one that is not done is dropped, which is for between ticks."""
        if self._pointer:
            library().rlsd_job_release(self._pointer)
            self._pointer = c.c_void_p()

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._pointer or self.info().state == 3

    def info(self) -> native.JobInfoStruct:
        """state, status, step, steps, seconds, message."""
        info = native.JobInfoStruct(size=c.sizeof(native.JobInfoStruct))
        check(library().rlsd_job_query(self._pointer, info))
        return info

    def snapshot(self) -> bytes:
        """What it takes to go on with the job elsewhere, as `Job.snapshot`. Between ticks: RlsdError while the engine
        is at work, or once the job is done."""
        size = c.c_size_t()
        check(library().rlsd_job_snapshot(self._pointer, None, 0, size))
        buffer = bytearray(size.value)
        at = (c.c_char * size.value).from_buffer(buffer)
        check(library().rlsd_job_snapshot(self._pointer, c.addressof(at), size.value, size))
        return bytes(buffer)

    def result(self) -> Result:
        """Its particles; RlsdError when it failed, RuntimeError when it is not done."""
        info = self.info()
        if info.state != 3:
            raise RuntimeError("the job is not done: run the engine first")
        if info.status:
            raise RlsdError(Status(info.status), info.message.decode(errors="replace"))
        return Result(self._particles, self._latents, info.seconds, self._trace)
