"""`rlsd batch` on the fashion bundle: its throughput against the engine's own, and its memory over 10,000 items.

    python -m rlsd.bench.batch throughput --data /usr/share/datasets/fashion-mnist
    python -m rlsd.bench.batch memory --data /usr/share/datasets/fashion-mnist
    python -m rlsd.bench.batch plot

`throughput` first checks that both give the same bytes, then lets them do the same jobs in turn, round by round: the
engine from arrays to arrays, the batch from PNG files to a folder of results, synced. `memory` watches a run of the
command from outside, and `plot` draws the last one that was watched to docs/batch-memory.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rlsd.bench import measure
from rlsd.engine import Engine, Job
from rlsd.models.fashion import PATH
from rlsd.models.fashion.data import read_idx
from rlsd.pipeline.batch_folder import Items
from rlsd.pipeline.batch_list import Files, list_inputs
from rlsd.pipeline.batch_work import Nothing, Work, Worker
from rlsd.pipeline.items import Plan, Source, load_items
from rlsd.pipeline.settings import settings_for
from rlsd.pipeline.tasks import find_task

BUNDLE, TASK = PATH / "bundle", "half"
SECONDS_BETWEEN_SAMPLES = 1.0
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "batch-memory.png"


def main(given: Sequence[str] | None = None) -> None:
    """Measures and appends to bench/results/batch-throughput.jsonl or batch-memory.jsonl."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("what", choices=["throughput", "memory", "plot"])
    arguments.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    arguments.add_argument("--items", type=int, help="default: 32 for throughput, 10000 for memory")
    arguments.add_argument("--particles", "-n", type=int, help="default: 8 for throughput, 2 for memory")
    arguments.add_argument("--steps", type=int, help="default: 50 for throughput, 4 for memory")
    arguments.add_argument("--rounds", type=int, default=7, help="of throughput")
    arguments.add_argument("--workers", type=int, default=1, help="of memory")
    options = arguments.parse_args(given)
    if options.what == "plot":
        print("written to", plot(measure.RESULTS / "batch-memory.jsonl", PICTURE))
        return
    throughput = options.what == "throughput"
    items, particles, steps = (
        value or default
        for value, default in zip(
            (options.items, options.particles, options.steps), (32, 8, 50) if throughput else (10_000, 2, 4)
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        write_images(options.data, Path(folder) / "in", items)
        if throughput:
            lines = compare(Path(folder), particles, steps, options.rounds)
            print(*lines, sep="\n")
        else:
            lines = watch(Path(folder), items, particles, steps, options.workers)
            print(lines[-1])
    print("appended to", measure.record(f"batch-{options.what}", lines))


def write_images(data: Path, folder: Path, count: int) -> None:
    """The first `count` images of the test split as PNG files."""
    folder.mkdir()
    for index, image in enumerate(read_idx(data / "t10k-images-idx3-ubyte.gz")[:count]):
        Image.fromarray(image).save(folder / f"{index:05}.png")


# ------------------------------------------------------------ throughput


def compare(folder: Path, particles: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Interleaved rounds of both; a result line each, the batch's with its ratio to the engine's."""
    settings = settings_for(find_task(TASK, {"inpainting": None}), "fashion", {"particles": particles, "steps": steps})
    work = Work(str(BUNDLE), TASK, settings, str(folder / "out"))
    listing = list_inputs([str(folder / "in")], None, ())
    assert isinstance(listing, Files)
    with Engine(BUNDLE) as engine:
        jobs = jobs_of(engine, listing, work)
        check(engine, jobs, listing, work)
        cases = {"engine": lambda: engine.reconstruct(jobs), "batch": lambda: one_batch(engine, listing, work)}
        times = measure.interleaved(cases, rounds)
        window = Worker(engine, work, None, print, bool).window  # type: ignore[arg-type]
    done = len(jobs) * particles * (steps - 1)
    lines = []
    for name, seconds in times.items():
        line = {"bench": "batch-throughput", "case": name, "items": len(jobs), "particles": particles, "steps": steps}
        line |= {"unit": "particle-steps/s", "rounds": rounds, **measure.quartiles([done / each for each in seconds])}
        ratios = [theirs / mine for theirs, mine in zip(times["engine"], seconds)]
        lines.append(line | {"engine_ratio": measure.quartiles(ratios), "window": window})
    return lines


def jobs_of(engine: Engine, listing: Files, work: Work) -> list[Job]:
    """The same jobs as the batch's, with everything read."""
    sources = [Source(Path(entry.path), entry.index, entry.name) for entry in listing.entries()]
    plan = Plan(find_task(TASK, engine.operators), work.settings, sources)
    return [replace(item.job(), trace=False) for item in load_items(engine, plan)]


def one_batch(engine: Engine, listing: Files, work: Work) -> None:
    """All items through a worker of a batch, into a new folder."""
    shutil.rmtree(work.out, ignore_errors=True)
    Path(work.out).mkdir()
    entries = listing.entries()
    with Items(Path(work.out)) as items:
        Worker(engine, work, items, lambda event: None, bool).run(lambda wait: next(entries, Nothing.EVER))


def check(engine: Engine, jobs: Sequence[Job], listing: Files, work: Work) -> None:
    """No figure unless the batch's particles are the engine's, to the byte; warms up both."""
    one_batch(engine, listing, work)
    for entry, result in zip(listing.entries(), engine.reconstruct(jobs)):
        with np.load(Path(work.out) / "items" / entry.name / "arrays.npz") as found:
            if found["particles"].tobytes() != result.particles.tobytes():
                raise SystemExit(
                    f"{entry.name}: the batch's particles are not the engine's; no figure without agreement"
                )


# ------------------------------------------------------------ memory


def watch(folder: Path, items: int, particles: int, steps: int, workers: int) -> list[dict[str, Any]]:
    """Runs the command; each second a line with the resident memory of its processes and the items done."""
    words = ["-m", "fashion", "-t", TASK, "-i", str(folder / "in"), "-o", str(folder / "out")]
    words += ["-n", str(particles), "--steps", str(steps), "--workers", str(workers)]
    words += ["--metrics", str(folder / "metrics")]
    code = "from rlsd.pipeline.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, "batch", *words], stdout=subprocess.DEVNULL)
    facts = {"bench": "batch-memory", "items": items, "particles": particles, "steps": steps, "workers": workers}
    lines, begin = [], time.monotonic()
    while process.poll() is None:
        time.sleep(SECONDS_BETWEEN_SAMPLES)
        resident, done = resident_mib(process.pid), items_done(folder / "metrics")
        if resident:
            lines.append(
                {**facts, "seconds": round(time.monotonic() - begin, 1), "done": done, "resident_mib": resident}
            )
    found = sum(1 for entry in (folder / "out" / "items").iterdir())
    if process.returncode or found != items:
        raise SystemExit(f"the batch ended with code {process.returncode} and {found} of {items} items")
    return lines


def resident_mib(process: int) -> float:
    """Resident memory of a process and those that it started, 0 once it is gone."""
    total = 0
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        for number in (process, *children):
            for line in Path(f"/proc/{number}/status").read_text().splitlines():
                total += int(line.split()[1]) if line.startswith("VmRSS:") else 0
    except OSError:
        return 0.0
    return round(total / 1024, 1)


def items_done(metrics: Path) -> int:
    """From the file of metrics, 0 before there is one."""
    if not metrics.exists():
        return 0
    values = dict(line.split() for line in metrics.read_text().splitlines() if not line.startswith("#"))
    return int(values["rlsd_batch_items_done_total"])


def plot(rows: Path, out: Path) -> Path:
    """The resident memory of the last run in the file of rows, over the items done."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines = [line for line in lines if line["time"] == lines[-1]["time"]]
    last = lines[-1]
    figure = Figure(figsize=(6, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot([line["done"] for line in lines], [line["resident_mib"] for line in lines])
    axes.set(xlabel="items done", ylabel="resident memory, MiB", ylim=(0, None), xlim=(0, last["items"]))
    axes.set_title(f"rlsd batch, {last['items']:,} items of Fashion-MNIST", fontsize=10)
    axes.grid(True, alpha=0.3)
    figure.savefig(out, metadata={"Software": None})
    return out


if __name__ == "__main__":
    main()
