"""The fashion presets are what the committed search found."""

from __future__ import annotations

import json
from pathlib import Path

from rlsd.bench.tune import FIRST
from rlsd.engine import Params
from rlsd.pipeline.presets import FASHION, SD512
from rlsd.pipeline.settings import settings_for
from rlsd.pipeline.tasks import TASKS

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


def test_published_settings_have_the_epsilon_of_as_many_particles() -> None:
    published = {task: settings_for(TASKS[task], "sd512", {}).params.adam_eps for task in SD512}
    assert published["half"] == 4e-8 and published["sr8"] == published["random"] == published["small-box"] == 2e-8
    assert published["phase-retrieval"] == 6e-8
    assert all(settings_for(TASKS[task], "fashion", {}).params.adam_eps == Params().adam_eps for task in FASHION)
