"""Items in, reconstructions out, as they finish: any number of items, a bounded number of them in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from rlsd.engine import Engine, RlsdError, Status
from rlsd.pipeline.items import Item

DONE = 3  # RLSD_DONE
WINDOW = 512  # particles submitted and not done: enough for the engine to pack, little enough to hold

Report = Callable[[int], None]
Pending = Sequence[tuple[Item, Any]]  # items under way with their handles

# Each engine's thread for ticks, always the same: on a GPU ONNX Runtime's recorded graphs belong to the thread that
# recorded them, and another one would record them all again.
_workers: WeakKeyDictionary[Engine, ThreadPoolExecutor] = WeakKeyDictionary()


@dataclass(frozen=True)
class Outcome:
    """particles: [N, C, H, W], latents: [N, ...], trace: [K - 1, N, 3] as in rlsd.h.

    All are empty when the item failed, of which `error` says why; the trace also where none was asked for.
    """

    item: Item
    particles: np.ndarray
    latents: np.ndarray
    trace: np.ndarray
    seconds: float
    error: str | None = None


def reconstruct_items(
    engine: Engine,
    items: Iterable[Item | None],
    *,
    window: int = WINDOW,
    report: Report | None = None,
    submit: Callable[[Item], Any] | None = None,
    watch: Callable[[Pending], None] | None = None,
    tolerated: Collection[Status] = (Status.NON_FINITE,),
) -> Generator[Outcome, None, None]:
    """Reconstructs the items and yields each when it is done, in the order in which they finish.

    Items are drawn from the iterable only while fewer than `window` particles are under way; None from it says that
    none is ready at the moment. report: called after each tick with the particle-steps done so far. submit: the item's
    handle, by default of item.job(); None drops the item. watch: called after each tick with what is under way, when
    the engine is at rest. An item that fails with a `tolerated` status (a state that became NaN, say) is yielded with
    its error and the others go on; every other error is raised. An error, or closing the generator, drops what is
    under way; KeyboardInterrupt stops the engine within a tick.
    """
    source, waiting = iter(items), True
    pending: list[tuple[Item, Any]] = []
    start = int(engine.stats()["particle_steps"])
    submit = submit or (lambda item: engine.submit(item.job()))
    try:
        while pending or waiting:
            waiting = _admit(source, submit, pending, window)
            if pending:
                _tick(engine, tolerated)
            if report:
                report(int(engine.stats()["particle_steps"]) - start)
            over = [handle.info().state == DONE for _, handle in pending]
            done = [pair for pair, is_over in zip(pending, over) if is_over]
            pending = [pair for pair, is_over in zip(pending, over) if not is_over]
            for item, handle in done:
                yield _outcome(item, handle, tolerated)
            if watch:
                watch(pending)
    finally:
        for _, handle in pending:
            handle.release()


_END = object()


def _admit(
    source: Iterator[Item | None], submit: Callable[[Item], Any], pending: list[tuple[Item, Any]], window: int
) -> bool:
    """Submits items until the window is full, none is ready or one is dropped; returns whether there may be more."""
    while not pending or _particles(pending) < window:
        item: Any = next(source, _END)
        if item is _END:
            return False
        if item is None:
            break
        handle = submit(item)
        if handle is None:
            break
        pending.append((item, handle))
    return True


def _particles(pending: list[tuple[Item, Any]]) -> int:
    return sum(item.settings.particles for item, _ in pending)


def _tick(engine: Engine, tolerated: Collection[Status]) -> None:
    """One tick, on a thread of its own: only so can the main thread hear an interrupt and cancel the tick."""
    if engine not in _workers:
        _workers[engine] = ThreadPoolExecutor(1, "rlsd-engine")
    future = _workers[engine].submit(engine.tick)
    try:
        future.result()
    except KeyboardInterrupt:
        engine.cancel()
        future.exception()
        raise
    except RlsdError as error:
        if error.status not in tolerated:
            raise


def _outcome(item: Item, handle: Any, tolerated: Collection[Status]) -> Outcome:
    try:
        result = handle.result()
    except RlsdError as error:
        if error.status not in tolerated:
            raise
        return Outcome(item, np.empty(0), np.empty(0), np.empty(0), 0.0, str(error))
    trace = np.empty(0) if result.trace is None else result.trace
    return Outcome(item, result.particles, result.latents, trace, result.seconds)
