"""Workers of `rlsd batch`: one by itself, told when to stop, and the processes that --workers starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from batch_case import batch, bundle, here  # noqa: F401

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


def test_workers_run_nothing_of_the_current_folder() -> None:
    for name in ("queue", "types", "threading", "rlsd"):
        Path(f"{name}.py").write_text("open('was-run', 'w').close()\nraise SystemExit(1)\n")
    assert batch("--workers", 2) == 0
    assert not Path("was-run").exists()
