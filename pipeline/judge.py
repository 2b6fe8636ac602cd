"""How good, diverse and honest the particles of an item are: all its figures, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlsd.engine import Engine
from rlsd.pipeline import metrics
from rlsd.pipeline.calibration import calibration
from rlsd.pipeline.classes import class_figures, class_head
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.items import Item, frame_of
from rlsd.pipeline.lpips import Lpips
from rlsd.pipeline.reconstruct import Outcome


@dataclass(frozen=True)
class Judgement:
    """figures: an item's entry in the report. phi: [N, D] where the particles lie, their features or their latents;
    truth: [D] where the clean image lies, None where it is not known or has no features."""

    figures: dict[str, Any]
    phi: np.ndarray
    truth: np.ndarray | None


class Judge:
    """Judges outcomes of one engine; images are compared inside of the bundle's padding."""

    def __init__(self, engine: Engine, lpips: Lpips | None = None):
        self.engine, self.lpips = engine, lpips
        self.frame, self.head = frame_of(engine), class_head(engine)
        channels = engine.image_shape[0]
        if lpips and channels not in (1, 3):
            raise InputError(f"lpips is for images of 1 or 3 channels, but the prior's have {channels}")

    def __call__(self, outcome: Outcome) -> Judgement:
        """All figures of a reconstruction."""
        item, particles = outcome.item, outcome.particles
        phi, truth = self._place(outcome)
        residual = self._residual(item, np.concatenate([particles, particles.mean(0, keepdims=True)]))
        fit, sigma = int(np.argmin(residual[:-1])), item.settings.sigma

        def in_units(unit: float) -> dict[str, Any]:
            values = (residual / unit).tolist()
            return {**summary(values[:-1], fit), "of_mean_image": _finite(values[-1])}

        figures: dict[str, Any] = {
            "seconds": round(outcome.seconds, 3),
            "residual": in_units(1.0),
            "residual_in_sigma": in_units(sigma) if sigma > 0 else None,
            "best_by_fit": fit,
            "deviation": float(metrics.deviation(self.frame.crop(particles)).mean()),
            "feature_similarity": metrics.cosine_similarity(phi) if self.engine.feature_dim else None,
            "classes": class_figures(self.head, phi, truth) if self.head else None,
        }
        if item.truth is not None:
            shown, clean = self.frame.crop(particles), self.frame.crop(item.truth)
            figures |= compare(shown, clean, fit, self.lpips)
            figures["calibration"] = calibration(shown, clean)
        return Judgement(figures, phi, truth)

    def _place(self, outcome: Outcome) -> tuple[np.ndarray, np.ndarray | None]:
        if not self.engine.feature_dim:
            return outcome.latents.reshape(len(outcome.latents), -1), None
        truth = outcome.item.truth
        images = outcome.particles if truth is None else np.concatenate([outcome.particles, truth[None]])
        phi = self.engine.features(images.astype(np.float32))
        return (phi, None) if truth is None else (phi[:-1], phi[-1])

    def _residual(self, item: Item, images: np.ndarray) -> np.ndarray:
        params = {name: value[None] for name, value in item.operator_params.items()}
        predicted = self.engine.measure(item.task.operator, images, **params)
        return metrics.residual(item.y, predicted, item.operator_params)


def compare(particles: np.ndarray, truth: np.ndarray, fit: int, lpips: Lpips | None = None) -> dict[str, Any]:
    """PSNR, SSIM and LPIPS of each particle [N, C, H, W], clipped, of the best, of the one that fits best, of the mean.

    fit: the index of the particle whose data residual is least. SSIM is None where the image is too small for it, LPIPS
    where there are no weights.
    """
    clean = lpips.to(truth) if lpips else []
    distance = (lambda image: lpips.distance(image, clean)) if lpips else lambda image: None
    return {
        "psnr": judged(lambda image: metrics.psnr(image, truth), particles, fit, max),
        "ssim": judged(lambda image: metrics.ssim(image, truth), particles, fit, max),
        "lpips": judged(distance, particles, fit, min),
    }


def judged(
    measure: Callable[[np.ndarray], float | None], particles: np.ndarray, fit: int, best: Callable[..., float]
) -> dict[str, Any] | None:
    """The summary of a measure of the particles, and that of their mean image; None where there is no measure."""
    values = [value for particle in particles if (value := measure(particle)) is not None]
    if len(values) < len(particles):
        return None
    of_mean = measure(metrics.mean_image(particles))
    return {**summary(values, fit, best), "of_mean_image": None if of_mean is None else _finite(of_mean)}


def summary(values: Sequence[float], fit: int, best: Callable[..., float] = min) -> dict[str, Any]:
    """The particles' values with their mean, best, and that of the particle that fits the measurement best.

    Infinite ones (a perfect PSNR) become None: JSON has none.
    """
    return {
        "mean": _finite(float(np.mean(values))),
        "best": _finite(best(values)),
        "best_by_fit": _finite(values[fit]),
        "particles": [_finite(value) for value in values],
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
