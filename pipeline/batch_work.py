"""What one worker of a batch does: items through an engine, read ahead and written behind it, with snapshots."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from rlsd.engine import Engine, RlsdError, Status
from rlsd.pipeline.batch_folder import Items
from rlsd.pipeline.batch_item import write_lean
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.images import sha256
from rlsd.pipeline.items import Item, Plan, Read, Source, conditioning, frame_of, make_item, read_source
from rlsd.pipeline.manifest import Entry
from rlsd.pipeline.metrics import residual
from rlsd.pipeline.model import open_model
from rlsd.pipeline.reconstruct import Outcome, Pending, reconstruct_items
from rlsd.pipeline.settings import Settings
from rlsd.pipeline.tasks import Task, find_task

ACTIVE = 2  # RLSD_ACTIVE
BAD_ITEM = (Status.NON_FINITE, Status.OUT_OF_MEMORY, Status.RUNTIME_ERROR)
HELD = 128 << 20  # bytes of inputs, and of outputs, that wait at most
SECONDS_BETWEEN_STEPS = 0.5


@dataclass(frozen=True)
class Work:
    """What a worker has to know; it can be sent to another process.

    own: the task is the bundle's operator of that name and nothing else. given: the operator's parameters for all
    items, by name. snapshot_every: seconds between two snapshots of an item. window: particles under way, 0 for as
    many as keep the engine full. pictures: whether an item gets pictures.
    """

    bundle: str
    task: str
    settings: Settings
    out: str
    own: bool = False
    measured: bool = False
    given: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    threads: int = 0
    snapshot_every: float = 60.0
    window: int = 0
    pictures: bool = False

    def find_task(self, operators: Mapping[str, object]) -> Task:
        """The task, for a bundle with these operators. InputError when it cannot do it."""
        return Task(self.task, "", self.task) if self.own else find_task(self.task, operators)


@dataclass(frozen=True)
class Event:
    """What happened: kind is ready, done, failed, note, snapshot, steps or fatal; the rest as the kind needs it."""

    kind: str
    index: int = -1
    name: str = ""
    text: str = ""
    number: float = 0.0


class Nothing(Enum):
    """Why a feed gives no entry."""

    YET = 1
    EVER = 2


Feed = Callable[[bool], "Entry | Nothing"]  # told whether to wait for one
Emit = Callable[[Event], None]


@dataclass(frozen=True)
class Loaded:
    """An entry's files, read."""

    plan: Plan
    source: Source
    read: Read
    digest: str
    snapshot: bytes | None


def work_on(work: Work, feed: Feed, emit: Emit, stop: Callable[[], bool]) -> None:
    """Opens the engine and does the feed's entries. Once stop() is true: a last snapshot, then KeyboardInterrupt.

    A bad item is emitted as failed. Raises InputError, RlsdError, OutputError for what concerns all items.
    """
    with open_model(work.bundle, device=work.device, threads=work.threads) as engine, Items(Path(work.out)) as items:
        worker = Worker(engine, work, items, emit, stop)
        emit(Event("ready", number=worker.window))
        worker.run(feed)


def full_window(engine: Engine) -> int:
    """Particles that keep the engine full: four of its largest batches for each thread, and more on a GPU."""
    facts = engine.describe()
    largest = max(int(line.split()[1]) for line in facts["graph"])
    threads = int(facts["threads"][0]) if facts["device"] == ["cpu"] else 16
    return 4 * largest * threads


class Worker:
    """An engine's items: all on one thread but reading and writing, which have one each."""

    def __init__(self, engine: Engine, work: Work, items: Items, emit: Emit, stop: Callable[[], bool]):
        self.engine, self.work, self.items, self.emit, self.stop = engine, work, items, emit, stop
        self.task = work.find_task(engine.operators)
        self.frame = frame_of(engine)
        self.window = work.window or full_window(engine)
        operator = engine.operators[self.task.operator]
        values = (
            2 * prod(engine.image_shape) + prod(operator.measurement_shape) + sum(map(prod, operator.params.values()))
        )
        self.ahead = max(2, min(64, HELD // (4 * values)))
        self.behind = max(2, min(64, HELD // (4 * prod(engine.image_shape) * work.settings.particles)))
        self.contexts = {work.settings.label: conditioning(engine, work.settings)}  # what is wrong there shows at once
        self.snapshots: dict[int, bytes] = {}  # of items that are about to be submitted
        self.taken: dict[int, float] = {}  # when an item under way was last kept
        self.writes: deque[tuple[Future[None], Event]] = deque()
        self.steps, self.told = 0, time.monotonic()

    def run(self, feed: Feed) -> None:
        """Does all entries of the feed."""
        with ThreadPoolExecutor(1, "rlsd-read") as reader, ThreadPoolExecutor(1, "rlsd-write") as self.writer:
            items = self._items(feed, reader)
            outcomes = reconstruct_items(
                self.engine, items, window=self.window, report=self._report, submit=self._submit, watch=self._watch,
                tolerated=BAD_ITEM,
            )  # fmt: skip
            try:
                with closing(outcomes):
                    for outcome in outcomes:
                        self._finish(outcome)
                self._written(wait=True)
            except BaseException:
                reader.shutdown(wait=False, cancel_futures=True)
                raise
        self.emit(Event("steps", number=self.steps))

    # ------------------------------------------------------------ in

    def _items(self, feed: Feed, reader: ThreadPoolExecutor) -> Iterator[Item | None]:
        """Items that have been read, in the feed's order; None for a bad one, and where the next is not ready yet."""
        loading: deque[tuple[Entry, Future[Loaded]]] = deque()
        more = True
        while loading or more:
            while more and len(loading) < self.ahead:
                entry = feed(not (loading or self.taken))
                if entry is Nothing.YET:
                    break
                if isinstance(entry, Nothing):
                    more = False
                else:
                    loading.append((entry, reader.submit(self._load, entry)))
            if not loading or (self.taken and not loading[0][1].done()):
                yield None
                continue
            yield self._made(*loading.popleft())

    def _load(self, entry: Entry) -> Loaded:
        """On the reader's thread: the entry's files."""
        mine = {"sigma": entry.sigma, "particles": entry.particles, "label": entry.label}
        changes: dict[str, Any] = {key: value for key, value in mine.items() if value is not None}
        settings = replace(self.work.settings, each_labelled=False, **changes)
        given = {name: [Path(path)] for name, path in {**self.work.given, **entry.given}.items()}
        source = Source(Path(entry.path), entry.index, entry.name)
        plan = Plan(self.task, settings, [source], self.work.measured, given)
        read = read_source(self.engine, plan, source)
        return Loaded(plan, source, read, sha256(source.path), self.items.snapshot(entry.name))

    def _made(self, entry: Entry, future: Future[Loaded]) -> Item | None:
        try:
            loaded = future.result()
            settings = loaded.plan.settings
            if settings.label not in self.contexts:
                self.contexts[settings.label] = conditioning(self.engine, settings)
            context = self.contexts[settings.label]
            item = make_item(self.engine, loaded.plan, loaded.source, loaded.read, loaded.digest, context)
        except Exception as error:  # whatever a file brings about is that item's alone
            self._failed(entry.index, entry.name, error)
            return None
        if loaded.snapshot is not None:
            self.snapshots[item.index] = loaded.snapshot
        return item

    def _submit(self, item: Item) -> Any:
        job, snapshot = replace(item.job(), trace=False), self.snapshots.pop(item.index, None)
        try:
            if snapshot is not None:
                try:
                    handle = self.engine.submit(replace(job, snapshot=snapshot))
                    self.emit(Event("note", item.index, item.name, "goes on from its snapshot"))
                except RlsdError as error:
                    self.emit(Event("note", item.index, item.name, f"starts anew, its snapshot is not usable: {error}"))
                    handle = self.engine.submit(job)
            else:
                handle = self.engine.submit(job)
        except (RlsdError, ValueError) as error:
            self._failed(item.index, item.name, error)
            return None
        self.taken[item.index] = time.monotonic()
        return handle

    def _failed(self, index: int, name: str, error: Exception) -> None:
        known = isinstance(error, (InputError, RlsdError))
        text = str(error) if known else f"{type(error).__name__}: {error}"
        self.emit(Event("failed", index, name, " ".join(text.split())))

    # ------------------------------------------------------------ out

    def _finish(self, outcome: Outcome) -> None:
        item = outcome.item
        del self.taken[item.index]
        if outcome.error is not None:
            self.emit(Event("failed", item.index, item.name, outcome.error))
            return
        params = {name: value[None] for name, value in item.operator_params.items()}
        predicted = self.engine.measure(item.task.operator, outcome.particles, **params)
        misfit = residual(item.y, predicted, item.operator_params)
        done = Event("done", item.index, item.name, number=outcome.seconds)
        self.writes.append((self.writer.submit(self._write, outcome, misfit), done))
        self._written()

    def _write(self, outcome: Outcome, misfit: np.ndarray) -> None:
        """On the writer's thread: the item's folder."""
        with self.items.item(outcome.item.name) as folder:
            write_lean(folder, outcome, misfit, self.frame, self.work.pictures)

    def _written(self, wait: bool = False) -> None:
        """Emits what has reached the disk; waits for all of it, or until the rest is not too much. OutputError."""
        while self.writes and (wait or len(self.writes) > self.behind or self.writes[0][0].done()):
            future, event = self.writes.popleft()
            future.result()
            self.emit(event)

    def _report(self, steps: int) -> None:
        self.steps = steps
        if time.monotonic() - self.told >= SECONDS_BETWEEN_STEPS:
            self.told = time.monotonic()
            self.emit(Event("steps", number=steps))

    def _watch(self, pending: Pending) -> None:
        """After each tick: what was written, snapshots that are due (the oldest first), and whether to stop."""
        self._written()
        stopping, now = self.stop(), time.monotonic()
        for item, handle in sorted(pending, key=lambda pair: self.taken[pair[0].index]):
            due = now - self.taken[item.index] >= self.work.snapshot_every and len(self.writes) < self.behind
            if not (stopping or due):
                break
            info = handle.info()
            if info.state == ACTIVE and info.step > 0:
                self._keep(item, handle.snapshot())
            self.taken[item.index] = now
        if stopping:
            self._written(wait=True)
            raise KeyboardInterrupt

    def _keep(self, item: Item, content: bytes) -> None:
        event = Event("snapshot", item.index, item.name, number=len(content))
        self.writes.append((self.writer.submit(self.items.keep_snapshot, item.name, content), event))
        self._written()
