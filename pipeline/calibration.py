"""Is the truth where the particles say it may be? Errors against spread, ranks and coverage, pixel by pixel.

If truth and particles are drawn from the same distribution, then the truth's rank among N particles is uniform over
0..N, the interval from the k-th smallest to the k-th largest particle holds it with probability (N + 1 - 2k) / (N + 1),
and the mean's squared error is (1 + 1/N) times the particles' variance: all exact for every N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LEVELS = 127.5  # steps of an 8-bit image to a unit of [-1, 1]: ranks are taken at this resolution, ties split evenly
EDGES = np.geomspace(1 / 255, 1, 12)  # of the bins by standard deviation; one bin below and one above them


def calibration(particles: np.ndarray, truth: np.ndarray) -> dict[str, Any] | None:
    """Figures of one item: particles [N, C, H, W] and truth [C, H, W], both clipped to [-1, 1]; None for N = 1.

    error: root mean square of mean - truth. spread: what it should be, by the particles' variance. ratio: spread /
    error, below 1 for particles that are too sure (None for no error). ranks [N + 1]: share of the pixels with so many
    particles below the truth. coverage: [nominal, found] of each interval. bins: sums over the pixels by their
    standard deviation, for `pool`.
    """
    n = len(particles)
    if n < 2:
        return None
    p, t = (np.clip(x.astype(np.float64), -1, 1) for x in (particles, truth))
    squared, variance = (p.mean(0) - t) ** 2, p.var(0, ddof=1) * (1 + 1 / n)
    which = np.searchsorted(EDGES, np.sqrt(variance).ravel(), side="right")
    sums = [np.bincount(which, values, len(EDGES) + 1) for values in (None, squared.ravel(), variance.ravel())]
    bins = dict(zip(("pixels", "squared_error", "variance"), (total.tolist() for total in sums)))
    return described(_ranks(p, t), bins)


def _ranks(p: np.ndarray, t: np.ndarray) -> np.ndarray:
    levels, level = np.rint((p + 1) * LEVELS), np.rint((t + 1) * LEVELS)
    below, equal = (levels < level).sum(0).ravel(), (levels == level).sum(0).ravel()
    # a truth that equals e particles has each of e + 1 ranks with the same share
    edges = np.zeros(len(p) + 2)
    np.add.at(edges, below, 1 / (equal + 1))
    np.add.at(edges, below + equal + 1, -1 / (equal + 1))
    found: np.ndarray = np.cumsum(edges)[:-1] / below.size
    return found


def described(ranks: np.ndarray, bins: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The figures that follow from ranks and bins."""
    pixels = max(sum(bins["pixels"]), 1)
    error, spread = (float(np.sqrt(sum(bins[key]) / pixels)) for key in ("squared_error", "variance"))
    return {
        "error": error,
        "spread": spread,
        "ratio": spread / error if error > 0 else None,
        "coverage": coverage(ranks),
        "ranks": ranks.tolist(),
        "bins": dict(bins),
    }


def coverage(ranks: np.ndarray) -> list[list[float]]:
    """[nominal, found] for the intervals between the k-th smallest and k-th largest of N particles, widest first."""
    n = len(ranks) - 1
    return [[(n + 1 - 2 * k) / (n + 1), float(ranks[k : n + 1 - k].sum())] for k in range(1, n // 2 + 1)]


def pool(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The same figures over all pixels of several items with equally many particles; None where there are none.

    Items with another number of particles than the first are left out: their ranks cannot be added.
    """
    alike = [each for each in figures if len(each["ranks"]) == len(figures[0]["ranks"])]
    if not alike:
        return None
    weights = [sum(each["bins"]["pixels"]) for each in alike]
    ranks = np.average([each["ranks"] for each in alike], axis=0, weights=weights)
    bins = {key: np.sum([each["bins"][key] for each in alike], axis=0).tolist() for key in alike[0]["bins"]}
    return {"items": len(alike), **described(ranks, bins)}
