"""Kernel-level results become JSON lines beside the engine's: bench/results/kernels-cpu.jsonl."""

from __future__ import annotations

from typing import Any

from rlsd.bench import measure


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Called by pytest-benchmark when it runs with --benchmark-json."""
    lines = [
        {
            "bench": "kernels-cpu",
            "case": case["name"],
            "group": case["group"],
            "unit": "s",
            **{key: float(f"{case['stats'][key]:.4g}") for key in ("median", "q1", "q3")},
            "rounds": case["stats"]["rounds"],
        }
        for case in output_json["benchmarks"]
    ]
    measure.record("kernels-cpu", lines)
