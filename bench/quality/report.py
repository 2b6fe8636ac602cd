"""QUALITY.md and its pictures, from the results of one run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsd.bench import measure
from rlsd.bench.quality import figures, items, pictures
from rlsd.bench.quality.items import Chosen
from rlsd.bench.quality.problem import Array
from rlsd.bench.quality.settings import FAMILY, METHODS, SETUPS
from rlsd.pipeline.fit import Frame
from rlsd.pipeline.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
FINDINGS = Path(__file__).parent / "findings.md"  # what people make of the tables, put above them
Line = dict[str, Any]
Key = tuple[str, str]

NAMES = {
    "rlsd": "RLSD",
    "nonrepuls": "NonRepuls-RLSD (gamma = 0)",
    "nonaug": "RLSD, non-augmented",
    "red-diff": "RED-diff in latent space",
    "dps": "latent DPS",
    "psld": "PSLD",
    "resample": "ReSample",
    "exact": "exact draws from the reference",
}
REPELLED = (("rlsd", "nonrepuls"), ("nonaug", "red-diff"))
OTHERS = (("rlsd", "nonaug"), ("rlsd", "dps"), ("rlsd", "psld"), ("rlsd", "resample"))
COLUMNS = {
    "psnr": "PSNR, dB",
    "psnr_best": "best of N",
    "psnr_best_fit": "best fit",
    "psnr_mean_image": "mean image",
    "residual": "residual, sigma",
    "deviation": "deviation",
    "similarity": "cosine",
    "modes": "modes",
    "modes_own": "modes, own",
    "variation": "TV to reference",
    "psnr_aligned": "PSNR, aligned",
    "psnr_best_aligned": "best of N, aligned",
    "in_place": "in place",
    "copies": "copies",
}
INTRODUCTION = """# How good, and how diverse

One command, resumable: `python -m rlsd.bench.quality --data FOLDER --work FOLDER`. It made this page; the rows are in
`bench/results/quality-fashion.jsonl`.

- **Prior**: the embedded one (Fashion-MNIST, 32 x 32), the same networks for all methods. RLSD, its variants and
  RED-diff are run by the engine; latent DPS, PSLD and ReSample are ours after the papers (`bench/quality/dps.py`, ...).
- **Images**: of the test part, in a fixed random order, chosen before any run. One measurement an item, the same for
  all methods. For `small-visible` those are taken whose answer is open: under the reference posterior, the perplexity
  of the garment is at least {perplexity:g} and at least {effective:g} training images carry it.
- **Effort**: the same number of denoiser evaluations a particle for all methods of a task (K - 1). What else they do
  differs: see the evaluations and seconds.
- **Settings**: found for every method by the same rule on training images, `tuned on` so many
  (`python -m rlsd.bench.quality.tune`); RLSD's without repulsion first, then the repulsion. NonRepuls-RLSD and RED-diff
  are RLSD and its non-augmented variant with the very same settings but gamma = 0.
- **Figures**: means over items, with the 95 % interval of the mean (bootstrap over items) as +-half its width. PSNR on
  [-1, 1], of all 32 x 32 pixels (up to 1.2 dB above a report's, which leaves the black border out); `best of N` by the
  truth, `best fit` the particle that fits the data best; `residual` of the data in units of the noise; `deviation` of
  the pixels over an item's particles; `cosine`: mean pairwise similarity of the extractor's features (lower is more
  diverse); `modes`: distinct garments among an item's N particles, named by a classifier that no method sees
  ({accuracy:.1f} % right on test images), and by the extractor's own, which the repulsion does see.
  Phase retrieval: magnitudes of a Fourier transform are the same for an image that is shifted, while only black leaves
  it, or turned by half a turn; `aligned` is after the move that fits the truth best. Of the particles that then have
  {recognised:g} dB or more, `in place` are those that need no move, or one by a pixel, `copies` the others.
- **Reference**: for `small-visible` the posterior is known for the prior "one of the 60,000 training images": each has
  the weight N(y; f(x), sigma^2). `TV` is the total variation between the garments of an item's N particles and that
  posterior. N exact draws from it are not at 0 either: they are the last row; particles that repel each other may go
  below it, as stratified draws do. The reference counts true labels, the particles the judge's, which errs: a bias that
  all methods share, and the last row has not.
- **ms** of a particle, on one thread among others: an order of magnitude, no benchmark.
"""


@dataclass(frozen=True)
class Rows:
    """What one method gave on one task.

    items: figures of each; particles: [n, N, 1, 32, 32]; seconds, counts: of all.
    """

    items: Sequence[Mapping[str, float]]
    particles: Array
    seconds: float
    counts: Mapping[str, int]

    def of(self, name: str, count: int) -> list[float]:
        """One figure of the first `count` items."""
        return [row[name] for row in self.items[:count]]


def write(
    out: Path,
    lines: Sequence[Line],
    results: Mapping[Key, Rows],
    sets: Mapping[str, Chosen],
    accuracy: float,
    frame: Frame,
) -> Path:
    """QUALITY.md in `out`, pictures in `out`/docs/quality; returns the path of the page.

    accuracy: the judge's, from 0 to 1. frame: the prior's images and their padding.
    """
    text = [
        INTRODUCTION.format(
            perplexity=items.PERPLEXITY,
            effective=items.EFFECTIVE,
            accuracy=100 * accuracy,
            recognised=figures.RECOGNISED,
        )
        + missing(results),
        *([FINDINGS.read_text()] if FINDINGS.is_file() else []),
        *versus(results),
    ]
    (out / "docs" / "quality").mkdir(parents=True, exist_ok=True)
    for task, chosen in sets.items():
        mine = [line for line in lines if line["task"] == task]
        if not mine:
            continue
        text += [f"## {task}: {TASKS[task].summary}", "", *about(task, chosen), *table(mine)]
        drawn = {method: results[task, method].particles for method in METHODS if (task, method) in results}
        file = f"docs/quality/{task}.png"
        pictures.figure(task, chosen.items, {NAMES[m]: p for m, p in drawn.items()}, frame).save(
            out / file, optimize=True
        )
        text += ["", f"![rows: methods; columns: particles of two items]({file})", ""]
    path = out / "QUALITY.md"
    path.write_text("\n".join(text).rstrip() + "\n")
    return path


def missing(results: Mapping[Key, Rows]) -> str:
    """A line that names what was not drawn; empty if all was."""
    found = []
    for method in METHODS:
        tasks = [task for task in SETUPS if (task, method) not in results]
        if tasks:
            found.append(f"{NAMES[method]} ({'every task' if len(tasks) == len(SETUPS) else ', '.join(tasks)})")
    return f"- **Not drawn yet**: {'; '.join(found)}.\n" if found else ""


def versus(results: Mapping[Key, Rows]) -> list[str]:
    """Pairs of methods, item by item."""
    text = [
        "## With repulsion and without",
        "",
        "N interacting particles against N independent ones (the same with gamma = 0), on the same items. Differences",
        "and ratios are the first's to the other's; each with its 95 % interval.",
        "",
        *pairs(results, REPELLED),
        "## RLSD against other methods",
        "",
        "The same on the items that both have.",
        "",
        *pairs(results, OTHERS),
    ]
    return text


def pairs(results: Mapping[Key, Rows], which: Sequence[tuple[str, str]]) -> list[str]:
    """A table: each pair of methods on each task that both were drawn for."""
    text = [
        "| task | pair | items | modes, ratio | residual, ratio | best of N, dB | best fit, dB | PSNR, dB | TV |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for first, second in which:
        for task in SETUPS:
            a, b = results.get((task, first)), results.get((task, second))
            if a is not None and b is not None:
                head = f"| {task} | {NAMES[first]}; {NAMES[second]} | {min(len(a.items), len(b.items))}"
                text.append(" | ".join([head, *compared(a, b)]) + " |")
    return [*text, ""]


def compared(a: Rows, b: Rows) -> list[str]:
    """The cells of one task in `pairs`."""
    count = min(len(a.items), len(b.items))

    def said(how: Callable[[list[float], list[float]], tuple[float, float, float]], name: str, digits: int) -> str:
        mean, low, high = how(a.of(name, count), b.of(name, count))
        return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    def difference(p: list[float], q: list[float]) -> tuple[float, float, float]:
        return figures.interval([x - y for x, y in zip(p, q)])

    cells = [said(figures.ratio, "modes", 2), said(figures.ratio, "residual", 3)]
    cells += [said(difference, name, 2) for name in ("psnr_best", "psnr_best_fit", "psnr")]
    return [*cells, said(difference, "variation", 3) if "variation" in a.items[0] else ""]


def about(task: str, chosen: Chosen) -> list[str]:
    """The task's setup in a sentence."""
    setup = SETUPS[task]
    text = f"sigma = {setup.sigma:g}, N = {setup.particles}, K = {setup.steps}."
    if chosen.effective is not None:
        text += f" {len(chosen.items)} of the first {chosen.looked_at} images are open by the rule."
    return [text, ""]


def table(lines: Sequence[Line]) -> list[str]:
    """All methods of a task, the figures as columns."""
    names = [name for name in COLUMNS if any(name in line["figures"] for line in lines)]
    images = tuned_on()
    head = [
        "method",
        "tuned on",
        "items",
        *(COLUMNS[name] for name in names),
        "evaluations: denoiser, decoder (pull-backs)",
        "ms",
    ]
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in sorted(lines, key=lambda line: list(NAMES).index(line["method"])):
        cells = [NAMES[line["method"]], str(line["images"]), *(cell(name, line["figures"].get(name)) for name in names)]
        method: str = line["method"]
        cells.insert(1, str(images.get((line["task"], FAMILY.get(method, method)), "")))
        text.append("| " + " | ".join([*cells, effort(line), milliseconds(line)]) + " |")
    return text


def tuned_on() -> dict[tuple[str, str], int]:
    """How many training images the settings of a (task, method) were chosen on."""
    lines = map(json.loads, (measure.RESULTS / "quality-tune.jsonl").read_text().splitlines())
    return {(line["task"], line["method"]): line["images"] for line in lines if line.get("chosen")}


def cell(name: str, values: Sequence[float] | None) -> str:
    """A mean with half the width of its interval."""
    if values is None:
        return ""
    digits = 3 if name in ("deviation", "similarity", "variation", "in_place", "copies") else 2
    mean, low, high = values
    return f"{mean:.{digits}f} +-{(high - low) / 2:.{digits}f}"


def effort(line: Line) -> str:
    """Evaluations of a particle, pull-backs in parentheses."""
    count = line.get("evaluations")
    if not count:
        return ""
    each = [(count.get(name, 0), count.get(f"{name}_pull", 0)) for name in ("denoiser", "decoder")]
    return ", ".join(f"{forward:.0f} ({pull:.0f})" for forward, pull in each)


def milliseconds(line: Line) -> str:
    """Of a particle, on one thread."""
    return f"{1000 * line['seconds_a_particle']:.0f}" if "seconds_a_particle" in line else ""
