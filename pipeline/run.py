"""Runs plans into an output folder: check everything, reconstruct, write each item as it finishes, report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from rlsd.engine import Engine
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.html import to_html
from rlsd.pipeline.items import Plan, check_plan, conditioning, frame_of, load_items
from rlsd.pipeline.judge import Judge
from rlsd.pipeline.lpips import Lpips, enlargement
from rlsd.pipeline.output import OutputFolder, is_item_folder
from rlsd.pipeline.plots import calibration_plot, can_plot
from rlsd.pipeline.progress import progress
from rlsd.pipeline.reconstruct import Outcome, reconstruct_items
from rlsd.pipeline.record import write_item
from rlsd.pipeline.report import build_report, describe_run, to_json
from rlsd.pipeline.spreadsheet import items_csv, particles_csv

PLOTTED = 20  # items of a plan that get plots of their own: the first ones


@dataclass(frozen=True)
class Finished:
    """The report that was written, and where the page is."""

    report: dict[str, Any]
    page: Path


def run_plans(
    engine: Engine,
    plans: Sequence[Plan],
    out: Path,
    *,
    overwrite: bool,
    console: Console,
    lpips: Lpips | None = None,
    reconstruct: Callable[..., Generator[Outcome, None, None]] = reconstruct_items,
    share: float = 1.0,
) -> Finished:
    """Reconstructs all sources of all plans into `out`; progress goes to `console`.

    lpips: the perceptual distance, for the figures. reconstruct: with the arguments and the results of
    `reconstruct_items`. share: of the particles that this engine has, of several that work together. Nothing is
    written before every input has been read once and found good; one that cannot be read any more when its turn comes
    is among the report's `failed`, or with another `reconstruct` is raised. Raises InputError, RlsdError, OSError.
    """
    names = [source.name for plan in plans for source in plan.sources]
    if not names:
        raise InputError("no input is given: name at least one file")
    folder = OutputFolder(out, names, overwrite=overwrite)
    folder.check()
    for plan in plans:
        conditioning(engine, plan.settings)
        check_plan(engine, plan)
    start, frame, described = time.monotonic(), frame_of(engine), describe_run(engine, plans)
    judge = Judge(engine, lpips)
    if lpips is not None:
        described["lpips"] = {"enlarged": enlargement(frame.content)}
    records: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    with folder, progress(sum(plan.particle_steps() for plan in plans), console) as report:
        unread = failed if reconstruct is reconstruct_items else None  # other processes would wait for an item in vain
        items = chain.from_iterable(load_items(engine, plan, unread) for plan in plans)
        with closing(reconstruct(engine, items, report=report)) as outcomes:
            for outcome in outcomes:
                if outcome.error is not None:
                    failed.append({"name": outcome.item.name, "error": outcome.error})
                    continue
                judgement, plots = judge(outcome), outcome.item.index < PLOTTED
                with folder.item(outcome.item.name) as path:
                    records.append(write_item(path, outcome, judgement, frame, plots))
        for each in failed:
            forget_item(folder, each["name"])
        content = build_report(described, engine, records, failed, time.monotonic() - start, share)
        page = write_report(folder, content)
    return Finished(content, page)


def forget_item(folder: OutputFolder, name: str) -> None:
    """Removes what an earlier run wrote for the item."""
    if is_item_folder(folder.path / name):
        shutil.rmtree(folder.path / name)


def write_report(folder: OutputFolder, content: dict[str, Any]) -> Path:
    """The files about the whole run: report.json and .html, the CSVs, calibration.png or none; returns the page."""
    content["calibration_plot"] = bool(content["calibration"]) and can_plot()
    if content["calibration_plot"]:
        folder.file("calibration.png", calibration_plot(content["calibration"]))
    elif (earlier := folder.path / "calibration.png").is_file():
        earlier.unlink()
    folder.file("items.csv", items_csv(content["items"]))
    folder.file("particles.csv", particles_csv(content["items"]))
    folder.file("report.json", to_json(content))
    page = to_html(content).encode(errors="backslashreplace")  # names of files need not be text, a page has to be
    return folder.file("report.html", page)
