"""Items in, reconstructions out, as they finish: any number of items, a bounded number of them in memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlsd.engine import Engine, RlsdError, Status
from rlsd.pipeline.items import Item

DONE = 3  # RLSD_DONE
WINDOW = 512  # particles submitted and not done: enough for the engine to pack, little enough to hold

Report = Callable[[int], None]


@dataclass(frozen=True)
class Outcome:
    """particles: [N, C, H, W], latents: [N, ...], trace: [K - 1, N, 2] as in rlsd.h.

    All are empty when the item failed, of which `error` says why.
    """

    item: Item
    particles: np.ndarray
    latents: np.ndarray
    trace: np.ndarray
    seconds: float
    error: str | None = None


def reconstruct_items(
    engine: Engine, items: Iterable[Item], *, window: int = WINDOW, report: Report | None = None
) -> Generator[Outcome, None, None]:
    """Reconstructs the items and yields each when it is done, in the order in which they finish.

    Items are drawn from the iterable only while fewer than `window` particles are under way. report: called
    after each tick with the particle-steps done so far. An item that fails (a state that became NaN, say) is yielded
    with its error and the others go on; every other error is raised. Closing the generator drops what is under way,
    and KeyboardInterrupt stops the engine within a tick.
    """
    source, waiting = iter(items), True
    pending: list[tuple[Item, Any]] = []
    start = int(engine.stats()["particle_steps"])
    with ThreadPoolExecutor(1, "rlsd-engine") as worker:
        while pending or waiting:
            while waiting and (not pending or _particles(pending) < window):
                item = next(source, None)
                waiting = item is not None
                if item is not None:
                    pending.append((item, engine.submit(item.job())))
            if pending:
                _tick(engine, worker)
            if report:
                report(int(engine.stats()["particle_steps"]) - start)
            over = [handle.info().state == DONE for _, handle in pending]
            done = [pair for pair, is_over in zip(pending, over) if is_over]
            pending = [pair for pair, is_over in zip(pending, over) if not is_over]
            for item, handle in done:
                yield _outcome(item, handle)


def _particles(pending: list[tuple[Item, Any]]) -> int:
    return sum(item.settings.particles for item, _ in pending)


def _tick(engine: Engine, worker: ThreadPoolExecutor) -> None:
    """One tick, on a thread of its own: only so can the main thread hear an interrupt and cancel the tick."""
    future = worker.submit(engine.tick)
    try:
        future.result()
    except KeyboardInterrupt:
        engine.cancel()
        future.exception()
        raise
    except RlsdError as error:
        if error.status is not Status.NON_FINITE:
            raise


def _outcome(item: Item, handle: Any) -> Outcome:
    try:
        result = handle.result()
    except RlsdError as error:
        if error.status is not Status.NON_FINITE:
            raise
        return Outcome(item, np.empty(0), np.empty(0), np.empty(0), 0.0, str(error))
    return Outcome(item, result.particles, result.latents, result.trace, result.seconds)
