"""What is written for one item: its folder of pictures and arrays, and its figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.PngImagePlugin import PngInfo

from rlsd.engine import Engine
from rlsd.pipeline import metrics, picture
from rlsd.pipeline.fit import Frame
from rlsd.pipeline.grid import Cell, draw_grid
from rlsd.pipeline.items import Item
from rlsd.pipeline.reconstruct import Outcome

GRID_PARTICLES = 20  # more are written, but not put in the grid


def measure_outcome(engine: Engine, outcome: Outcome, frame: Frame) -> dict[str, Any]:
    """The figures of a reconstruction, as plain numbers; images are compared inside of the bundle's padding."""
    item, particles = outcome.item, outcome.particles
    params = item.operator_params
    predicted = engine.measure(item.task.operator, particles, **{name: v[None] for name, v in params.items()})
    residual = metrics.residual(item.y, predicted, params)
    sigma = item.settings.sigma
    figures: dict[str, Any] = {
        "seconds": round(outcome.seconds, 3),
        "residual": summary(residual.tolist()),
        "residual_in_sigma": summary((residual / sigma).tolist()) if sigma > 0 else None,
        "deviation": float(metrics.deviation(frame.crop(particles)).mean()),
        "feature_similarity": None,
    }
    if engine.feature_dim:
        figures["feature_similarity"] = metrics.cosine_similarity(engine.features(particles))
    if item.truth is not None:
        figures.update(compare(frame.crop(particles), frame.crop(item.truth)))
    return figures


def compare(particles: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """PSNR and SSIM of each particle [N, C, H, W], of the best, and of the particles' mean image."""
    mean = particles.mean(axis=0)
    psnr = [metrics.psnr(particle, truth) for particle in particles]
    ssim = [value for particle in particles if (value := metrics.ssim(particle, truth)) is not None]
    return {
        "psnr": {**summary(psnr, max), "of_mean_image": _finite(metrics.psnr(mean, truth))},
        "ssim": {**summary(ssim, max), "of_mean_image": metrics.ssim(mean, truth)} if ssim else None,
    }


def summary(values: Sequence[float], best: Any = min) -> dict[str, Any]:
    """The particles' values with their mean and best; infinite ones (a perfect PSNR) become None: JSON has none."""
    mean = float(np.mean(values))
    return {"mean": _finite(mean), "best": _finite(best(values)), "particles": [_finite(value) for value in values]}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def write_item(folder: Path, outcome: Outcome, figures: dict[str, Any], frame: Frame) -> None:
    """Fills an item's folder: particle_NN.png, mean, std, measurement, input and grid.png, arrays.npz, item.json.

    Pictures show the inside of the bundle's padding; arrays.npz holds everything in full, float32.
    """
    item, particles = outcome.item, outcome.particles
    shown = frame.crop(particles)
    digits = max(2, len(str(len(shown) - 1)))
    for index, particle in enumerate(shown):
        picture.picture(particle).save(folder / f"particle_{index:0{digits}}.png")
    picture.picture(shown.mean(axis=0)).save(folder / "mean.png")
    if item.truth is not None:
        picture.picture(frame.crop(item.truth)).save(folder / "input.png")
    picture.measurement_picture(item, frame)[0].save(folder / "measurement.png")
    deviation = metrics.deviation(shown)
    top = picture.nice_top(deviation)
    scale = PngInfo()
    scale.add_text("scale", f"0 to {top:g} in units of the image range [-1, 1]")
    picture.deviation_figure(deviation, top).save(folder / "std.png", pnginfo=scale)
    item_grid(outcome, figures, frame).save(folder / "grid.png")
    arrays = {"particles": particles, "latents": outcome.latents, "y": item.y}
    arrays |= {f"param.{name}": value for name, value in item.operator_params.items()}
    if item.truth is not None:
        arrays["truth"] = item.truth
    floats: dict[str, Any] = {name: np.asarray(value, np.float32) for name, value in arrays.items()}
    np.savez(folder / "arrays.npz", **floats)
    (folder / "item.json").write_text(json.dumps(record(item, figures) | {"std_png_scale": [0, top]}, indent=1) + "\n")


def item_grid(outcome: Outcome, figures: dict[str, Any], frame: Frame) -> Any:
    """input | measurement | particles | mean | deviation, with the PSNR where the truth is known."""
    item, shown = outcome.item, frame.crop(outcome.particles)
    psnr = figures.get("psnr")
    cells = [Cell(picture.picture(frame.crop(item.truth)), "input")] if item.truth is not None else []
    cells.append(Cell(*measurement_cell(item, frame)))
    for index, particle in enumerate(shown[:GRID_PARTICLES]):
        detail = _decibels(psnr["particles"][index]) if psnr else ""
        cells.append(Cell(picture.picture(particle), f"particle {index}", detail))
    cells.append(Cell(picture.picture(shown.mean(0)), "mean", _decibels(psnr["of_mean_image"]) if psnr else ""))
    deviation = metrics.deviation(shown)
    top = picture.nice_top(deviation)
    cells.append(Cell(picture.heat(deviation, top), "deviation", f"0 to {top:g}"))
    return draw_grid(f"{item.name}   {item.task.summary}", cells)


def measurement_cell(item: Item, frame: Frame) -> tuple[Any, str, str]:
    """The measurement's picture, label and size."""
    image, label = picture.measurement_picture(item, frame)
    return image, label, " x ".join(map(str, item.y.shape[-2:]))


def record(item: Item, figures: dict[str, Any]) -> dict[str, Any]:
    """An item's entry in report.json."""
    return {
        "name": item.name,
        "item": item.index,
        "task": item.task.name,
        "source": str(item.source) if item.source else None,
        "sha256": item.digest,
        "measured": item.truth is None,
        "notes": list(item.notes),
        **figures,
    }


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"
