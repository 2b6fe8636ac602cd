"""The cases of the race in the order of what they tell, so that a short run has the figures that matter."""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rlsd.bench.gpu import Line, agreement, arrivals, crowds, networks, prepare, side_by_side, steps
from rlsd.bench.gpu.subject import Bench, Subject
from rlsd.export.checkpoint import load
from rlsd.models.fashion import PATH as FASHION

PARTICLES = (8, 1, 4, 2, 16, 32)
TOY_PARTICLES, TOY_SIZES, TOY_STEPS = (8, 1, 2), [(4, 384), (16, 384)], 6


class Budget:
    """Minutes of a clock that starts now."""

    def __init__(self, minutes: float):
        self.start, self.seconds = time.monotonic(), 60 * minutes

    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def left(self) -> float:
        """Seconds until the time is up; negative after."""
        return self.seconds - self.spent()


@dataclass(frozen=True)
class Case:
    """What is run at a time, and what it is called."""

    title: str
    run: Callable[[], Iterable[Line]]
    needs: float = 0  # seconds; it is not begun with less


def cases(options: argparse.Namespace, bench: Bench, maker: subprocess.Popen | None, budget: Budget) -> Iterator[Case]:
    """Repulsion first, which needs no bundle: meanwhile those that are missing are exported, beside the timing.

    Its largest sizes come last, but for those that are done while the first bundle is still missing.
    """
    yield from _crowds(TOY_SIZES if options.toy else crowds.FIRST, options, bench)
    if "agreement" in options.sections:
        yield Case("agreement with the CPU", lambda: _agreement(options, bench, maker, budget))
    names = ["fashion"] if options.toy else ["given"] if options.bundle else options.networks
    late = [] if options.toy else [*crowds.LAST]
    while late and maker is not None and not prepare.bundle_path(names[0]).is_dir():
        yield from _crowds([late.pop(0)], options, bench)
    for name in names:
        opened = _Opened(name, options, bench, maker, budget)
        yield from _full(opened, options)
        opened.close()
    yield from _crowds(late, options, bench)


def _crowds(sizes: list[tuple[int, int]], options: argparse.Namespace, bench: Bench) -> Iterator[Case]:
    for N, D in sizes if "D" in options.sections else ():
        yield Case(f"D N={N} D={D}", lambda N=N, D=D: crowds.crowd(bench, N, D))  # type: ignore[misc]


def _full(opened: _Opened, options: argparse.Namespace) -> Iterator[Case]:
    """All sections on one bundle: at first the N that the targets are for."""
    wanted, name = options.sections, opened.name
    first, *others = options.particles or (TOY_PARTICLES if options.toy else PARTICLES)

    def step(n: int, methods: list[str]) -> Iterator[Case]:
        if "A" in wanted:
            run = lambda s: steps.full_steps(s, n, methods)  # noqa: E731
            yield Case(f"A {name} N={n}", lambda: opened.lines("A", run))
        if "B" in wanted or "C" in wanted:
            run_parts = lambda s: networks.parts(s, n, methods)  # noqa: E731
            yield Case(f"B and C {name} B={n}", lambda: opened.lines("B", run_parts))

    quick = [method for method in options.methods if method != "compiled"]
    yield from step(first, quick)
    mixes = arrivals.MIXES[1:] if options.toy else arrivals.MIXES
    length = TOY_STEPS if options.toy else arrivals.STEPS
    for jobs, n in mixes if "F" in wanted else ():
        run = lambda s, jobs=jobs, n=n: arrivals.arrivals(s, jobs, n, length)  # noqa: E731
        yield Case(f"F {name} {jobs} x N={n}", lambda run=run: opened.lines("F", run))  # type: ignore[misc]
    for n in options.compiled if "compiled" in options.methods else ():
        both = list(step(n, ["compiled"]))
        needs = 0.0 if options.toy else prepare.compile_seconds(name, n, options.compile_seconds)
        if both:
            yield Case(f"torch.compile {name} N={n}", lambda n=n, both=both: _compiled(name, n, both), needs)  # type: ignore[misc]
    for n in others:
        yield from step(n, quick)
    beside = (first,) if options.toy else side_by_side.PARTICLES
    for n in beside if "G" in wanted else ():
        yield Case(
            f"G {name} 2 x N={n // 2}",
            lambda n=n: opened.lines("G", lambda s: side_by_side.side_by_side(s, n, length)),  # type: ignore[misc]
            0 if options.toy else side_by_side.SECONDS,
        )


def _compiled(name: str, n: int, both: list[Case]) -> Iterator[Line]:
    """All that is beside torch.compile in one case: compiling takes minutes, and once for both. Each line as soon as
    it is there, since the run may be ended in the middle."""
    for line in (line for case in both for line in case.run()):
        if line["method"] == "compiled" and "median" in line:
            prepare.note_compiled(name, n)
        yield line


def _agreement(options: argparse.Namespace, bench: Bench, maker: subprocess.Popen | None, budget: Budget) -> list[Line]:
    if maker is not None:
        try:
            prepare.wait("fashion", maker, budget.left())
        except Exception as error:
            return [{"section": "agreement", "case": "fashion", "method": "engine", **steps.without_figure(error)}]
    bundle = FASHION / "bundle" if not bench.cuda else prepare.bundle_of("fashion")
    return agreement.agreement(bench, bundle, TOY_STEPS if options.toy else agreement.PARAMS.steps)


class _Opened:
    """A subject that is loaded when its first case runs, once its bundle is there."""

    def __init__(
        self, name: str, options: argparse.Namespace, bench: Bench, maker: subprocess.Popen | None, budget: Budget
    ):
        self.name, self.options, self.bench, self.maker, self.budget = name, options, bench, maker, budget
        self.subject: Subject | None = None
        self.broken: Exception | None = None

    def lines(self, section: str, run: Callable[[Subject], list[Line]]) -> list[Line]:
        """The lines of a case; a single one when there is no subject to run it on."""
        try:
            return run(self._load())
        except Exception as error:
            if self.subject is None:
                self.broken = error
            line = {"section": section, "case": self.name, "network": self.name, "method": "engine"}
            return [{**line, **steps.without_figure(error)}]

    def _load(self) -> Subject:
        if self.subject is None:
            if self.broken is not None:
                raise self.broken  # it would only fail again
            checkpoint, bundle = self._files()
            networks = load(checkpoint, prepare.SIZE.get(self.name), ["inpainting"], None)
            self.subject = Subject(self.name, networks, bundle, self.bench)
        return self.subject

    def _files(self) -> tuple[Path, Path]:
        if self.options.toy:
            return FASHION / "checkpoint", FASHION / "bundle"
        if self.options.bundle:
            return self.options.checkpoint, self.options.bundle
        assert self.maker is not None
        prepare.wait(self.name, self.maker, self.budget.left())
        return prepare.checkpoint_path(self.name), prepare.bundle_path(self.name)

    def close(self) -> None:
        """Memory for the next one."""
        if self.subject is not None:
            self.subject.close()
            self.subject = None
