"""Of which class an image is: the classifier on the features that a bundle may carry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlsd.engine import Engine, RlsdError
from rlsd.pipeline.errors import InputError


@dataclass(frozen=True)
class ClassHead:
    """A linear classifier on the features phi [n, D]: names of K classes, weight [K, D], bias [K]."""

    names: Sequence[str]
    weight: np.ndarray
    bias: np.ndarray

    def probabilities(self, phi: np.ndarray) -> np.ndarray:
        """[n, K], float64."""
        logits = phi.astype(np.float64) @ self.weight.T + self.bias
        likely = np.exp(logits - logits.max(1, keepdims=True))
        found: np.ndarray = likely / likely.sum(1, keepdims=True)
        return found


def class_head(engine: Engine) -> ClassHead | None:
    """The bundle's (its fact `info class_head FILE CLASS...`), None without. InputError when it does not fit."""
    for line in engine.describe().get("info", []):
        key, *words = line.split()
        if key != "class_head" or not words:
            continue
        file, *names = words
        width = (engine.feature_dim or 0) + 1
        try:
            data = engine.file(file)
        except RlsdError as error:
            raise InputError(f"class_head {file} of the bundle cannot be read: {error}") from error
        values = np.frombuffer(data[: len(data) // 4 * 4], "<f4").astype(np.float64)
        if not names or values.size != len(names) * width or not np.isfinite(values).all():
            wanted = f"{len(names) * width} finite ones are wanted"
            raise InputError(f"class_head {file} of the bundle has {values.size} values, {wanted}")
        values = values.reshape(len(names), width)
        return ClassHead(tuple(names), values[:, :-1], values[:, -1])
    return None


def class_figures(head: ClassHead, phi: np.ndarray, truth: np.ndarray | None) -> dict[str, Any]:
    """The most likely class of each particle, from features phi [N, D], and how the particles spread over classes.

    predicted, probability: [N]. distinct: number of classes among them. histogram: class -> particles, most frequent
    first. entropy: of the histogram, in nats. of_input: class of the truth's features [D], None without.
    """
    likely = head.probabilities(phi)
    predicted = [head.names[i] for i in likely.argmax(1)]
    counts = Counter(predicted)
    share = np.array(list(counts.values())) / len(predicted)
    return {
        "predicted": predicted,
        "probability": likely.max(1).tolist(),
        "distinct": len(counts),
        "histogram": dict(counts.most_common()),
        "entropy": max(0.0, float(-(share * np.log(share)).sum())),
        "of_input": None if truth is None else head.names[int(head.probabilities(truth[None])[0].argmax())],
    }
