"""What a run on a GPU finds made, or waits for: checkpoints, bundles, what torch.compile compiled."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsd.bench.gpu import __main__ as race
from rlsd.bench.gpu import plan, prepare
from rlsd.bench.gpu.roof import Roof
from rlsd.bench.gpu.subject import Bench

BENCH = Bench(torch.device("cpu"), Roof(matrix=8e14, single=5e13, copy=2.5e12))


def broken(*_: Any) -> Any:
    raise ZeroDivisionError


def test_exports_side_by_side_do_not_end_with_one_that_fails() -> None:
    def ending(*codes: str) -> list[subprocess.Popen]:
        return [subprocess.Popen([sys.executable, "-c", code]) for code in codes]

    assert prepare.side_by_side(ending("pass", "pass"))
    for failing in ("raise SystemExit(3)", "import os; os.kill(os.getpid(), 9)"):
        makers = ending(failing, "import time; time.sleep(0.3)")
        assert not prepare.side_by_side(makers)
        assert makers[1].returncode == 0


def test_exports_side_by_side_end_with_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    maker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(maker, "wait", broken)  # as the handler of a signal does
        prepare.side_by_side([maker])
    assert maker.wait(10) != 0


def test_an_export_that_is_missing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "KEPT", tmp_path)
    running = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(prepare.LeftOut, match="not done in time"):
        prepare.wait("sd15", running, 0)
    running.kill()
    running.wait()
    with pytest.raises(RuntimeError, match="failed with status"):
        prepare.wait("sd15", running, 10)
    options = race.parse(["--sections", "agreement", "--networks", "sd15"])
    first = next(plan.cases(options, BENCH, running, plan.Budget(1)))
    (line,) = first.run()  # and the cases behind it go on
    assert first.title == "agreement with the CPU" and "failed with status" in line["failed"]
    prepare.bundle_path("sd15").mkdir()
    prepare.wait("sd15", running, 0)
    assert prepare.compile_seconds("sd15", 8) > 100
    prepare.note_compiled("sd15", 8)
    assert prepare.compile_seconds("sd15", 8) < 100
    assert math.isinf(plan.Budget(math.inf).left())


def test_the_time_for_compiling_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "KEPT", tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    prepare.keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")

    def needs(*words: str) -> float:
        options = race.parse(["--networks", "sd15", "--sections", "A", *words])
        all_cases = plan.cases(options, BENCH, None, plan.Budget(1))
        return next(case.needs for case in all_cases if case.title.startswith("torch.compile"))

    assert needs() == 600 and needs("--compile-seconds", "30") == 30
    line = {"method": "compiled", "median": 1.0}
    both = [plan.Case("A", lambda: [line]), plan.Case("B and C", broken)]  # ended in the middle of B
    lines = plan._compiled("sd15", 8, both)
    assert next(lines) == line and needs() == 60
