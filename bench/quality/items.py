"""Which images are reconstructed, and what was measured of them: fixed before any run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlsd.bench.quality import reference
from rlsd.bench.quality.problem import Array
from rlsd.bench.quality.settings import SEED, Setup
from rlsd.engine import Engine, normal
from rlsd.engine.native import STREAM_USER
from rlsd.pipeline.items import observed
from rlsd.pipeline.tasks import TASKS

ORDER_KEY = 2026  # of the Philox generator that shuffles the test images
PERPLEXITY, EFFECTIVE = 2.0, 10.0
AMBIGUOUS = ("small-visible",)


@dataclass(frozen=True)
class Images:
    """pixels: [n, 1, 32, 32] in [-1, 1]. labels: [n]."""

    pixels: Array
    labels: Array


@dataclass(frozen=True)
class Item:
    """One measurement. index: of the image in its split."""

    index: int
    truth: Array
    label: int
    y: Array
    params: Mapping[str, Array]


def load(folder: Path, split: str) -> Images:
    """The "train" (60,000) or "t10k" (10,000) images, padded with black."""
    from rlsd.models.fashion import data

    pixels, labels = data.load(folder, split)
    return Images(data.to_model(pixels).numpy(), labels.numpy())


def order(count: int = 10_000) -> Array:
    """The test images in the order in which they are taken."""
    return np.random.Generator(np.random.Philox(key=ORDER_KEY)).permutation(count)


def measured(engine: Engine, images: Images, index: int, task: str, sigma: float) -> Item:
    """The item of one image: its measurement is drawn once, for all methods and particles."""
    operator = TASKS[task].operator
    params = TASKS[task].parameters(engine.operators[operator].params, SEED, int(index), {}, measured=False)
    x = images.pixels[index]
    y = engine.measure(operator, x[None], **{name: value[None] for name, value in params.items()})[0]
    y = y + sigma * normal(SEED, int(index), 0, STREAM_USER, y.size).reshape(y.shape)
    return Item(int(index), x, int(images.labels[index]), observed(y, params).astype(np.float32), params)


@dataclass(frozen=True)
class Chosen:
    """The items of a task. Of an AMBIGUOUS one also, for each, what the reference posterior says.

    classes: [n, 10], the distribution of the garments. effective: [n], how many training images carry it.
    looked_at: how many images the rule was put to.
    """

    items: list[Item]
    looked_at: int
    classes: Array | None = None
    effective: Array | None = None


def chosen(engine: Engine, data: Path, task: str, setup: Setup, count: int) -> Chosen:
    """The first `count` items of the task in `order`.

    Of an AMBIGUOUS task only those are taken whose reference posterior spreads over garments: the perplexity of its
    class distribution is at least PERPLEXITY, and at least EFFECTIVE of the training images carry it. Nothing but
    the measurement and the training images decides.
    """
    test = load(data, "t10k")
    items = (measured(engine, test, index, task, setup.sigma) for index in order())
    if task not in AMBIGUOUS:
        return Chosen([item for _, item in zip(range(count), items)], count)
    train = load(data, "train")
    posterior = reference.Posterior.of(engine, task, train.pixels, setup.sigma)
    found: list[tuple[Item, Array, float]] = []
    for looked_at, item in enumerate(items, 1):
        weights = posterior.weights(item.y)
        classes = reference.class_distribution(weights, train.labels)
        if is_ambiguous(weights, classes):
            found.append((item, classes, reference.effective(weights)))
        if len(found) == count:
            taken, spread, effective = zip(*found)
            return Chosen(list(taken), looked_at, np.stack(spread), np.array(effective))
    raise ValueError(f"images: {count} is too many for {task}: the rule finds {len(found)}")


def is_ambiguous(weights: Array, classes: Array) -> bool:
    """The rule of `chosen`. weights: of the training images. classes: their distribution over garments."""
    return reference.perplexity(classes) >= PERPLEXITY and reference.effective(weights) >= EFFECTIVE
