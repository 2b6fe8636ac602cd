"""Tables and plots of the result lines in bench/results: a pure function of the files.

    rlsd bench --report        (or python -m rlsd.bench.report)

For each machine and benchmark the newest commit counts, and of a case measured twice there the last line.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlsd.bench import batch_report, plots
from rlsd.bench.measure import RESULTS
from rlsd.bench.serve_report import served
from rlsd.bench.tables import by, number, share, table, target_table

Line = dict[str, Any]
TITLES = {
    "A": "A: full steps, particle-steps per second",
    "B": "B: the denoiser alone",
    "C": "C: the decoder, and with its pull-back",
    "D": "D: repulsion",
    "E": "E: the engine's time outside kernels",
    "F": "F: jobs that arrive at different times, against one after another",
    "G": "G: two engines side by side, against one with all particles",
    "agreement": "A 50-step reconstruction, in halves on the GPU against float32 on the CPU",
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=Path("bench-report"))
    options = parser.parse_args()
    print(write(options.results, options.out))


def write(results: Path, out: Path) -> Path:
    """report.md and its plots in the folder `out`; returns the path of report.md.

    Raises ValueError when `results` is no folder, or holds a line that is not JSON.
    """
    lines = newest(read(results))
    out.mkdir(parents=True, exist_ok=True)
    text = ["# Benchmarks", ""]
    for machine, mine in by(lines, machine_of):
        text += [f"## {machine}", ""]
        for bench, chosen in by(mine, lambda line: line["bench"]):
            text += SECTIONS.get(bench, _other)(bench, chosen)
        for name in plots.draw(machine, mine, out):
            text += [f"![{name}]({name})", ""]
    if not lines:
        text += [f"No result lines in {results}.", ""]
    path = out / "report.md"
    path.write_text("\n".join(text))
    return path


def read(folder: Path) -> list[Line]:
    """All lines of all *.jsonl files that say which benchmark they are of, in the order of the files."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    lines = []
    for path in sorted(folder.glob("*.jsonl")):
        for place, row in enumerate(path.read_text().splitlines(), 1):
            try:
                lines.append(json.loads(row))
            except ValueError as error:
                raise ValueError(f"{path}, line {place}, is not JSON: {error}") from error
    # lines of the kernels' benchmark had no name at first
    return [{"bench": "kernels-cuda" if "roofline_ms" in line else "other", **line} for line in lines]


def machine_of(line: Line) -> str:
    """The GPU where there is one, and the processor."""
    gpu = line.get("gpu", "none")
    return line["machine"] if gpu == "none" else f"{gpu}, {line['machine']}"


def newest(lines: Iterable[Line]) -> list[Line]:
    """Of each machine and benchmark the lines of the commit that was measured last; of each case the last one."""
    groups = defaultdict(list)
    for line in lines:
        groups[machine_of(line), line["bench"]].append(line)
    chosen: list[Line] = []
    for group in groups.values():
        commit = max(group, key=lambda line: line["time"])["commit"]
        latest = {_identity(line): line for line in sorted(group, key=_time) if line["commit"] == commit}
        chosen += latest.values()
    return chosen


def _time(line: Line) -> str:
    return line["time"]


def _identity(line: Line) -> tuple[Any, ...]:
    """What is measured. The engine beside torch.compile is a run of its own, and a batch's memory has many moments."""
    beside = tuple(sorted(line.get("speedup", ())))
    return (line.get("section"), line.get("case"), line.get("method"), line.get("particles"), line.get("task"),
            json.dumps(line.get("params")), line.get("done"), line.get("bundle"), line.get("keep_memory"),
            beside)  # fmt: skip


def stamp(lines: Sequence[Line]) -> str:
    """Commit and time of the newest line."""
    last = max(lines, key=_time)
    return f"Commit {last['commit']}, {last['time'][:10]}"


def _gpu(_: str, lines: list[Line]) -> list[str]:
    first, text = lines[0], []
    peaks = first["roof"]
    rehearsal = (
        " **A rehearsal at toy sizes: no figure of a GPU, and its targets mean nothing.**" if first.get("toy") else ""
    )
    programs = ", ".join(f"{name} {version}" for name, version in first["versions"].items() if version)
    text += [
        f"{stamp(lines)}; {programs}; driver {first.get('driver') or 'none'}.{rehearsal} Measured roofline: "
        f"{peaks['matrix_flops'] / 1e12:.4g} TFLOP/s, {peaks['copy_bytes'] / 1e9:.4g} GB/s.",
        "",
    ]
    if judged := target_table(lines):
        text += ["### Targets", "", *judged]
    for section, chosen in by(lines, lambda line: line["section"]):
        text += [f"### {TITLES.get(section, section)}", "", *_section(chosen)]
    return text


def _section(lines: list[Line]) -> list[str]:
    with_figure = [line for line in lines if "median" in line]
    rows = []
    for line in with_figure:
        faster = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in line.get("speedup", {}).items())
        spread = f"{number(line.get('q1'))} to {number(line.get('q3'))}" if "q1" in line else ""
        rows.append(
            (line["case"], line["method"], f"{number(line['median'])} {line['unit']}", spread,
             share(line.get("roofline_share")), faster, number(line.get("error")), _extras(line))
        )  # fmt: skip
    head = ("case", "method", "median", "quartiles", "roofline", "engine is as fast as", "error", "")
    text = table(head, rows) if rows else []
    for line in lines:
        for key in ("wrong", "failed", "left_out"):
            if key in line:
                text.append(f"- {line['case']}, {line['method']}: {key.replace('_', ' ')}: {line[key]}")
    return [*text, ""] if text and text[-1] else text


def _extras(line: Line) -> str:
    """Whatever else the section counts."""
    names = {
        "gb_per_particle": "GB a particle", "launches_per_step": "launches a step",
        "synchronisations_per_step": "waits a step", "redone": "steps redone",
        "not_recorded": "graphs not recorded", "at_most": "ticks allow at most",
        "same_bytes": "same bytes",
        "same_bytes_repeated": "same bytes repeated", "difference_mean_image": "dB off (mean image)",
        "difference_particles": "dB off (particles)", "what": "is",
    }  # fmt: skip
    return ", ".join(f"{text}: {number(line[key])}" for key, text in names.items() if key in line)


def _engine_cpu(bench: str, lines: list[Line]) -> list[str]:
    rows = [
        (line["bundle"], "kept" if line["keep_memory"] else "given back", line["particles"], line["case"],
         number(line["median"]), f"{number(line['q1'])} to {number(line['q3'])}",
         f"{line['engine_ratio']['median']:.2f}x", share(line["roofline_share"]))
        for line in lines
    ]  # fmt: skip
    head = ("bundle", "freed memory", "N", "method", "particle-steps/s", "quartiles", "engine is faster by", "roofline")
    return [f"### Full steps on a CPU ({bench})", "", stamp(lines) + ".", "", *table(head, rows)]


def _kernels_cpu(bench: str, lines: list[Line]) -> list[str]:
    rows = [
        (line["group"], line["case"], *(number(1e3 * line[key]) for key in ("median", "q1", "q3"))) for line in lines
    ]
    head = ("group", "case", "median ms", "q1", "q3")
    return [f"### The core's kernels on a CPU ({bench})", "", stamp(lines) + ".", "", *table(head, rows)]


def _kernels_cuda(bench: str, lines: list[Line]) -> list[str]:
    good = [line for line in lines if "ms" in line]
    rows = [
        (line["case"], number(line["ms"]["ours"]["median"]), share(line["roofline_share"]),
         f"{line['speedup_eager']}x", f"{line['speedup_compiled']}x" if "speedup_compiled" in line else "")
        for line in good
    ]  # fmt: skip
    head = ("case", "median ms", "roofline", "against eager", "against torch.compile")
    wrong = [f"- {line['case']}: wrong: {line['wrong']}" for line in lines if "wrong" in line]
    return [f"### Triton kernels ({bench})", "", stamp(lines) + ".", "", *table(head, rows), *wrong, ""]


def _other(bench: str, lines: list[Line]) -> list[str]:
    return [f"{len(lines)} lines of {bench} ({stamp(lines).lower()}) have no table.", ""]


def _serve(bench: str, lines: list[Line]) -> list[str]:
    return [f"### Jobs that arrive at random ({bench})", "", stamp(lines) + ".", "", *served(lines)]


def _batch(bench: str, lines: list[Line]) -> list[str]:
    kind = bench.removeprefix("batch-")
    tables = {"throughput": batch_report.throughput, "memory": batch_report.memory, "kills": batch_report.kills}
    return [f"### Batches: {kind} ({bench})", "", stamp(lines) + ".", "", *tables[kind](lines)]


SECTIONS = {
    "gpu": _gpu, "engine-cpu": _engine_cpu, "kernels-cpu": _kernels_cpu, "kernels-cuda": _kernels_cuda,
    "serve-cpu": _serve, "serve-gpu": _serve, "batch-throughput": _batch, "batch-memory": _batch, "batch-kills": _batch,
}  # fmt: skip


if __name__ == "__main__":
    main()
