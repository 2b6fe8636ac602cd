"""The race on one GPU: full steps, networks, repulsion, packing, each against what PyTorch users have.

    python -m rlsd.bench.gpu [--minutes 8] [--sections A B C D F G agreement] [--networks sd15 sd21-base]
    python -m rlsd.bench.gpu --device cpu --toy --out FILE      the same road on a CPU with the shipped prior

One JSON line for each figure in bench/results/gpu-NAME.jsonl; `rlsd bench --report` makes tables and plots of them.
Cases run in the order of what they tell; those for which no time is left are named. Exit status: 0, even where a
target is missed; 1 when a result was wrong or something of ours broke; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rlsd.bench import measure
from rlsd.bench.gpu import Line, plan, prepare, roof, targets, torch_step
from rlsd.bench.gpu.subject import Bench
from rlsd.engine import version

SECTIONS = ("A", "B", "C", "D", "F", "G", "agreement")


def main(given: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parse(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("rlsd.bench.gpu: no CUDA device here; --device cpu --toy --out FILE rehearses it", file=sys.stderr)
        return 2
    device = torch.device(options.device, 0 if options.device == "cuda" else None)
    if options.device == "cuda":
        prepare.keep_compiled()
    maker = None if options.toy or options.bundle else prepare.start(["fashion", *options.networks])
    try:
        return race(options, device, maker)
    finally:
        if maker is not None and maker.poll() is None:
            maker.terminate()


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="the shipped prior and a few particles, to rehearse")
    parser.add_argument("--out", type=Path, help="file for the JSON lines; needed with --toy")
    parser.add_argument("--minutes", type=float, default=8, help="no case is begun after so many")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--networks", nargs="+", choices=prepare.NETWORKS[1:], default=prepare.NETWORKS[1:])
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint to take instead of --networks; needs --bundle")
    parser.add_argument("--bundle", type=Path, help="its bundle for this GPU, as `rlsd export --target cuda` writes it")
    parser.add_argument("--methods", nargs="+", choices=torch_step.METHODS, default=torch_step.METHODS)
    parser.add_argument("--particles", nargs="+", type=int, help="default 1 to 32, and 8, 1 and 2 with --toy")
    parser.add_argument("--compiled", nargs="+", type=int, help="N to run torch.compile for (minutes each)")
    parser.add_argument(
        "--compile-seconds", type=float, help="with less left it is not begun; default 600, 60 once it was done here"
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(given)
    options.compiled = options.compiled or [8]
    if options.toy and options.out is None:
        parser.error("--toy writes no figures to bench/results: name a file with --out")
    if options.device == "cpu" and not options.toy:
        parser.error("--device cpu needs --toy: Stable Diffusion's sizes are for a GPU")
    if (options.checkpoint is None) != (options.bundle is None):
        parser.error("--checkpoint and --bundle belong together")
    return options


def race(options: argparse.Namespace, device: torch.device, maker: subprocess.Popen | None) -> int:
    """Runs the cases until the time is up; prints and records each line."""
    budget = plan.Budget(options.minutes)
    torch.backends.cudnn.benchmark = True  # PyTorch's own choice of convolutions: the baselines at their best
    bench = Bench(device, roof.measured(device, options.toy), options.rounds)
    facts = describe(bench, options.toy)
    print(f"roofline: {bench.roof.matrix / 1e12:.4g} TFLOP/s, {bench.roof.copy / 1e9:.4g} GB/s", flush=True)
    lines: list[Line] = []
    left_out: list[str] = []
    for case in plan.cases(options, bench, maker, budget):
        if budget.left() <= case.needs:
            left_out.append(case.title)
            continue
        exporting = maker is not None and maker.poll() is None
        for line in case.run():
            line |= {"bench": "gpu", **facts, **({"export_beside": True} if exporting else {})}
            if judged := targets.judge(line):
                line["targets"] = judged
            lines.append(line)
            measure.record(results_name(facts["gpu"]), [line], options.out)
            print(f"[{budget.spent():5.0f} s] {sentence(line)}", flush=True)
    return summary(lines, left_out)


def describe(bench: Bench, toy: bool) -> Line:
    """What every line says about the machine and its programs."""
    gpu = torch.cuda.get_device_name(bench.device) if bench.cuda else "none"
    versions = {"rlsd": version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("triton", "onnxruntime", "onnxruntime-gpu", "xformers", "pykeops"):
        versions[name] = measure.installed(name)
    peaks = {"matrix_flops": round(bench.roof.matrix), "copy_bytes": round(bench.roof.copy)}
    return {"gpu": gpu, "driver": measure.driver(), "toy": toy, "versions": versions, "roof": peaks}


def results_name(gpu: str) -> str:
    """gpu-NVIDIA-H100-80GB-HBM3, say."""
    return "gpu-" + re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-")


def sentence(line: Line) -> str:
    """A result line for people."""
    head = f"{line['section']} {line['case']}, {line['method']}:"
    for key in ("wrong", "failed", "left_out"):
        if key in line:
            return f"{head} {key.replace('_', ' ').upper()}: {line[key]}"
    share = f", {line['roofline_share']:.1%} of the roofline" if "roofline_share" in line else ""
    verdicts = "".join(f"; {each['verdict']}: {each['name']} {each['wanted']}" for each in line.get("targets", []))
    return f"{head} {line['median']:g} {line['unit']}{share}{verdicts}"


def summary(lines: Sequence[Line], left_out: Sequence[str]) -> int:
    """Prints what was met, missed, wrong and left out; the exit status."""
    judged = [each for line in lines for each in line.get("targets", [])]
    bad = [line for line in lines if "wrong" in line or ("failed" in line and line["method"] == targets.OURS)]
    print(f"\n{len(lines)} lines, {len(judged)} targets:")
    if any(line.get("toy") for line in lines):
        print("  A rehearsal: the targets are for Stable Diffusion on an H100, and say nothing about toy sizes.")
    for verdict in (targets.MET, targets.MISSED):
        chosen = [each for each in judged if each["verdict"] == verdict]
        print(f"  {len(chosen)} {verdict}")
        for each in chosen:
            print(f"    {each['name']}: {each['value']:g} (wanted {each['wanted']})")
    for name in targets.not_measured(judged):
        print(f"  not measured: {name}")
    for line in bad:
        print(f"  {sentence(line)}")
    for title in left_out:
        print(f"  no time was left for {title}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
