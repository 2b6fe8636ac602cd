"""What is written for one item: its folder of pictures, plots and arrays, and its entry in the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.PngImagePlugin import PngInfo

from rlsd.pipeline import metrics, picture
from rlsd.pipeline.fit import Frame
from rlsd.pipeline.grid import Cell, draw_grid
from rlsd.pipeline.items import Item
from rlsd.pipeline.judge import Judgement
from rlsd.pipeline.layout import MOST, draw_layout
from rlsd.pipeline.plots import can_plot, trajectories
from rlsd.pipeline.reconstruct import Outcome

GRID_PARTICLES = 20  # more are written, but not put in the grid


def write_item(
    folder: Path, outcome: Outcome, judgement: Judgement, frame: Frame, plots: bool = True
) -> dict[str, Any]:
    """Fills an item's folder and returns its entry in report.json, which is in item.json as well.

    The pictures are particle_NN.png, mean, std, measurement, input and grid.png, which show the inside of the bundle's
    padding; with `plots` also similarity.png, for more than one particle, and trajectories.png, if matplotlib is there.
    arrays.npz holds everything in full, float32.
    """
    item, particles, figures = outcome.item, outcome.particles, judgement.figures
    shown = frame.crop(particles)
    digits = max(2, len(str(len(shown) - 1)))
    for index, particle in enumerate(shown):
        picture.picture(particle).save(folder / f"particle_{index:0{digits}}.png")
    picture.picture(metrics.mean_image(shown)).save(folder / "mean.png")
    if item.truth is not None:
        picture.picture(frame.crop(item.truth)).save(folder / "input.png")
    picture.measurement_picture(item, frame)[0].save(folder / "measurement.png")
    deviation = metrics.deviation(shown)
    top = picture.nice_top(deviation)
    scale = PngInfo()
    scale.add_text("scale", f"0 to {top:g} in units of the image range [-1, 1]")
    picture.deviation_figure(deviation, top).save(folder / "std.png", pnginfo=scale)
    item_grid(outcome, figures, frame).save(folder / "grid.png")
    entry = record(item, figures, write_plots(folder, outcome, judgement, frame) if plots else [])
    np.savez(folder / "arrays.npz", **arrays_of(outcome))
    (folder / "item.json").write_text(json.dumps(entry | {"std_png_scale": [0, top]}, indent=1) + "\n")
    return entry


def arrays_of(outcome: Outcome) -> dict[str, Any]:
    """What arrays.npz holds, by name."""
    item = outcome.item
    arrays = {"particles": outcome.particles, "latents": outcome.latents, "trace": outcome.trace, "y": item.y}
    arrays |= {f"param.{name}": value for name, value in item.operator_params.items()}
    if item.truth is not None:
        arrays["truth"] = item.truth
    return {name: np.asarray(value, np.float32) for name, value in arrays.items()}


def write_plots(folder: Path, outcome: Outcome, judgement: Judgement, frame: Frame) -> list[str]:
    """The plots of an item; returns their names."""
    item, written = outcome.item, []
    if len(outcome.particles) > 1:
        similarity(outcome, judgement, frame).save(folder / "similarity.png")
        written.append("similarity.png")
    if can_plot():
        scale = 1 / np.sqrt(max(metrics.observed_share(item.y, item.operator_params), 1e-9))
        (folder / "trajectories.png").write_bytes(trajectories(outcome.trace, scale, item.settings.sigma))
        written.append("trajectories.png")
    return written


def similarity(outcome: Outcome, judgement: Judgement, frame: Frame) -> Any:
    """The particles, and the clean image if its place is known, laid out by their features (or latents)."""
    shown, phi = list(frame.crop(outcome.particles)[:MOST]), judgement.phi[:MOST]
    classes = judgement.figures["classes"]
    names = classes["predicted"] if classes else [""] * len(shown)
    labels = [f"{index} {name}" for index, name in enumerate(names[: len(shown)])]
    if judgement.truth is not None and outcome.item.truth is not None:
        shown.append(frame.crop(outcome.item.truth))
        phi, labels = np.concatenate([phi, judgement.truth[None]]), [*labels, "input"]
    marked = len(shown) - 1 if labels[-1] == "input" else None
    title = "particles by similarity" + (f" (the first {MOST})" if len(outcome.particles) > MOST else "")
    return draw_layout(title, [picture.picture(image) for image in shown], phi, labels, marked)


def item_grid(outcome: Outcome, figures: dict[str, Any], frame: Frame) -> Any:
    """input | measurement | particles | mean | deviation, with the PSNR where the truth is known."""
    item, shown = outcome.item, frame.crop(outcome.particles)
    psnr = figures.get("psnr")
    cells = [Cell(picture.picture(frame.crop(item.truth)), "input")] if item.truth is not None else []
    cells.append(Cell(*measurement_cell(item, frame)))
    for index, particle in enumerate(shown[:GRID_PARTICLES]):
        detail = _decibels(psnr["particles"][index]) if psnr else ""
        cells.append(Cell(picture.picture(particle), f"particle {index}", detail))
    mean = picture.picture(metrics.mean_image(shown))
    cells.append(Cell(mean, "mean", _decibels(psnr["of_mean_image"]) if psnr else ""))
    deviation = metrics.deviation(shown)
    top = picture.nice_top(deviation)
    cells.append(Cell(picture.heat(deviation, top), "deviation", f"0 to {top:g}"))
    return draw_grid(f"{item.name}   {item.task.summary}", cells)


def measurement_cell(item: Item, frame: Frame) -> tuple[Any, str, str]:
    """The measurement's picture, label and size."""
    image, label = picture.measurement_picture(item, frame)
    return image, label, " x ".join(map(str, item.y.shape[-2:]))


def record(item: Item, figures: dict[str, Any], plots: Sequence[str] = ()) -> dict[str, Any]:
    """An item's entry in report.json. plots: names of those in its folder."""
    return {
        "name": item.name,
        "item": item.index,
        "task": item.task.name,
        "source": str(item.source) if item.source else None,
        "sha256": item.digest,
        "measured": item.truth is None,
        "notes": list(item.notes),
        "plots": list(plots),
        **figures,
    }


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"
