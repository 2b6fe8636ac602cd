"""Rounds, medians, the machine's name and its measured peak: shared by all benchmarks."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from rlsd.pipeline import machine as this_machine

RESULTS = Path(__file__).parent / "results"
LEAST_ROUNDS = 3


def wall_seconds(run: Callable[[], Any]) -> float:
    """Seconds of one call, by the processor's clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    seconds_of: Callable[[Callable[[], Any]], float] = wall_seconds,
    limit: float = math.inf,
) -> dict[str, list[float]]:
    """Calls every run once a round, in turn: the seconds of each call. Warm up before.

    seconds_of: the clock. limit: no further round is begun after so many seconds, once there are LEAST_ROUNDS.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + limit
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name, run in runs.items():
            times[name].append(seconds_of(run))
    return times


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, to five digits."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(f"{middle:.5g}"), "q1": float(f"{low:.5g}"), "q3": float(f"{high:.5g}")}


def machine() -> str:
    """The processor's name and the number of processors this process may use."""
    facts = this_machine.machine()
    return f"{facts['processor']}, {facts['cores']} cores"


def commit() -> str:
    """The checkout's commit, with `+` behind it when files differ from it, other than those that `record` adds to."""
    here = Path(__file__).parent
    if shutil.which("git") is None:
        return "unknown"
    run = lambda *words: subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)  # noqa: E731
    head = run("rev-parse", "--short", "HEAD").stdout.strip() or "unknown"
    differ = run("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results")
    return head + ("+" if differ.stdout.strip() else "")


def matrix_peak(seconds: float = 1.0) -> float:
    """FLOP/s of a float32 matrix product on all processors: the roof for compute-bound work, measured.

    Of PyTorch's product and ONNX Runtime's, each tried for so many seconds, the faster: which that is depends on the
    processor (PyTorch's MKL leaves AVX-512 of AMD's unused).
    """
    import onnxruntime
    import torch
    from onnx import TensorProto, helper

    side = 1536
    a, b = torch.randn(side, side), torch.randn(side, side)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [side, side]) for name in "abc"]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {"a": a.numpy(), "b": b.numpy()}
    best = 0.0
    for product in (lambda: a @ b, lambda: session.run(None, given)):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            product()
            best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def record(name: str, lines: list[dict], path: Path | None = None) -> Path:
    """Appends result lines, each with machine, commit and time, to `path`, default bench/results/NAME.jsonl."""
    path = path or RESULTS / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"machine": machine(), "commit": commit(), "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    with open(path, "a") as stream:
        for line in lines:
            stream.write(json.dumps({**line, **facts}) + "\n")
    return path


def installed(package: str) -> str | None:
    """Version of an installed package, None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """Version of NVIDIA's driver, None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip() or None
