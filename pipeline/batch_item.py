"""What a batch writes for an item: what its results need and no times, so that a repeated run gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from rlsd.pipeline import metrics, picture
from rlsd.pipeline.fit import Frame
from rlsd.pipeline.judge import judged, summary
from rlsd.pipeline.reconstruct import Outcome
from rlsd.pipeline.record import record


def write_lean(folder: Path, outcome: Outcome, misfit: np.ndarray, frame: Frame, pictures: bool = False) -> None:
    """Fills an item's folder. misfit: [N], sqrt(mean (y - f(x_i))^2).

    arrays.npz: particles [N, C, H, W], mean [C, H, W], residual [N], float32. item.json: where it comes from, its
    residuals, and PSNR where the clean image is known. With `pictures` also particle_NN.png and mean.png, the inside
    of the bundle's padding.
    """
    item, particles = outcome.item, outcome.particles
    mean, fit = particles.mean(axis=0), int(np.argmin(misfit))
    figures = {
        "particles": len(particles),
        "sigma": item.settings.sigma or (None if item.truth is None else 0.0),  # of a measurement it may be unknown
        "class": item.settings.label,
        "residual": summary(misfit.tolist(), fit),
        "best_by_fit": fit,
    }
    if item.truth is not None:
        clean = frame.crop(item.truth)
        figures["psnr"] = judged(lambda image: metrics.psnr(image, clean), frame.crop(particles), fit, max)
    np.savez(folder / "arrays.npz", particles=particles, mean=mean, residual=misfit.astype(np.float32))
    if pictures:
        digits = max(2, len(str(len(particles) - 1)))
        for index, image in enumerate(frame.crop(particles)):
            picture.picture(image).save(folder / f"particle_{index:0{digits}}.png")
        picture.picture(metrics.mean_image(frame.crop(particles))).save(folder / "mean.png")
    entry = {key: value for key, value in record(item, figures).items() if key != "plots"}
    (folder / "item.json").write_text(json.dumps(entry) + "\n")
