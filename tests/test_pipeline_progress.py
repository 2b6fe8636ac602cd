"""Lines for people about a run or a batch, also where nobody can read them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import IO

import pytest
from rich.console import Console

from rlsd.pipeline import progress
from rlsd.pipeline.batch_monitor import Monitor
from rlsd.pipeline.batch_work import Event

BAD = (Event("failed", 0, "a", "a.png is [empty] :smile:"), Event("failed", 1, "b", "b.png is empty"))


@pytest.fixture(params=["closed pipe", "full disk"])
def unread(request: pytest.FixtureRequest) -> Iterator[IO[str]]:
    """A file like standard error that takes nothing."""
    if request.param == "closed pipe":
        end, descriptor = os.pipe()
        os.close(end)
    else:
        descriptor = os.open("/dev/full", os.O_WRONLY)
    file = open(descriptor, "w", buffering=1)  # noqa: SIM115 (closing it fails)
    yield file
    with suppress(OSError):
        file.close()


def test_a_batch_goes_on(unread: IO[str]) -> None:
    monitor = Monitor(2, Console(file=unread))
    for event in BAD:
        monitor(event)
    assert len(monitor.failures) == 2 and monitor.console.quiet


def test_a_run_goes_on(unread: IO[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    console = Console(file=unread)
    with progress.progress(10, console) as report:
        report(5)
        report(6)
    assert console.quiet


def test_lines_are_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    console = Console(file=io.StringIO(), width=20)
    Monitor(2, console)(BAD[0])
    with progress.progress(10, console) as report:
        report(5)
    first, second = console.file.getvalue().splitlines()
    assert first == "a: a.png is [empty] :smile:" and second.startswith("50%: 5 of 10 particle-steps, ")
    monitor = Monitor(2, quiet := Console(file=io.StringIO(), quiet=True))
    monitor(BAD[0])
    assert quiet.file.getvalue() == ""
