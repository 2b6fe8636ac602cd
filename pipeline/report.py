"""report.json: everything that was asked, with what, on which machine, how long it took and what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from rlsd.engine import Engine
from rlsd.pipeline.calibration import pool
from rlsd.pipeline.images import sha256
from rlsd.pipeline.items import Plan, frame_of
from rlsd.pipeline.machine import machine, versions

PHASES = ("denoiser", "decoder", "decoder_pull", "features", "operators", "repulsion", "elementwise", "idle")


def describe_run(engine: Engine, plans: Sequence[Plan]) -> dict[str, Any]:
    """The part of the report that is known before the run: versions, machine, bundle, tasks with their settings."""
    facts, frame = engine.describe(), frame_of(engine)
    return {
        "format": "rlsd-report 1",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(),
        "bundle": {
            "name": engine.name,
            "path": str(engine.path.resolve()),
            "manifest_sha256": sha256(engine.path / "manifest.txt"),
            "image": list(engine.image_shape),
            "content": list(frame.content),
            "latent": list(engine.latent_shape),
            "precision": (facts.get("precision") or [""])[0],
        },
        "tasks": [plan_facts(plan) for plan in plans],
    }


def build_report(
    described: Mapping[str, Any],
    engine: Engine,
    records: Sequence[Mapping[str, Any]],
    failed: Sequence[Mapping[str, str]],
    seconds: float,
    share: float = 1.0,
) -> dict[str, Any]:
    """The whole report as plain values: describe_run's, times (share: see there), each item's record (record.record),
    and each task's calibration over all of its items."""
    order = {task["task"]: index for index, task in enumerate(described["tasks"])}
    items = sorted(records, key=lambda record: (order[record["task"]], record["item"]))
    pooled = {
        task: pool([i["calibration"] for i in items if i["task"] == task and i.get("calibration")]) for task in order
    }
    return {
        **described,
        "time": times(engine, seconds, share),
        "calibration": {task: figures for task, figures in pooled.items() if figures},
        "items": items,
        "failed": list(failed),
    }


def plan_facts(plan: Plan) -> dict[str, Any]:
    """One task with all its settings; sigma is None where the noise of a measurement is not known."""
    facts = plan.settings.facts()
    return {
        "task": plan.task.name,
        "summary": plan.task.summary,
        "operator": plan.task.operator,
        "measured": plan.measured,
        "parameter_files": {
            name: [{"path": str(path), "sha256": sha256(path)} for path in paths] for name, paths in plan.given.items()
        },
        **facts,
        "sigma": None if plan.measured and not plan.settings.sigma else facts["sigma"],
    }


def times(engine: Engine, seconds: float, share: float = 1.0) -> dict[str, Any]:
    """Wall time, rate, where it ran, and the seconds of each phase summed over the engine's threads.

    share: of the particles that this engine has; steps and rate are those of all, which take the same steps.
    """
    stats, facts = engine.stats(), engine.describe()
    wall, threads = float(stats["wall"]), int(facts.get("threads", ["0"])[0])
    steps = round(stats["particle_steps"] / share)
    return {
        "seconds": round(seconds, 3),
        "engine_seconds": round(wall, 3),
        "threads": threads,
        "where": facts["device"][0] if engine.on_gpu else f"{threads} threads",
        "particle_steps": steps,
        "particle_steps_per_second": round(steps / wall, 1) if wall > 0 else None,
        "thread_seconds": {phase: round(float(stats[phase]), 3) for phase in PHASES},
    }


def to_json(report: Mapping[str, Any]) -> str:
    """The report as strict JSON (no NaN)."""
    return json.dumps(report, indent=1, allow_nan=False) + "\n"
