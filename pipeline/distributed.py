"""One measurement whose particles are spread over several processes, on one machine or many.

Each process runs this with the same arguments. Where particles repel each other, the rows of all are exchanged each
step; every so many steps all processes write a snapshot and wait for each other. After a failure the same command,
started on as many processes, goes on from the last snapshot that all of them have.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlsd.engine import Engine, Job, Params, Result, RlsdError, usable_processors
from rlsd.engine.files import is_for_cuda
from rlsd.engine.jobs import Handle
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.group import Group, Stage
from rlsd.pipeline.images import sha256
from rlsd.pipeline.items import Item, Plan
from rlsd.pipeline.model import MANIFEST
from rlsd.pipeline.output import TEMPORARY, sync
from rlsd.pipeline.reconstruct import Outcome, Report
from rlsd.pipeline.run import Finished, run_plans

NAME = re.compile(r"(\d+)-of-(\d+)\.step-(\d+)\.snapshot")


class Snapshots:
    """One process's snapshots in a folder that may be shared by all processes, or be each machine's own.

    InputError where the folder holds snapshots of another number of processes.
    """

    def __init__(self, folder: Path, rank: int, size: int):
        self.folder, self.rank, self.size = folder, rank, size
        for match in self._names():
            if int(match[2]) != size:
                raise InputError(
                    f"{folder} has snapshots of {match[2]} processes, but there are {size}: start as many, "
                    "or remove the folder to begin anew"
                )

    def _names(self) -> list[re.Match[str]]:
        try:
            return [match for match in map(NAME.fullmatch, os.listdir(self.folder)) if match]
        except FileNotFoundError:
            return []

    def path(self, step: int) -> Path:
        """Where the snapshot after so many steps is."""
        return self.folder / f"{self.rank}-of-{self.size}.step-{step}.snapshot"

    def steps(self) -> list[int]:
        """Of the snapshots that are there, the latest first."""
        return sorted((int(match[3]) for match in self._names() if int(match[1]) == self.rank), reverse=True)

    def write(self, step: int, content: bytes) -> None:
        """Under its name only when it is complete and synced."""
        path = self.path(step)
        temporary = path.with_name(f"{TEMPORARY}{path.name}")
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
        sync(self.folder)

    def forget(self, keep: int | None = None) -> None:
        """Removes all but one; with the last one of the last process the folder goes."""
        for step in self.steps():
            if step != keep:
                self.path(step).unlink()
        if keep is None:
            with suppress(OSError):  # it is gone, or others' are still in it
                self.folder.rmdir()


def reconstruct_together(
    engine: Engine,
    job: Job | None,
    group: Group,
    *,
    snapshots: Path | None = None,
    every: int = 50,
    report: Report | None = None,
) -> Result | None:
    """Reconstructs a measurement with all processes of the group; returns the result on process 0, None elsewhere.

    job: on process 0, which sends it to the others. snapshots: folder, None for none; they are written after `every`
    steps, and stay until `finish_together`. report: called on process 0 after each tick with the particle-steps done.
    On the CPU the result has the same bytes as that of one process. Raises RlsdError, also where another process fails.
    """
    group.meet(Stage.START, int(sha256(engine.path / MANIFEST)[:15], 16))
    whole = unpacked(group.from_first(pack(job) if job is not None else None))
    if whole.particles < group.size:
        raise InputError(f"particles is {whole.particles}; {group.size} processes need at least one each")
    share, group.step = group.share(whole.particles), 0
    part = replace(whole, particles=len(share), first_particle=share.start, all_particles=whole.particles)
    kept = Snapshots(snapshots, group.rank, group.size) if snapshots else None
    handle = _start(engine, replace(part, gather=group.fill), group, kept)
    while not handle.done:
        group.step = handle.info().step
        engine.tick()
        if report and not group.rank:
            report(handle.info().step * whole.particles)
        _keep(handle, group, kept, every)
    group.meet(Stage.RESULT)
    return _collected(handle.result(), group, whole.particles)


def finish_together(group: Group, snapshots: Path | None) -> None:
    """Waits until process 0 has written the result, then removes this process's snapshots."""
    group.meet(Stage.END)
    if snapshots:
        Snapshots(snapshots, group.rank, group.size).forget()


def place(bundle: Path, device: str | None, threads: int) -> tuple[str, int]:
    """Device and threads of this process among those of torchrun on this machine, as far as the user has not chosen."""
    local, count = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device is None:
        device = f"cuda:{local}" if is_for_cuda(bundle) else "cpu"
    return device, threads or max(1, usable_processors() // count)


def run_together(
    engine: Engine, plan: Plan, out: Path, group: Group, *, snapshots: Path | None, every: int, **options: Any
) -> Finished | None:
    """`run_plans` for a plan with one input: process 0 reads it and writes the results, all reconstruct.

    snapshots: default a folder beside `out`. options: those of `run_plans`, for process 0. Returns None elsewhere.
    """
    snapshots = snapshots or out.absolute().with_name(f"{out.absolute().name}.snapshots")
    if len(plan.sources) != 1:
        raise InputError(f"{len(plan.sources)} inputs are given; several processes share one (rlsd batch takes many)")
    if every < 1:
        raise InputError(f"snapshot-steps is {every}; 1 or more steps are wanted")
    finished = None
    if group.rank:
        reconstruct_together(engine, None, group, snapshots=snapshots, every=every)
    else:

        def together(engine: Engine, items: Iterable[Item], *, report: Report) -> Generator[Outcome, None, None]:
            for item in items:
                result = reconstruct_together(
                    engine, item.job(), group, snapshots=snapshots, every=every, report=report
                )
                assert result is not None and result.trace is not None
                yield Outcome(item, result.particles, result.latents, result.trace, result.seconds)

        total = plan.settings.particles
        share = len(group.share(total)) / total or 1.0
        finished = run_plans(engine, [plan], out, reconstruct=together, share=share, **options)
    finish_together(group, snapshots)
    return finished


def _start(engine: Engine, job: Job, group: Group, kept: Snapshots | None) -> Handle:
    """Submits the job, from the last snapshot that all have."""
    common = group.common(kept.steps() if kept else [])
    if not (common and kept):
        return engine.submit(job)
    path = kept.path(common[-1])
    try:
        return engine.submit(replace(job, snapshot=path.read_bytes()))
    except RlsdError as error:
        raise InputError(f"{path}: {error}; remove the folder to begin anew") from error


def _keep(handle: Handle, group: Group, kept: Snapshots | None, every: int) -> None:
    """Writes a snapshot if it is time; the older ones go once all processes have this one."""
    if kept is None or handle.done:
        return
    step = handle.info().step
    if step % every or step == group.step:  # the step is done again, or all are done and the end is missing
        return
    kept.write(step, handle.snapshot())
    group.step = step
    group.meet(Stage.SNAPSHOT)
    kept.forget(keep=step)


def _collected(mine: Result, group: Group, total: int) -> Result | None:
    """All particles on process 0."""
    particles, latents = group.collect(mine.particles, total), group.collect(mine.latents, total)
    trace = None if mine.trace is None else group.collect(mine.trace.swapaxes(0, 1), total)
    if particles is None:
        return None
    return Result(
        particles, latents, mine.seconds, None if trace is None else np.ascontiguousarray(trace.swapaxes(0, 1))
    )


def pack(job: Job) -> bytes:
    """A job on the host as bytes: arrays and numbers, no code."""
    arrays = {"y": job.y, **{f"param.{name}": value for name, value in job.operator_params.items()}}
    if job.context is not None:
        arrays["context"] = job.context
    names = ("operator", "particles", "seed", "item", "trace")
    numbers = {name: getattr(job, name) for name in names} | {"params": asdict(job.params)}
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, facts=np.frombuffer(json.dumps(numbers).encode(), np.uint8), **arrays)
    return content.getvalue()


def unpacked(content: bytes) -> Job:
    """What `pack` packed."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays: dict[str, Any] = {name: file[name] for name in file.files}
    facts = json.loads(arrays.pop("facts").tobytes())
    facts["params"] = Params(**facts["params"])
    params = {name[len("param.") :]: value for name, value in arrays.items() if name.startswith("param.")}
    return Job(y=arrays["y"], context=arrays.get("context"), operator_params=params, **facts)
