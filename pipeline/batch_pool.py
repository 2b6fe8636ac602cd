"""Several workers, each a process with an engine: entries are given out, and given again if a worker dies."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from rlsd.engine import RlsdError, Status
from rlsd.pipeline.batch_errors import error_of
from rlsd.pipeline.batch_process import END, STOP
from rlsd.pipeline.batch_work import Emit, Event, Work
from rlsd.pipeline.manifest import Entry

WINDOWS = 2  # particles given to a worker and not done, in windows of its engine
ALONE_AFTER, FAILED_AFTER = 2, 4  # deaths of its worker until an item is done alone, and until it has failed
SECONDS_TO_END = 10  # for a worker that has said its last word
MOST_STARTS = 3  # deaths in a row of workers that never got ready
# With our own sys.path: Python's -m and -c would put the current folder first, and what lies there is not ours to run.
PROGRAM = "import sys; sys.path[:] = {path!a}; from rlsd.pipeline.batch_process import main; main()"


class Process:
    """A worker's process and what it has been given."""

    def __init__(self, work: Work, lock: int):
        mine, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM.format(path=list(map(str, sys.path))), str(theirs.fileno())],
                pass_fds=(theirs.fileno(), lock), stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self.work, self.given = work, dict[int, Entry]()
        self.load, self.most = 0, 0.0  # particles that it has been given and that are not done, and that it may have
        self.line = Connection(mine.detach())
        self.say(work)

    def give(self, entry: Entry) -> None:
        """Has it do the entry."""
        self.given[entry.index] = entry
        self.load += self._particles(entry)
        self.say(entry)

    def done(self, index: int) -> None:
        """The entry with this index is no longer its concern."""
        self.load -= self._particles(self.given.pop(index))

    def _particles(self, entry: Entry) -> int:
        return entry.particles or self.work.settings.particles

    def say(self, word: object) -> None:
        """Sends it an entry, STOP or END."""
        with suppress(ConnectionError):  # it has died: listening finds out
            self.line.send(word)

    def close(self) -> None:
        """Ends it, at once if it has not ended by itself."""
        self.line.close()
        self.process.kill()
        self.process.wait()


class Pool:
    """The workers of a batch; use it in a `with` block. lock: the descriptor that each of them holds as well."""

    def __init__(self, works: Sequence[Work], lock: int, emit: Emit, stop: Callable[[], bool]):
        self.lock, self.emit, self.stop = lock, emit, stop
        self.again: deque[Entry] = deque()
        self.deaths: dict[int, int] = {}  # of workers, by the item that they had
        self.failed_starts, self.stopping, self.ending, self.steps = 0, False, False, 0.0
        self.processes = [Process(work, lock) for work in works]
        self._steps_of: dict[Process, float] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *what: object) -> None:
        for process in self.processes:
            process.close()

    def run(self, entries: Iterator[Entry]) -> None:
        """Has all entries done. Raises what concerns all of them, and KeyboardInterrupt once stop() is true."""
        more = True
        while more or self.again or any(process.given for process in self.processes):
            if self.stop() and not self.stopping:
                self._tell(STOP)
                self.stopping = True
            more = not self.stopping and self._give_out(entries)
            self._listen()
            if self.stopping and not self.processes:
                raise KeyboardInterrupt
        self.ending = True
        self._tell(END)
        while self.processes:
            self._listen()

    def _tell(self, word: str) -> None:
        for process in self.processes:
            process.say(word)

    # ------------------------------------------------------------ giving out

    def _give_out(self, entries: Iterator[Entry]) -> bool:
        """Gives entries to the worker that has least, until all have enough; returns whether there may be more."""
        while True:
            while self.again:
                process = self._place(self.again[0])
                if process is None:
                    return True
                process.give(self.again.popleft())
            process = self._place(None)
            if process is None:
                return True
            entry = next(entries, None)
            if entry is None:
                return False
            process.give(entry)

    def _place(self, entry: Entry | None) -> Process | None:
        """Where the entry, or any new one, may go now."""
        open_ones = [each for each in self.processes if not any(self._is_alone(index) for index in each.given)]
        if not open_ones:
            return None
        process = min(open_ones, key=lambda each: each.load / max(each.most, 0.5))
        if entry is not None and self._is_alone(entry.index):
            return None if process.given or not process.most else process
        return process if process.load < process.most else None

    def _is_alone(self, index: int) -> bool:
        return self.deaths.get(index, 0) >= ALONE_AFTER

    # ------------------------------------------------------------ listening

    def _listen(self) -> None:
        """Takes in what workers say, waiting a moment for it."""
        lines = {process.line: process for process in self.processes}
        for line in wait(list(lines), timeout=0.2):
            process = lines[line]  # type: ignore[index]
            try:
                while line.poll():  # type: ignore[union-attr]
                    self._take(process, process.line.recv())
            except (EOFError, ConnectionError):
                self._ended(process)

    def _take(self, process: Process, event: Event) -> None:
        if event.kind == "fatal":
            raise error_of(event)
        if event.kind == "ready":
            process.most, self.failed_starts = WINDOWS * event.number, 0
        if event.kind in ("done", "failed"):
            process.done(event.index)
            self.deaths.pop(event.index, None)
        if event.kind == "steps":  # of all workers, those that have died included
            self.steps += event.number - self._steps_of.get(process, 0)
            self._steps_of[process] = event.number
            event = Event("steps", number=self.steps)
        self.emit(event)

    def _ended(self, process: Process) -> None:
        """A worker has gone: as it should, or its items go to others and another takes its place."""
        with suppress(subprocess.TimeoutExpired):
            process.process.wait(SECONDS_TO_END)
        process.close()
        self._steps_of.pop(process, None)
        self.processes.remove(process)
        if self.stopping or self.ending:
            return
        code = process.process.returncode
        how = f"signal {-code}" if code < 0 else f"code {code}"
        self.emit(
            Event("death", text=f"a worker ended with {how}; its {len(process.given)} items are given to another")
        )
        if not process.most:
            self.failed_starts += 1
            if self.failed_starts >= MOST_STARTS:
                raise RlsdError(
                    Status.INTERNAL, f"{MOST_STARTS} workers in a row ended with {how} before they were ready"
                )
        for entry in process.given.values():
            self._again(entry, how)
        self.processes.append(Process(process.work, self.lock))

    def _again(self, entry: Entry, how: str) -> None:
        deaths = self.deaths[entry.index] = self.deaths.get(entry.index, 0) + 1
        if deaths < FAILED_AFTER:
            self.again.append(entry)
            return
        text = f"its worker ended {deaths} times while it was under way, at last alone with it and with {how}"
        self.emit(Event("failed", entry.index, entry.name, text))
