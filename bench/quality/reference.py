"""The posterior itself, with the 60,000 training images as the prior: importance sampling, exact for that prior.

Each training image x has the weight N(y; f(x), sigma^2 I), normalised by log-sum-exp in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlsd.bench.quality.problem import Array
from rlsd.engine import Engine
from rlsd.pipeline.tasks import TASKS

LEAST_SIGMA = 0.1  # below it, next to no training image explains another image's measurement


@dataclass(frozen=True)
class Posterior:
    """predicted: f(x) of each training image [n, m], float64, what was not observed left out. seen: where in y."""

    predicted: Array
    seen: Array
    sigma: float
    norms: Array  # ||f(x)||^2

    @classmethod
    def of(cls, engine: Engine, task: str, images: Array, sigma: float) -> Posterior:
        """For a task whose operator has the same parameters for every item."""
        if sigma < LEAST_SIGMA:
            raise ValueError(f"sigma: {sigma} is too small for a reference posterior, allowed is {LEAST_SIGMA} or more")
        operator = TASKS[task].operator
        params = TASKS[task].parameters(engine.operators[operator].params, 0, 0, {}, measured=False)
        shape = engine.operators[operator].measurement_shape
        mask = np.broadcast_to(params.get("mask", np.ones(shape)), shape)
        seen = np.flatnonzero(mask)
        batches = np.array_split(images, max(len(images) // 1000, 1))
        parts = [engine.measure(operator, b, **params).reshape(len(b), -1)[:, seen] for b in batches]
        predicted = np.concatenate(parts).astype(np.float64)
        return cls(predicted, seen, sigma, np.square(predicted).sum(1))

    def weights(self, y: Array, without: int | None = None) -> Array:
        """The posterior probability of each training image [n], float64; `without` one of them, if y is of it."""
        logs = (self.predicted @ y.reshape(-1)[self.seen].astype(np.float64) - 0.5 * self.norms) / self.sigma**2
        if without is not None:
            logs[without] = -np.inf
        logs -= logs.max()
        weights = np.exp(logs)
        return weights / weights.sum()


def effective(weights: Array) -> float:
    """Kish's effective sample size."""
    return float(1 / np.square(weights).sum())


def class_distribution(weights: Array, classes: Array, count: int = 10) -> Array:
    """The probability of each class [count]."""
    return np.bincount(classes, weights, count)


def perplexity(p: Array) -> float:
    """exp of the entropy: how many classes there are, so to say."""
    positive = p[p > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def total_variation(p: Array, q: Array) -> Array:
    """Half the sum of the differences over the last axis: 0 for equal distributions, 1 for disjoint ones."""
    return 0.5 * np.abs(p - q).sum(-1)


def expected_variation(p: Array, particles: int, key: int, draws: int = 2000) -> float:
    """The mean total variation to p of `particles` exact draws from p: what no independent sampler gets below."""
    generator = np.random.Generator(np.random.Philox(key=key))
    return float(total_variation(generator.multinomial(particles, p / p.sum(), draws) / particles, p).mean())


def expected_modes(p: Array, particles: int) -> float:
    """The expected number of distinct classes among `particles` exact draws from p."""
    return float((1 - (1 - p) ** particles).sum())
