"""Figures of one item's particles, and means over items with what is known of their error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlsd.bench.quality import reference
from rlsd.bench.quality.items import Item
from rlsd.bench.quality.problem import Array
from rlsd.engine import Engine
from rlsd.pipeline import metrics
from rlsd.pipeline.classes import ClassHead, class_head
from rlsd.pipeline.tasks import TASKS

RESAMPLES, CONFIDENCE = 2000, 0.95
RECOGNISED = 18.0  # dB: from here on a particle is taken to show the image
PHASE = TASKS["phase-retrieval"].operator
Classify = Callable[[Array], Array]


def own_classifier(engine: Engine) -> ClassHead:
    """The bundle's; ValueError for a bundle exported without one."""
    head = class_head(engine)
    if head is None:
        raise ValueError(f"{engine.path} has no class_head: export it again (make bundle)")
    return head


@dataclass(frozen=True)
class Scorer:
    """judge: images -> classes. head: the bundle's own classifier, on its features phi."""

    engine: Engine
    judge: Classify
    head: ClassHead

    def __call__(
        self, task: str, sigma: float, item: Item, particles: Array, classes: Array | None
    ) -> dict[str, float]:
        """The figures of an item's particles [N, 1, 32, 32].

        classes: the reference posterior's distribution of them, if there is one. PSNR in dB: mean and best of the
        particles, of the one that fits the data best, of their mean image. residual: in units of sigma, over what was
        observed. deviation: of the pixels over the particles. similarity: mean pairwise cosine of the extractor's
        features. modes: distinct classes by the judge; modes_own: by the extractor's own classifier. right: share of
        the particles of the true class. variation: total variation of the judge's classes to the reference. For phase
        retrieval, of whose measurement shifts and half a turn change nothing: psnr_aligned and psnr_best_aligned, mean
        and best once each is moved to where it fits the truth best; in_place and copies: the shares of the particles
        that then show the image (RECOGNISED), without a move but a pixel's, and with one.
        """
        images, features = particles.clip(-1, 1), self.engine.features(particles)
        psnr = np.array([metrics.psnr(image, item.truth) for image in images])
        given = {name: value[None] for name, value in item.params.items()}
        seen = self.engine.measure(TASKS[task].operator, particles, **given)
        residual = metrics.residual(item.y, seen, item.params) / sigma
        named = self.judge(images)
        found = {
            "psnr": float(psnr.mean()),
            "psnr_best": float(psnr.max()),
            "psnr_best_fit": float(psnr[residual.argmin()]),
            "psnr_mean_image": metrics.psnr(images.mean(0), item.truth),
            "residual": float(residual.mean()),
            "deviation": float(images.std(0).mean()),
            "similarity": float(metrics.cosine_similarity(features) or 0.0),
            "modes": float(len(set(named.tolist()))),
            "modes_own": float(len(set(self.head.probabilities(features).argmax(1).tolist()))),
            "right": float((named == item.label).mean()),
        }
        if TASKS[task].operator == PHASE:
            placed = [aligned(image, item.truth) for image in images]
            found["psnr_aligned"] = float(np.mean([each for each, _ in placed]))
            found["psnr_best_aligned"] = max(each for each, _ in placed)
            shown = [moved for each, moved in placed if each >= RECOGNISED]
            found["in_place"] = shown.count(False) / len(placed)
            found["copies"] = shown.count(True) / len(placed)
        if classes is not None:
            share = np.bincount(named, minlength=len(classes)) / len(named)
            found["variation"] = float(reference.total_variation(share, classes))
        return found


def aligned(image: Array, truth: Array) -> tuple[float, bool]:
    """PSNR in dB of an image [1, H, W] after the cyclic shift, and perhaps half a turn, that fit the truth best.

    And whether that is a turn, or a shift by more than a pixel either way.
    """
    errors = []
    for target in (truth[0], truth[0, ::-1, ::-1]):
        overlap = np.fft.ifft2(np.fft.fft2(image[0]) * np.fft.fft2(target).conj()).real
        errors.append((image**2).mean() + (target**2).mean() - 2 * overlap / target.size)
    turned, row, column = (int(i) for i in np.unravel_index(np.argmin(errors), np.shape(errors)))
    target = np.roll(truth[:, ::-1, ::-1] if turned else truth, (row, column), (1, 2))
    far = [min(by, side - by) > 1 for by, side in zip((row, column), target.shape[1:])]
    return metrics.psnr(image, target), bool(turned) or any(far)


def interval(values: Sequence[float], key: int = 0) -> tuple[float, float, float]:
    """Mean over items, and the ends of its 95 % confidence interval by bootstrap."""
    data = np.asarray(values, np.float64)
    chosen = np.random.Generator(np.random.Philox(key=key)).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.quantile(data[chosen].mean(1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(data.mean()), float(low), float(high)


def ratio(numerator: Sequence[float], denominator: Sequence[float], key: int = 0) -> tuple[float, float, float]:
    """The ratio of two means over the same items, with its interval by bootstrap over items."""
    a, b = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    chosen = np.random.Generator(np.random.Philox(key=key)).integers(0, len(a), (RESAMPLES, len(a)))
    drawn = a[chosen].mean(1) / b[chosen].mean(1)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(a.mean() / b.mean()), float(low), float(high)


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Of each figure [mean, low, high] over the items, to five digits."""
    return {name: [float(f"{v:.5g}") for v in interval([row[name] for row in rows])] for name in rows[0]}
