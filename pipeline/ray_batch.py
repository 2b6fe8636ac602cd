"""A batch on a Ray cluster: Ray Data gives pieces of the batch to actors, each of which has an engine.

An actor that dies is started again and gets its piece once more: what it had finished is there, what was under way goes
on from its snapshots. Ray does so without end: a piece that has killed several actors is done item by item, and an item
that goes on killing them has failed.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import ray
import ray.data

from rlsd.engine import RlsdError, Status
from rlsd.pipeline.batch_errors import error_of, fatal_event
from rlsd.pipeline.batch_folder import ITEMS, RUN, Items
from rlsd.pipeline.batch_pool import ALONE_AFTER, FAILED_AFTER
from rlsd.pipeline.batch_work import Emit, Event, Nothing, Work, Worker
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.images import sha256
from rlsd.pipeline.manifest import Entry
from rlsd.pipeline.model import open_model

LISTED = 100_000  # entries in memory at once
PIECE = 256  # particles, where there are enough
STORE = 80 << 20  # bytes of a local cluster's object store: only names pass through it
SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Cluster:
    """Where a batch runs. address: of a Ray cluster, or `local` for one of this machine that ends with the batch.

    workers: actors. threads: processors that each of them gets. gpu: whether each gets a GPU of its own.
    """

    address: str
    workers: int
    threads: int = 1
    gpu: bool = False

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Ray, as it is if this process has joined a cluster already. InputError when there is none at the address."""
        here = ray.is_initialized()
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        if self.address == "local":
            cpus = self.workers * self.threads
            options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": STORE}
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or a cluster that is started here reports its use
        try:
            if not here:
                ray.init(self.address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"ray {self.address}: {' '.join(str(error).split())}") from None
        try:
            what, needed = ("GPU", 1) if self.gpu else ("CPU", self.threads)
            found = ray.cluster_resources().get(what, 0)
            if found < needed:
                raise InputError(f"ray {self.address}: the cluster has {found:g} {what}s, a worker needs {needed}")
            yield
        finally:
            if not here:
                ray.shutdown()


class Actor:
    """An engine on one of the cluster's machines, which has to see the output folder and the inputs where they are."""

    def __init__(self, work: Work, cwd: str, folder: str, run: str):
        self.work, self.run, self.problem = work, run, None
        try:
            os.chdir(cwd)  # paths may be relative, and stand in the results as they were given
            if sha256(Path(work.out) / RUN) != folder:
                raise InputError(f"output {work.out} is another folder on {os.uname().nodename}: all have to share it")
            self.engine = open_model(work.bundle, threads=work.threads)
        except Exception as error:
            self.problem = fatal_event(error)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Has the entries done; returns what happened, the last event is `fatal` where it could not go on."""
        events: list[Event] = []
        try:
            if self.problem is None:
                self._work([Entry(**json.loads(row)) for row in rows["entry"]], events.append)
        except Exception as error:
            self.problem = fatal_event(error)
        if self.problem is not None:
            events.append(self.problem)
        return {"event": np.array([json.dumps(asdict(event)) for event in events], object)}

    def _work(self, entries: Sequence[Entry], emit: Emit) -> None:
        with Items(Path(self.work.out)) as items:
            tries, last = self._count(items, f"~{entries[0].index}")
            if tries:
                emit(Event("death", text=f"worker {last} ended; its {len(entries)} items are given to another"))
            together = tries < ALONE_AFTER
            for some in [entries] if together else [[entry] for entry in entries]:
                left = self._unfinished(some, emit)
                if not left:
                    continue
                alone = 0 if together else self._count(items, f"~alone-{left[0].index}")[0]
                if alone < FAILED_AFTER - ALONE_AFTER:
                    self._reconstruct(left, items, emit)
                    continue
                text = f"its worker ended {FAILED_AFTER} times while it was under way, at last alone with it"
                emit(Event("failed", left[0].index, left[0].name, text))

    def _unfinished(self, entries: Sequence[Entry], emit: Emit) -> list[Entry]:
        """Tells which of them an actor had finished before it died; returns the others."""
        left = []
        for entry in entries:
            if (Path(self.work.out) / ITEMS / entry.name).is_dir():
                emit(Event("done", entry.index, entry.name))
            else:
                left.append(entry)
        return left

    def _count(self, items: Items, name: str) -> tuple[int, str]:
        """How often this was called before with the name (no item has one like it) in this run, and last by whom."""
        run, tries, last = ((items.snapshot(name) or b"").decode().split() + [""] * 3)[:3]
        count = int(tries) if run == self.run else 0
        items.keep_snapshot(name, f"{self.run} {count + 1} {os.uname().nodename}:{os.getpid()}".encode())
        return count, last

    def _reconstruct(self, entries: Sequence[Entry], items: Items, emit: Emit) -> None:
        rest, steps = iter(entries), 0.0

        def tell(event: Event) -> None:
            nonlocal steps
            if event.kind == "steps":
                steps = event.number
            else:
                emit(event)

        Worker(self.engine, self.work, items, tell, lambda: False).run(lambda wait: next(rest, Nothing.EVER))
        emit(Event("steps", number=steps))


def run_on_ray(cluster: Cluster, work: Work, entries: Iterator[Entry], emit: Emit, stop: Callable[[], bool]) -> None:
    """Has all entries done. Raises what concerns all of them, and KeyboardInterrupt once stop() is true."""
    steps = 0.0
    with cluster.joined():
        while some := list(islice(entries, LISTED)):
            for event in _events(_dataset(cluster, work, some), stop):
                if event.kind == "fatal":
                    raise error_of(event)
                if event.kind == "steps":  # of one piece
                    steps += event.number
                    event = Event("steps", number=steps)
                emit(event)


def _dataset(cluster: Cluster, work: Work, entries: Sequence[Entry]) -> ray.data.Dataset:
    """One row for each event; nothing runs yet."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"entry": json.dumps(asdict(entry))} for entry in entries]
    piece = max(1, min(PIECE // work.settings.particles, -(-len(rows) // cluster.workers)))
    given = (replace(work, threads=cluster.threads), os.getcwd(), sha256(Path(work.out) / RUN), uuid4().hex)
    return ray.data.from_items(rows, override_num_blocks=-(-len(rows) // piece)).map_batches(
        Actor,
        fn_constructor_args=given,
        batch_size=piece,
        compute=ray.data.ActorPoolStrategy(size=cluster.workers, max_tasks_in_flight_per_actor=1),
        udf_modifying_row_count=True,
        num_gpus=1 if cluster.gpu else None,
        num_cpus=None if cluster.gpu else cluster.threads,
    )


def _events(dataset: ray.data.Dataset, stop: Callable[[], bool]) -> Iterator[Event]:
    """What happens, as it does. A thread waits for Ray, so that this one hears when it is to stop."""
    come: queue.SimpleQueue[Event | Exception | None] = queue.SimpleQueue()

    def listen() -> None:
        try:
            for row in dataset.iter_rows():
                come.put(Event(**json.loads(row["event"])))
            come.put(None)
        except Exception as error:
            come.put(error)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        if stop():
            raise KeyboardInterrupt
        try:
            event = come.get(timeout=SECONDS_BETWEEN_LOOKS)
        except queue.Empty:
            continue
        if event is None:
            return
        if isinstance(event, Exception):
            raise RlsdError(Status.INTERNAL, f"Ray: {' '.join(str(event).split())[:500]}") from event
        yield event
