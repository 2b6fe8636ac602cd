"""The fashion presets are what the committed search found."""

from __future__ import annotations

import json
from pathlib import Path

from rlsd.bench.tune import FIRST
from rlsd.pipeline.presets import FASHION

RESULTS = Path(__file__).parents[1] / "bench" / "results" / "tune-fashion.jsonl"
OTHERWISE = {"hdr": {"gamma": 0.0}, "small-visible": {"gamma": 5.0}}  # presets.py says why
SEARCHED = ("rho", "lambda_", "lr_x", "lr_z", "gamma", "steps")


def test_all_tasks_have_the_settings_that_their_last_search_chose() -> None:
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    chosen = {
        line["task"]: line["params"] for line in lines if line.get("chosen") and line.get("first", FIRST) == FIRST
    }
    assert set(chosen) == set(FASHION) - {"colour"}  # which the gray prior cannot do
    for task, params in chosen.items():
        preset = FASHION[task]._asdict()
        wanted = {name: params[name] for name in SEARCHED} | OTHERWISE.get(task, {})
        assert {name: preset[name] for name in SEARCHED} == wanted, task
