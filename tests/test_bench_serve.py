"""The serving benchmark: its arithmetic with made-up runs and a stand-in engine, and a tiny run of the real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsd.bench import report, serve
from rlsd.bench.serve_lines import Cell, capacity_lines, load_lines
from rlsd.bench.serve_load import Figures, Mix, figures, latency, poisson, sizes
from rlsd.bench.serve_queue import Arrival, FixedBatches, OneByOne, Packed, Served, Ticks, one_by_one, packed
from rlsd.bench.serve_queue import serve as served_by
from rlsd.bench.serve_report import served
from rlsd.engine import Engine, Job, Params, Result
from rlsd.models.fashion import PATH
from rlsd.pipeline import cli

TINY = serve.Settings(loads=(0.8,), mixes=((1, 2),), settle=0.2, window=0.4, seeds=1, steps=3, particles=4)


def job(particles: int, steps: int = 4) -> Job:
    return Job(np.zeros(1, np.float32), "none", particles=particles, params=Params(steps=steps))


class FakeHandle:
    def __init__(self, job: Job) -> None:
        self.job, self.left, self.released = job, job.params.steps - 1, False

    @property
    def done(self) -> bool:
        return self.left == 0

    def result(self) -> Result:
        assert self.done
        return Result(np.full(1, self.job.particles), None, 0.0)

    def release(self) -> None:
        self.released = True


class FakeEngine:
    """Every job in flight takes a step with each tick; any number of them."""

    def __init__(self) -> None:
        self.handles: list[FakeHandle] = []
        self.particle_steps = 7  # of an earlier run

    def submit(self, job: Job) -> FakeHandle:
        self.handles.append(FakeHandle(job))
        return self.handles[-1]

    def tick(self) -> int:
        for handle in self.handles:
            self.particle_steps += handle.job.particles * (not handle.done)
            handle.left -= not handle.done
        return sum(not handle.done for handle in self.handles)

    def stats(self) -> dict[str, float]:
        return {"particle_steps": self.particle_steps}


# ------------------------------------------------------------------ the load


def test_arrivals_are_a_poisson_process() -> None:
    rate, end = 50.0, 400.0
    moments = np.array(poisson(rate, 3, end))
    assert (np.diff(moments) > 0).all() and moments[0] > 0 and moments[-1] < end
    assert abs(len(moments) - rate * end) < 4 * (rate * end) ** 0.5
    gaps = np.diff(moments)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.03)  # exponential
    assert np.corrcoef(gaps[:-1], gaps[1:])[0, 1] == pytest.approx(0, abs=0.03)
    counts = np.histogram(moments, bins=int(end), range=(0, end))[0]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.3)  # 4 standard deviations of the ratio


def test_one_seed_has_the_same_arrivals_at_every_rate() -> None:
    slow, fast = poisson(2.0, 5, 10.0), poisson(8.0, 5, 10.0)
    assert np.allclose(np.array(slow), 4 * np.array(fast[: len(slow)]))
    assert poisson(2.0, 6, 10.0) != slow


def test_sizes_are_as_frequent_and_the_same_however_many_are_drawn() -> None:
    drawn = sizes(Mix(1, 8, 19), 1, 8000)
    counts = np.bincount(drawn)
    assert counts[0] == 0 and len(counts) == 9
    assert (abs(counts[1:] - 1000) < 4 * 1000**0.5).all()
    assert sizes(Mix(1, 8, 19), 1, 10) == drawn[:10] != sizes(Mix(1, 8, 19), 2, 10)
    assert Mix(1, 8, 19).work == pytest.approx(np.mean(drawn) * 19, rel=0.05)


def test_percentiles_are_latencies_that_were_seen() -> None:
    values = np.random.default_rng(0).permutation(np.arange(1.0, 101))
    assert latency(values) == {"p50": 50, "p95": 95, "p99": 99}
    assert latency([3.0]) == {"p50": 3, "p95": 3, "p99": 3}
    assert latency([1.0, 2.0, 9.0]) == {"p50": 2, "p95": 9, "p99": 9}


def test_figures_of_a_run() -> None:
    arrivals = [Arrival(0.5, job(2)), Arrival(1.0, job(1))]  # 3 steps each: 9 particle-steps
    run = Served({0: 2.0, 1: 6.0}, times=[0.0, 2.0, 6.0], steps=[10, 16, 19])
    found = figures(arrivals, run, 0.0, 4.0)
    assert found == Figures(rate=7.5 / 4, jobs=1 / 4, left=1, offered=9 / 4, latencies=(1.5, 5.0))
    assert run.rate(0.0, 8.0) == 9 / 8  # all was done before


def test_what_came_before_the_window_is_not_of_its_figures() -> None:
    arrivals = [Arrival(0.5, job(2)), Arrival(1.5, job(1)), Arrival(1.9, job(4))]
    run = Served({0: 1.5, 1: 3.0, 2: 7.0}, times=[0.0, 1.0, 3.0, 7.0], steps=[10, 16, 19, 31])
    found = figures(arrivals, run, 1.5, 3.0)
    done = (3 * 0.75 + 12 * 1.5 / 4) / 3  # three quarters of the second tick, and of the third what is before 4.5
    assert found == Figures(rate=done, jobs=1 / 3, left=1, offered=15 / 3, latencies=(1.5, pytest.approx(5.1)))


# ------------------------------------------------------------------ ways to serve


@pytest.mark.parametrize(
    ("way", "finished"),
    [
        (Packed(), [3, 4, 5, 23]),
        (OneByOne(), [3, 6, 9, 23]),
        (FixedBatches(4, 2), [5, 5, 8, 25]),  # two at 2, when the third overfills it; the last has to wait
        (FixedBatches(4, 0), [3, 6, 9, 23]),  # two and four do not fit together
        (FixedBatches(7, 9), [5, 5, 5, 32]),  # full with the third
        (FixedBatches(6, 0.5), [3.5, 6.5, 6.5, 23.5]),
        (FixedBatches(1, 9), [3, 6, 9, 23]),  # larger than the batch: alone
    ],
)
def test_when_each_job_is_done(way: Packed, finished: list[float]) -> None:
    """Jobs of 1, 2, 4 and 1 particles and 3 ticks, at 0, 1, 2 and 20."""
    arrivals = [Arrival(at, job(n)) for at, n in ((0, 1), (1, 2), (2, 4), (20, 1))]
    clock = Ticks(FakeEngine())
    found = served_by(clock, arrivals, way, clock, keep=[1, 3])
    assert [found.finished[place] for place in range(4)] == finished
    assert {place: particles.tolist() for place, particles in found.kept.items()} == {1: [2], 3: [1]}
    assert found.steps[-1] - found.steps[0] == 24 and found.rate(0, 100) == pytest.approx(0.24)


def test_what_is_not_done_in_time_is_dropped() -> None:
    engine = FakeEngine()
    clock = Ticks(engine)
    found = served_by(clock, [Arrival(0, job(1)), Arrival(2, job(2)), Arrival(9, job(4))], Packed(), clock, until=4)
    assert found.finished == {0: 3} and found.rate(0, 4) == (3 + 4) / 4
    assert [handle.released for handle in engine.handles] == [False, True]


# ------------------------------------------------------------------ lines


def row(rates: dict[str, float], p99: dict[str, float], load: float | None = 0.8, most: int = 2) -> list[Cell]:
    """Cells of two equal runs."""
    return [
        Cell(Mix(1, most, 19), load, way, [Figures(rate, 1.0, 3, 300.0, (p99[way],))] * 2)
        for way, rate in rates.items()
    ]


RATES = {"packed": 300.0, "one after another": 100.0, "fixed batches": 290.0}
P99 = {"packed": 1.0, "one after another": 7.0, "fixed batches": 1.5}
BACKLOG = row({"packed": 400.0, "one after another": 110.0, "fixed batches": 390.0}, P99, None)


def test_lines_of_a_load() -> None:
    lines = {line["method"]: line for line in load_lines(row(RATES, P99), BACKLOG)}
    assert [lines[way]["diverges"] for way in RATES] == [False, True, False]
    ours = lines["packed"]
    assert ours["speedup"]["one after another"] == 3 and ours["p99_shorter_by"]["fixed batches"] == 1.5
    assert [each["verdict"] for each in ours["targets"]] == ["met", "met"]
    assert ours["latency"]["p99"] == {"median": 1.0, "q1": 1.0, "q3": 1.0} and ours["jobs"] == 2
    slow = {**RATES, "packed": 199.0}
    late = {**P99, "packed": 1.51}
    verdicts = [each["verdict"] for each in load_lines(row(slow, late), BACKLOG)[0]["targets"]]
    assert verdicts == ["missed", "missed"]
    (only,) = load_lines(row(RATES, P99, most=8), BACKLOG)[0]["targets"]
    assert "p99" in only["name"] and "N=1-8 load 80%" in only["name"]
    assert "targets" not in load_lines(row(RATES, P99, load=0.5), BACKLOG)[0]
    line = capacity_lines(BACKLOG)[0]
    assert (line["case"], line["method"], line["median"]) == ("N=1-2 backlog", "packed", 400) and "load" not in line


def test_a_difference_leaves_no_figure() -> None:
    cells = row(RATES, P99)
    want = {0: np.array([1.0, 2.0], np.float32), 5: np.array([0.0, 3.0], np.float32)}
    near = {**want, 5: np.array([0.0, np.nextafter(np.float32(3), np.float32(4))], np.float32)}
    cells[1].check(want, want, 0.0)
    cells[2].check(near, want, 1e-3)
    assert (cells[1].same, cells[1].wrong, cells[1].checked) == (True, "", 2)
    assert not cells[2].same and cells[2].wrong == "" and 0 < cells[2].error < 1e-6
    assert "median" in load_lines(cells, BACKLOG)[2]
    cells[0].check(near, want, 0.0)
    lines = load_lines(cells, BACKLOG)
    assert "job 5 differs" in lines[0]["wrong"] and "median" not in lines[0]
    assert not any("targets" in line or "speedup" in line for line in lines)
    cells[1].check({**want, 0: want[0] * np.nan}, want, 1e-3)
    assert "job 0 differs" in cells[1].wrong


# ------------------------------------------------------------------ the real engine


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(PATH / "bundle", threads=1, max_particles=TINY.particles) as opened:
        yield opened


def test_every_way_gives_the_bytes_of_a_job_alone(engine: Engine) -> None:
    race = serve.Race(engine, TINY, print)
    work = list(race.jobs(Mix(1, 2, 2), 1, 6))
    alone = one_by_one(engine, work)
    assert len({each.tobytes() for each in alone}) == len(work)  # random numbers of their own
    for way in race.ways():
        clock = Ticks(engine)
        arrivals = [Arrival(0.7 * place, each) for place, each in enumerate(work)]
        kept = served_by(clock, arrivals, way, clock, keep=range(6)).kept
        assert [kept[place].tobytes() for place in range(6)] == [each.tobytes() for each in alone], way.name
    assert [each.tobytes() for each in packed(engine, work, 2)] == [each.tobytes() for each in alone]


def test_a_wrong_result_is_said(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = lambda engine, work: [1.001 * each for each in one_by_one(engine, work)]  # noqa: E731
    monkeypatch.setattr(serve, "one_by_one", alone)
    lines = serve.Race(engine, TINY, print).lines()
    assert len(lines) == 3 and all("differs" in line["wrong"] and "median" not in line for line in lines)
    facts = {"bench": "serve-cpu", "network": "fashion", "settings": str(TINY)}
    text = "\n".join(served([{**line, **facts} for line in lines]))
    assert text.count("- N=1-2 backlog, ") == 3 and "not all bytes equal" in text


def test_too_few_arrivals_are_said(engine: Engine) -> None:
    race = serve.Race(engine, TINY, print)
    with pytest.raises(ValueError, match=r"window is 0\.4: no job arrived"):
        race.round(race.row(Mix(1, 2, 2), 0.2), 1e-9, 0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "in" / "serve.jsonl"
    words = ["--loads", "0.8", "--mixes", "1-3", "--window", "0.4", "--seeds", "1", "--steps", "3", "--particles", "6"]
    assert cli.run(["bench", "serve", *words, "--threads", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "**N=1-3 load 80%**" in said and "all bytes equal" in said and "p99 of fixed batches over ours" in said
    lines: list[dict[str, Any]] = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 3 + 3 and all(line["bench"] == "serve-cpu" and line["commit"] for line in lines)
    loaded = [line for line in lines if "load" in line]
    assert {line["method"] for line in loaded} == {"packed", "one after another", "fixed batches"}
    for line in loaded:
        assert line["same_bytes"] and line["error"] == 0 and line["checked"] >= 1
        assert 0 < line["latency"]["p50"]["median"] <= line["latency"]["p99"]["median"]
        assert line["median"] > 0 and line["rounds"] == 1 and line["jobs"] > 0
    text = report.write(out.parent, tmp_path / "out").read_text()
    assert "### Jobs that arrive at random (serve-cpu)" in text and "| packed |" in text
    assert [file.name.endswith("serve-cpu-n1-3.png") for file in (tmp_path / "out").glob("*.png")] == [True]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--loads", "0.5,x"], "loads"),
        (["--loads", "0"], "loads"),
        (["--mixes", "8"], "mixes"),
        (["--mixes", "3-2"], "mixes"),
        (["--window", "0"], "window"),
        (["--steps", "1"], "steps"),
        (["--timeout", "nan"], "timeout"),
        (["--model", "nothing"], "nothing"),
    ],
)
def test_what_cannot_be_measured(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "serve", *words]) == 2
    said = capsys.readouterr().err
    assert named in said and len(said.splitlines()) == 1
