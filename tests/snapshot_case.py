"""What the tests of snapshots and of gathered jobs share, on the CPU and over the stand-in for a GPU."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlsd.engine import Engine, Job, Result


def bytes_of(result: Result) -> bytes:
    trace = b"" if result.trace is None else result.trace.tobytes()
    return result.particles.tobytes() + result.latents.tobytes() + trace


def interrupted(bundle: Path, jobs: Sequence[Job], ticks: int, **options: Any) -> list[bytes]:
    """The jobs' results with every engine closed after so many ticks, and the next one going on from snapshots."""
    waiting, found = dict(enumerate(jobs)), dict[int, bytes]()
    while waiting:
        with Engine(bundle, **options) as engine:
            handles = {i: engine.submit(job) for i, job in waiting.items()}
            for _ in range(ticks):
                engine.tick()
            for i, handle in handles.items():
                if handle.done:
                    found[i] = bytes_of(handle.result())
                    del waiting[i]
                else:
                    waiting[i] = replace(waiting[i], snapshot=handle.snapshot())
    return [found[i] for i in range(len(jobs))]


class Exchange:
    """An all-gather among threads; `lost` makes it fail for all of them at that call."""

    def __init__(self, shares: Sequence[int], lost: int | None = None):
        self.rows: np.ndarray = np.zeros(0)
        self.barrier = threading.Barrier(len(shares), timeout=60)
        self.lost, self.calls = lost, 0

    def __call__(self, rows: Any, first: int, count: int) -> None:
        array = rows if isinstance(rows, np.ndarray) else host_view(rows)
        if self.barrier.wait() == 0:
            self.rows = np.zeros_like(array)
            self.calls += 1
        self.barrier.wait()
        if self.calls == self.lost:
            raise ConnectionError("the other process is gone")
        self.rows[first : first + count] = array[first : first + count]
        self.barrier.wait()
        array[:] = self.rows
        self.barrier.wait()


def host_view(rows: Any) -> np.ndarray:
    """Rows on the device of the stand-in, whose memory is the host's."""
    facts = rows.__cuda_array_interface__
    n, d = facts["shape"]
    return np.frombuffer((ctypes.c_float * (n * d)).from_address(facts["data"][0]), np.float32).reshape(n, d)


def spread(
    bundle: Path, job: Job, shares: Sequence[int], exchange: Exchange, **options: Any
) -> list[Result | Exception]:
    """The job's particles over engines in threads of their own, each with its share."""
    found: list[Result | Exception] = [RuntimeError("did not end")] * len(shares)

    def one(rank: int) -> None:
        first = sum(shares[:rank])
        part = replace(job, particles=shares[rank], first_particle=first, all_particles=sum(shares), gather=exchange)
        try:
            with Engine(bundle, **options) as engine:
                found[rank] = engine.reconstruct([part])[0]
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
