"""What each process runs in the tests of one measurement over several processes, and how they are started."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rlsd.engine import Engine, Job
from rlsd.pipeline.distributed import finish_together, reconstruct_together
from rlsd.pipeline.group import Group

# Each process is forked from a server that has imported everything and has no threads of its own.
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["rlsd.pipeline.distributed"])


class Signalled(Engine):
    """Sends a signal to its own process when it is about to take a step, or fails (signal 0)."""

    def __init__(self, bundle: Path, at: tuple[int, int] | None):
        super().__init__(bundle, threads=1)
        self.ticks, self.at = 0, at

    def tick(self) -> int:
        if self.at is not None and self.ticks == self.at[0]:
            if not self.at[1]:
                raise OSError(28, "No space left on device")
            os.kill(os.getpid(), self.at[1])
        self.ticks += 1
        return super().tick()


def work(rank: int, size: int, port: int, folder: Path, bundle: Path, jobs: list[Job], options: dict[str, Any]) -> None:
    """One process: reconstructs the jobs, and keeps results and its number of ticks, or its error.

    options: timeout; every, finish; signals, by rank: (tick, signal).
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    snapshots = folder / "snapshots" if "every" in options else None
    try:
        signals = options.get("signals", {}).get(rank)
        with Group(options.get("timeout", 600)) as group, Signalled(bundle, signals) as engine:
            for index, job in enumerate(jobs):
                result = reconstruct_together(
                    engine, None if rank else job, group, snapshots=snapshots, every=options.get("every", 50)
                )
                if result is not None:
                    trace = result.trace[..., :2].copy()  # diversity is that among a process's own particles
                    arrays = {"particles": result.particles, "latents": result.latents, "trace": trace}
                    np.savez(folder / f"{index}.npz", **arrays)
                finish_together(group, snapshots)
            (folder / f"{rank}.ticks").write_text(str(engine.ticks))
    except Exception as error:
        (folder / f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def launch(
    size: int, *arguments: Any, until: Callable[[list[Any]], bool] | None = None, most: float = 300
) -> list[int]:
    """Runs `work` in so many processes; returns their exit codes. until: when to kill what is left."""
    port = free_port()
    processes = [START.Process(target=work, args=(rank, size, port, *arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    end = time.monotonic() + most
    while any(process.is_alive() for process in processes) and not (until and until(processes)):
        assert time.monotonic() < end, "processes hang"
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
