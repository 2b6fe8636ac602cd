"""A worker of `rlsd batch` by itself, told what to do and when to stop."""

from __future__ import annotations

from pathlib import Path

import pytest
from batch_case import bundle, here  # noqa: F401

from rlsd.engine import Engine
from rlsd.pipeline.batch_folder import Items
from rlsd.pipeline.batch_work import Event, Nothing, Work, Worker
from rlsd.pipeline.manifest import Entry
from rlsd.pipeline.settings import settings_for
from rlsd.pipeline.tasks import TASKS


def test_it_stops_while_items_are_bad() -> None:
    events: list[Event] = []
    entries = (Entry(index, f"{index}", "in/none.png") for index in range(300))
    work = Work("bundle", "random", settings_for(TASKS["random"], "fashion", {"particles": 2}), "out", threads=1)
    Path("out").mkdir()
    with Engine("bundle", threads=1) as engine, Items(Path("out")) as items:
        worker = Worker(engine, work, items, events.append, lambda: len(events) >= 3)
        with pytest.raises(KeyboardInterrupt):
            worker.run(lambda wait: next(entries, Nothing.EVER))
    assert [event.kind for event in events] == ["failed"] * 3
