"""Progress of a run in particle-steps: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from rlsd.pipeline.reconstruct import Report

SECONDS_BETWEEN_LINES = 10.0


class RateColumn(ProgressColumn):
    """Particle-steps done of all, and a second."""

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        speed = f"{rate:,.0f} /s" if rate else "- /s"
        return Text(f"{int(task.completed):,} of {int(task.total or 0):,} particle-steps  {speed}")


@contextmanager
def progress(total: int, console: Console) -> Iterator[Report]:
    """A function to call with the particle-steps done so far; shows nothing on a console that is quiet."""
    if not console.is_terminal:
        yield lines(total, console)
        return
    columns = (TextColumn("reconstructing"), BarColumn(), RateColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)


def lines(total: int, console: Console) -> Report:
    """Plain lines, ten seconds apart."""
    start = last = time.monotonic()

    def report(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES or not done:
            return
        last, rate = now, done / (now - start)
        left = (total - done) / rate
        say(console, f"{done / total:.0%}: {done:,} of {total:,} particle-steps, {rate:,.0f} /s, {left:,.0f} s left")

    return report


def say(console: Console, text: str) -> None:
    """A line for people; the console falls silent when nobody can read it: its pipe is closed, its disk full."""
    if console.quiet:
        return
    try:
        console.file.write(f"{text}\n")  # by itself: rich ends the program for a closed pipe
        console.file.flush()
    except OSError:
        console.quiet = True
