"""Any number of items into a folder: streamed, by one engine or several, going on where a killed run has stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from rlsd.engine import OperatorInfo, usable_processors
from rlsd.engine.files import MANIFEST, facts_in, read_manifest
from rlsd.engine.jobs import operators_in
from rlsd.pipeline.batch_folder import BatchFolder
from rlsd.pipeline.batch_list import Listing, list_inputs, own_columns
from rlsd.pipeline.batch_monitor import Monitor, monitored
from rlsd.pipeline.batch_pool import Pool
from rlsd.pipeline.batch_work import Event, Feed, Nothing, Work, work_on
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.fit import Frame, read_parameter
from rlsd.pipeline.images import sha256
from rlsd.pipeline.items import frame_in
from rlsd.pipeline.machine import engine_version, versions
from rlsd.pipeline.manifest import Entry

MOST_WORKERS = 256


@dataclass(frozen=True)
class Facts:
    """What a bundle's manifest says that is needed before an engine opens it."""

    frame: Frame
    operators: Mapping[str, OperatorInfo]
    contexts: Sequence[str]
    timesteps: int
    for_cuda: bool


def facts_of(bundle: Path) -> Facts:
    """Reads the manifest, which only the core verifies. InputError when it lacks what every manifest has."""
    facts = facts_in(read_manifest(bundle))
    try:
        operators = operators_in(facts)
        frame = frame_in(tuple(map(int, facts["image"][0].split())), facts.get("info", []))
        timesteps = int(facts["timesteps"][0])
        contexts = [line.split()[0] for line in facts.get("named_context", [])]
    except (KeyError, ValueError, IndexError):
        raise InputError(f"model {bundle}: its {MANIFEST} is not that of a bundle") from None
    return Facts(frame, operators, contexts, timesteps, facts.get("target") == ["cuda"])


@dataclass(frozen=True)
class Finished:
    """Items in all, done by this run, and failed."""

    items: int
    done: int
    failed: int


@dataclass(frozen=True)
class Batch:
    """Everything that a run is given. workers: processes, 1 for this one alone. work: for the first of them.

    inputs, root: see batch_list. log, metrics: see batch_monitor. devices: of the workers in turn, none for the
    bundle's own. ray: address of a Ray cluster whose actors are the workers; see ray_batch.
    """

    work: Work
    inputs: Sequence[str]
    root: Path | None = None
    workers: int = 1
    devices: Sequence[str] = ()
    log: Path | None = None
    metrics: str | None = None
    ray: str | None = None


def run_batch(batch: Batch, console: Console) -> Finished:
    """Does what is left to do. InputError, RlsdError, OutputError; KeyboardInterrupt once everything is kept."""
    work, facts = batch.work, facts_of(Path(batch.work.bundle))
    _check(batch, facts)
    _check_parameters(batch, facts)
    params = facts.operators[work.find_task(facts.operators).operator].params
    listing = list_inputs(batch.inputs, batch.root, params, Path(work.out))
    with (
        BatchFolder(Path(work.out), identity(batch, listing)) as folder,
        monitored(listing.count, console, batch.log, batch.metrics) as monitor,
        _stopping() as stop,
    ):
        left = _left(listing, folder, monitor)
        first = next(left, None)
        if first is not None:
            _work(batch, facts, folder, monitor, _chained(first, left), stop)
        folder.check()
        folder.end(listing.entries(), monitor.failures)
        monitor.log(Event("end", text=monitor.summary()))
        return Finished(listing.count, int(monitor.values["items_done_total"]), len(monitor.failures))


def _work(
    batch: Batch, facts: Facts, folder: BatchFolder, monitor: Monitor, left: Iterator[Entry], stop: Callable[[], bool]
) -> None:
    if batch.ray is not None:
        from rlsd.pipeline.ray_batch import Cluster, run_on_ray  # which needs Ray

        cluster = Cluster(batch.ray, batch.workers, batch.work.threads or 1, facts.for_cuda)
        run_on_ray(cluster, batch.work, left, monitor, stop)
        return
    works = works_of(batch, facts)
    if len(works) > 1:
        with Pool(works, folder.lock.descriptor, monitor, stop) as pool:
            pool.run(left)
        return
    feed: Feed = lambda wait: next(left, Nothing.EVER)  # noqa: E731
    work_on(works[0], feed, monitor, stop)


def works_of(batch: Batch, facts: Facts) -> list[Work]:
    """Each worker's: processors are divided among workers on the CPU, GPUs are taken in turn."""
    count, devices = batch.workers, list(batch.devices)
    if not devices and facts.for_cuda and count > 1:
        devices = [f"cuda:{number}" for number in range(count)]
    on_cpu = not facts.for_cuda
    threads = batch.work.threads or (max(1, usable_processors() // count) if on_cpu and count > 1 else 0)
    each = replace(batch.work, threads=threads)
    return [replace(each, device=devices[i % len(devices)] if devices else None) for i in range(count)]


def _left(listing: Listing, folder: BatchFolder, monitor: Monitor) -> Iterator[Entry]:
    """Entries that are still to be done; those that cannot be are reported here."""
    for entry in listing.entries():
        if folder.is_finished(entry.name):
            monitor.values["items_finished_before"] += 1
        elif entry.error is not None:
            monitor(Event("failed", entry.index, entry.name, entry.error))
        else:
            yield entry


def _chained(first: Entry, rest: Iterator[Entry]) -> Iterator[Entry]:
    yield first
    yield from rest


def identity(batch: Batch, listing: Listing) -> dict[str, Any]:
    """What decides the bytes of the results, and which item is which."""
    work, installed = batch.work, versions()
    settings = work.settings.facts()
    return {
        "format": "rlsd-batch 1",
        "input": [os.path.abspath(each) for each in batch.inputs],
        "items": listing.count,
        "list": listing.digest,
        "root": str(listing.root) if listing.root else None,
        "bundle": sha256(Path(work.bundle) / MANIFEST),
        "task": work.task,
        "measured": work.measured,
        "parameters": {name: sha256(Path(path)) for name, path in work.given.items()},
        "pictures": work.pictures,
        **settings,
        "rlsd": engine_version(),
        "onnxruntime": installed["onnxruntime"],
    }


def _check(batch: Batch, facts: Facts) -> None:
    """InputError for what would make every item fail."""
    work = batch.work
    if not 1 <= batch.workers <= MOST_WORKERS:
        raise InputError(f"workers is {batch.workers}; allowed are 1 to {MOST_WORKERS}")
    if batch.ray is not None and batch.devices:
        raise InputError(f"device {','.join(batch.devices)} is given, but Ray gives each worker its own")
    if batch.ray is not None and any(find_spec(name) is None for name in ("ray", "pyarrow")):
        raise InputError("ray is given, but Ray is not installed: pip install 'rlsd[ray]'")
    if not work.snapshot_every > 0:
        raise InputError(f"snapshot-every is {work.snapshot_every:g}; it must be more than 0 seconds")
    if work.settings.params.steps > facts.timesteps:
        raise InputError(f"steps is {work.settings.params.steps}; the prior has {facts.timesteps} timesteps")
    label = work.settings.label
    if label is not None and label not in facts.contexts:
        raise InputError(
            f"class {label!r} is not known to the prior; its classes: {', '.join(facts.contexts) or 'none'}"
        )
    out = Path(work.out).resolve()
    for what, file in (("log", batch.log), ("metrics", batch.metrics)):
        is_port = what == "metrics" and str(file).isdecimal()
        if file is not None and not is_port and out in Path(file).resolve().parents:
            raise InputError(f"{what} {file} lies in the output folder, which is for results alone: name another place")


def _check_parameters(batch: Batch, facts: Facts) -> None:
    """Reads what is given for all items once. InputError, also where a measurement lacks what cannot be made."""
    work, task, given = batch.work, batch.work.find_task(facts.operators), {}
    shapes = facts.operators[task.operator].params
    for name, path in work.given.items():
        if name not in shapes:
            raise InputError(f"operator has no parameter {name!r}; allowed is {', '.join(shapes) or 'none'}")
        given[name] = read_parameter(Path(path), name, shapes[name], facts.frame)
    columns = own_columns(batch.inputs)
    rest = {name: shape for name, shape in shapes.items() if name not in columns}
    task.parameters(rest, work.settings.seed, 0, given, work.measured)


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come, of which the first only asks; a second one interrupts at once."""
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {each: signal.signal(each, ask) for each in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not on the main thread: whoever called it deals with signals
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
