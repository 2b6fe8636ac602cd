"""Tables and plots of result lines that are made up."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlsd.bench import measure, report
from rlsd.pipeline import cli

PNG = b"\x89PNG"


def line(**changes: Any) -> dict[str, Any]:
    """One line of section A on a machine that does not exist."""
    return {
        "bench": "gpu", "section": "A", "case": "sd15 N=8", "network": "sd15", "particles": 8, "method": "engine",
        "unit": "particle-steps/s", "median": 1.25, "q1": 1.0, "q3": 1.5, "rounds": 5, "error": 1e-3,
        "roofline_share": 0.25, "speedup": {"shared": 2.0}, "toy": False, "gpu": "Abacus 9", "driver": "1.2",
        "targets": [{"target": "A", "name": "A: beads", "wanted": ">= 67", "value": 1.25, "verdict": "missed"}],
        "versions": {"torch": "2.0", "xformers": None}, "roof": {"matrix_flops": 2e12, "copy_bytes": 3e9},
        "machine": "Slate, 2 cores", "commit": "aaaa", "time": "2026-01-02T00:00:00+00:00", **changes,
    }  # fmt: skip


def written(folder: Path, lines: list[dict[str, Any]], name: str = "gpu-Abacus-9.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder


def test_tables_and_plots(tmp_path: Path) -> None:
    lines = [
        line(),
        line(method="shared", median=0.625, speedup={}, targets=[]),
        line(particles=16, case="sd15 N=16"),
        line(method="xformers", left_out="no wheel", targets=[]),
        line(section="D", case="N=4 D=384", features=384, particles=4, unit="ms", targets=[], launches_per_step=2),
        line(section="B", case="sd15 denoiser B=8", wrong="it is far off", targets=[]),
    ]
    for each in lines[3], lines[5]:
        for key in ("median", "q1", "q3", "roofline_share"):
            del each[key]
    path = report.write(written(tmp_path / "in", lines), tmp_path / "out")
    text = path.read_text()
    assert "## Abacus 9, Slate, 2 cores" in text and "Commit aaaa, 2026-01-02; torch 2.0; driver 1.2." in text
    assert "2 TFLOP/s, 3 GB/s" in text and "rehearsal" not in text
    assert "| A: beads | >= 67 | 1.25 | missed |" in text
    assert "| sd15 N=8 | engine | 1.25 particle-steps/s | 1 to 1.5 | 25.0% | 2.00x shared | 0.001 |" in text
    assert "- sd15 N=8, xformers: left out: no wheel" in text
    assert "- sd15 denoiser B=8, engine: wrong: it is far off" in text
    assert "launches a step: 2" in text
    plots = sorted(file.name for file in (tmp_path / "out").glob("*.png"))
    assert plots == ["abacus-9-slate-2-cores-repulsion-384.png", "abacus-9-slate-2-cores-steps-sd15.png"]
    assert all(f"]({name})" in text and (tmp_path / "out" / name).read_bytes()[:4] == PNG for name in plots)


def test_equal_files_give_equal_reports(tmp_path: Path) -> None:
    folder = written(tmp_path / "in", [line(), line(method="shared")])
    for name in ("one", "two"):
        report.write(folder, tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_the_newest_commit_of_each_machine_counts() -> None:
    later = "2026-03-01T00:00:00+00:00"
    lines = [
        line(median=1.0),
        line(median=2.0, commit="bbbb", time="2026-02-01T00:00:00+00:00"),
        line(median=3.0, commit="bbbb", time=later),  # the same case again
        line(median=4.0, commit="bbbb", time=later, speedup={"compiled": 1.0}),  # beside something else
        line(median=5.0, gpu="Abacus 10"),
        line(median=6.0, bench="engine-cpu", gpu="none"),
    ]
    for order in (lines, lines[::-1]):
        assert sorted(each["median"] for each in report.newest(order)) == [3.0, 4.0, 5.0, 6.0]


def test_runs_of_other_bundles_and_memory_stay_apart(tmp_path: Path) -> None:
    """A slower bundle, measured last, must not pass for the shipped one."""
    common = line(bench="engine-cpu", gpu="none", case="engine", engine_ratio={"median": 1.0}, bundle="bundle",
                  keep_memory=False)  # fmt: skip
    lines = [
        {**common, "median": 7.0},
        {**common, "median": 6.0, "keep_memory": True},
        {**common, "median": 5.0, "bundle": "without", "time": "2026-01-02T00:00:09+00:00"},
    ]
    text = report.write(written(tmp_path / "in", lines), tmp_path / "out").read_text()
    for row in "bundle | given back | 8 | engine | 7", "bundle | kept | 8 | engine | 6", "without | given back | 8":
        assert f"| {row} |" in text


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_what_a_run_records_does_not_make_another_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its first line would be one commit's and the rest another's; `newest` keeps those of one."""
    results, source = tmp_path / "bench" / "results" / "some.jsonl", tmp_path / "engine" / "core.py"
    for file in results, source:
        file.parent.mkdir(parents=True)
        file.write_text("")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "bench" / "measure.py"))
    for _ in range(2):
        measure.record("some", [{}], results)
    commits = [json.loads(row)["commit"] for row in results.read_text().splitlines()]
    assert commits[0] == commits[1] and not commits[0].endswith("+")
    source.write_text("other")
    assert measure.commit() == commits[0] + "+"


def test_rounds_are_taken_in_turn_and_not_begun_when_the_time_is_up() -> None:
    order: list[str] = []
    runs = {name: partial(order.append, name) for name in "ab"}
    times = measure.interleaved(runs, 9, limit=0.0)
    assert order == ["a", "b"] * measure.LEAST_ROUNDS and {len(each) for each in times.values()} == {3}
    assert len(measure.interleaved(runs, 9, lambda run: 1.0)["a"]) == 9
    assert measure.quartiles([5, 1, 2, 4, 3]) == {"median": 3, "q1": 2, "q3": 4}


def test_the_peak_counts_a_product_and_a_sum_for_each_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    seconds = itertools.count()
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    assert measure.matrix_peak(2) == 2 * 1536**3  # each takes a second of this clock


def test_batches(tmp_path: Path) -> None:
    """Memory: the first sample at or after each share of the items, of all samples of the run."""
    common = {"machine": "Slate, 2 cores", "commit": "aaaa", "time": "2026-01-02T00:00:00+00:00", "items": 8}
    ratio = {"median": 0.995, "q1": 0.98, "q3": 1.01}
    lines = [
        *({**common, "bench": "batch-memory", "done": done, "resident_mib": 100.0 + done} for done in (0, 3, 4, 8)),
        {**common, "bench": "batch-throughput", "case": "batch", "particles": 4, "steps": 50, "median": 321.0,
         "engine_ratio": ratio},
        {**common, "bench": "batch-kills", "case": "tiny", "kills": 9, "by_way": {"torn": 4, "after": 5},
         "resumed_from_snapshot": 6, "differences": 2},
    ]  # fmt: skip
    text = report.write(written(tmp_path / "in", lines), tmp_path / "out").read_text()
    assert "| 8 | 3 | 103 |\n| 8 | 3 | 103 |\n| 8 | 4 | 104 |\n| 8 | 8 | 108 |\n| 8 | 8 | 108 |" in text
    assert "| batch | 8 | 4 | 50 | 321 | 0.995 | 0.98 | 1.01 |" in text
    assert "| tiny | 9 | 4 torn, 5 after | 6 | 2 |" in text


def test_nothing_measured(tmp_path: Path) -> None:
    assert "No result lines" in report.write(tmp_path, tmp_path / "out").read_text()


def test_what_lies_in_the_repository_can_be_shown(tmp_path: Path) -> None:
    text = report.write(measure.RESULTS, tmp_path).read_text()
    assert "### Full steps on a CPU (engine-cpu)" in text and "### The core's kernels on a CPU" in text
    assert "### Batches: memory" in text and "### Batches: throughput" in text and "### Batches: kills" in text


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = written(tmp_path / "in", [line()]), tmp_path / "out"
    words = ["bench", "--report", "--results", str(folder), "--out", str(out)]
    assert cli.run(words) == 0
    assert str(out / "report.md") in capsys.readouterr().out.replace("\n", "")
    (folder / "broken.jsonl").write_text("{}\n{no\n")
    assert cli.run(words) == 2
    assert "broken.jsonl, line 2, is not JSON" in capsys.readouterr().err
    assert cli.run([*words[:2], "--results", str(tmp_path / "missing"), "--out", str(out)]) == 2
    assert "missing" in capsys.readouterr().err
