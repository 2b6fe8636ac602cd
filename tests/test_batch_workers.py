"""The processes that `rlsd batch --workers` starts."""

from __future__ import annotations

from pathlib import Path

from batch_case import batch, bundle, here  # noqa: F401


def test_workers_run_nothing_of_the_current_folder() -> None:
    for name in ("queue", "types", "threading", "rlsd"):
        Path(f"{name}.py").write_text("open('was-run', 'w').close()\nraise SystemExit(1)\n")
    assert batch("--workers", 2) == 0
    assert not Path("was-run").exists()
