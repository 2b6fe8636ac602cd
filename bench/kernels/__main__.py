"""Times every Triton kernel on the GPU beside eager PyTorch and torch.compile of its plain definition.

    python -m rlsd.bench.kernels [--only TEXT]

Each case first has to be right: against its definition in float64 it may err at most twice as much as the definition
in the case's own precision. Then the three run in turn, with the second-level cache flushed before each, timed with
CUDA events. One JSON line a case in bench/results/kernels-cuda.jsonl, with its share of the roofline: the larger of
bytes / measured copy bandwidth and operations / measured float32 peak, over the median time.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlsd.bench import measure
from rlsd.bench.kernels import Case

ROOMS = ("repulsion", "norm", "step")
FLUSH_BYTES = 1 << 28  # several times any GPU's second-level cache
SLACK = 1e-6  # of the result's size: both may be exact


def cases() -> list[Case]:
    """All rooms' cases."""
    return [case for room in ROOMS for case in importlib.import_module(f"rlsd.bench.kernels.{room}").CASES]


def tensors(result: Any) -> list[Tensor]:
    """The floating-point results of a case."""
    several = result if isinstance(result, (tuple, list)) else (result,)
    return [value for value in several if isinstance(value, Tensor) and value.is_floating_point()]


def doubled(arguments: Sequence[Any]) -> list[Any]:
    """The same arguments in float64."""
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in arguments]


def fresh(arguments: Sequence[Any]) -> list[Any]:
    """Copies: a kernel may work in place."""
    return [v.clone() if isinstance(v, Tensor) else v for v in arguments]


def check(case: Case, device: torch.device) -> float:
    """The largest relative error of ours; raises AssertionError if it exceeds twice the plain version's."""
    arguments = case.make(device)
    exact = tensors(case.plain(*doubled(fresh(arguments))))
    plain = tensors(case.plain(*fresh(arguments)))
    ours = tensors(case.ours(*fresh(arguments)))
    assert len(ours) == len(exact) > 0, f"{case.name}: {len(ours)} results, {len(exact)} wanted"
    worst = 0.0
    for mine, low, want in zip(ours, plain, exact):
        scale = float(want.double().norm()) or 1.0
        error, allowed = (float((x.double() - want).norm()) / scale for x in (mine, low))
        assert error <= 2 * allowed + SLACK, f"{case.name}: error {error:.2e}, plain version {allowed:.2e}"
        worst = max(worst, error)
    return worst


def milliseconds(runs: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Quartiles of each run's time, interleaved, the cache flushed before each."""
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.float32, device=device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: measure.quartiles(values) for name, values in times.items()}


def roof(device: torch.device) -> tuple[float, float]:
    """Measured copy bandwidth in bytes/s (read and written) and float32 peak in FLOP/s."""
    source = torch.empty(1 << 28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device=device)
    torch.backends.cuda.matmul.allow_tf32 = False
    times = milliseconds({"copy": lambda: target.copy_(source), "product": lambda: a @ a}, device, 10)
    return 2 * 4 * (1 << 28) / (times["copy"]["q1"] / 1e3), 2 * 8192**3 / (times["product"]["q1"] / 1e3)


def measured(case: Case, device: torch.device, rounds: int, bandwidth: float, peak: float) -> dict[str, Any]:
    """One result line."""
    error = check(case, device)
    arguments = case.make(device)
    compiled = torch.compile(case.plain, mode="max-autotune-no-cudagraphs")
    runs = {
        "ours": lambda: case.ours(*arguments),
        "eager": lambda: case.plain(*arguments),
        "compiled": lambda: compiled(*arguments),
    }
    times = milliseconds(runs, device, rounds)
    least = max(case.moved / bandwidth, case.operations / peak) * 1e3
    return {
        "case": case.name,
        "ms": times,
        "error": error,
        "roofline_ms": round(least, 5),
        "roofline_share": round(least / times["ours"]["median"], 3),
        "speedup_eager": round(times["eager"]["median"] / times["ours"]["median"], 2),
        "speedup_compiled": round(times["compiled"]["median"] / times["ours"]["median"], 2),
    }


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("rlsd.bench.kernels: no CUDA device here; these kernels are timed on an NVIDIA GPU", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    bandwidth, peak = roof(device)
    facts = {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "copy_gb_s": round(bandwidth / 1e9, 1),
        "float32_tflop_s": round(peak / 1e12, 2),
    }
    failed = 0
    for case in cases():
        if options.only not in case.name:
            continue
        try:
            line = measured(case, device, options.rounds, bandwidth, peak)
        except AssertionError as error:
            line, failed = {"case": case.name, "wrong": str(error)}, failed + 1
        print(line, flush=True)
        measure.record("kernels-cuda", [{**line, **facts}])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
