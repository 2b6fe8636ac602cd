"""Times every Triton kernel on the GPU beside eager PyTorch and torch.compile of its plain definition.

    python -m rlsd.bench.kernels [--only TEXT] [--minutes M] [--without-compiled]

Each case first has to be right: against its definition in float64 it may err at most twice as much as the definition
in the case's own precision. Then the three run in turn, with the second-level cache flushed before each, timed with
CUDA events. One JSON line a case in bench/results/kernels-cuda.jsonl, with its share of the roofline: the larger of
bytes / measured copy bandwidth and operations / measured peak (of float32, or of products of halves where the kernel
makes such), over the median time.

On a CPU (--device cpu --out FILE), to rehearse, plain definitions stand in for the kernels of all rooms but step.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlsd.bench import measure
from rlsd.bench.gpu.roof import Roof
from rlsd.bench.gpu.roof import measured as measured_roof
from rlsd.bench.gpu.timing import Clock, milliseconds, seconds
from rlsd.bench.kernels import Case

ROOMS = ("repulsion", "norm", "narrow", "step")
SLACK = 1e-6  # of the result's size: both may be exact


def cases() -> list[Case]:
    """All rooms' cases, a room's turn after another's: where the time is short, each has some."""
    rooms = [importlib.import_module(f"rlsd.bench.kernels.{room}").CASES for room in ROOMS]
    return [case for turn in itertools.zip_longest(*rooms) for case in turn if case is not None]


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
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):  # once: not worth trying them all
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


def measured(case: Case, device: torch.device, rounds: int, roof: Roof, compile_too: bool) -> dict[str, Any]:
    """One result line."""
    error = check(case, device)
    arguments = case.make(device)
    runs = {"ours": lambda: case.ours(*arguments), "eager": lambda: case.plain(*arguments)}
    if compile_too:
        torch._dynamo.reset()  # or later shapes would share one code for all shapes
        compiled = torch.compile(case.plain, mode="max-autotune-no-cudagraphs", dynamic=False)
        runs["compiled"] = lambda: compiled(*arguments)
    times = {name: milliseconds(values) for name, values in seconds(runs, Clock(device, flush=True), rounds).items()}
    least = roof.seconds(case.operations, case.moved, halves=case.halves) * 1e3
    ours = times["ours"]["median"]
    return {
        "case": case.name,
        "ms": times,
        "error": error,
        "roofline_ms": round(least, 5),
        "roofline_share": round(least / ours, 3),
        **{f"speedup_{name}": round(time["median"] / ours, 2) for name, time in times.items() if name != "ours"},
    }


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no case is begun after so many")
    parser.add_argument("--without-compiled", action="store_true", help="torch.compile takes seconds for each case")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--beside", help="what else this machine does meanwhile, noted in every line")
    parser.add_argument("--out", type=Path, help="file for the JSON lines; needed with --device cpu")
    options = parser.parse_args()
    if options.device == "cpu" and options.out is None:
        parser.error("--device cpu writes no figures to bench/results: name a file with --out")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("rlsd.bench.kernels: no CUDA device here; these kernels are timed on an NVIDIA GPU", file=sys.stderr)
        return 2
    return race(options, torch.device(options.device, 0 if options.device == "cuda" else None))


def race(options: argparse.Namespace, device: torch.device) -> int:
    """Times the chosen cases until the minutes are over; the exit status."""
    end = time.monotonic() + 60 * options.minutes
    torch.backends.cudnn.benchmark = True  # PyTorch's own choice of convolutions: the baselines at their best
    roof = measured_roof(device, toy=device.type == "cpu")
    facts = {
        "bench": "kernels-cuda",
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "torch": torch.__version__,
        **({"beside": options.beside} if options.beside else {}),
        "copy_gb_s": round(roof.copy / 1e9, 1),
        "float32_tflop_s": round(roof.single / 1e12, 2),
    }
    failed, late = 0, []
    for case in (case for case in cases() if options.only in case.name):
        if time.monotonic() > end:
            late.append(case.name)
            continue
        try:
            line = measured(case, device, options.rounds, roof, not options.without_compiled)
        except Exception as error:  # the other cases still have their say
            said = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            line, failed = {"case": case.name, "wrong": said[:500]}, failed + 1
        print(line, flush=True)
        measure.record("kernels-cuda", [{**line, **facts}], options.out)
    if late:
        print(f"no time was left for {len(late)} cases: {', '.join(late)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
