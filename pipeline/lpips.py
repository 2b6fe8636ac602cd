"""LPIPS, the perceptual distance of Zhang et al. (2018, arXiv 1801.03924), version 0.1 with AlexNet, in NumPy.

The weights are not shipped: docs/metrics.md says where they come from. They are read from safetensors files with the
names of the two original ones: torchvision's AlexNet (features.0.weight and so on) and the five heads of the authors
(lin0.model.1.weight and so on).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rlsd.pipeline.errors import InputError

SHIFT, SCALE = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
CHANNELS = (64, 192, 384, 256, 256)
LAYERS = ((0, 11, 4, 2), (3, 5, 1, 2), (6, 3, 1, 1), (8, 3, 1, 1), (10, 3, 1, 1))  # name, kernel, stride, padding
POOLED = (1, 2)  # layers with a maximum over 3 x 3, stride 2, before them
LEAST_SIDE = 64  # smaller images are enlarged: the method's own patches have 64 pixels a side
EPSILON = 1e-10


class Lpips:
    """The distance with given weights: name -> array; names and shapes as in the module's description."""

    def __init__(self, weights: Mapping[str, np.ndarray]):
        self._convolutions = []
        before = 3
        for (name, kernel, _, _), after in zip(LAYERS, CHANNELS):
            w = _weight(weights, f"features.{name}.weight", (after, before, kernel, kernel))
            self._convolutions.append(
                (w.reshape(after, -1).T.copy(), _weight(weights, f"features.{name}.bias", (after,)))
            )
            before = after
        self._heads = [
            _weight(weights, f"lin{i}.model.1.weight", (1, channels, 1, 1)).ravel()
            for i, channels in enumerate(CHANNELS)
        ]

    def to(self, truth: np.ndarray) -> list[np.ndarray]:
        """What `distance` needs to know of the image [C, H, W] that others are compared with."""
        return self._features(truth)

    def distance(self, image: np.ndarray, truth: list[np.ndarray]) -> float:
        """Of an image [C, H, W] in [-1, 1] (clipped; 1 or 3 channels) to the one given to `to`: 0 for the same."""
        total = 0.0
        for mine, theirs, head in zip(self._features(image), truth, self._heads):
            total += float((((mine - theirs).astype(np.float64) ** 2) @ head).mean())
        return total

    def _features(self, image: np.ndarray) -> list[np.ndarray]:
        """Activations of the five layers, [H, W, C] each, of length 1 over the channels."""
        x = (prepared(image) - SHIFT.astype(np.float32)) / SCALE.astype(np.float32)
        found = []
        for index, ((_, kernel, stride, padding), (weight, bias)) in enumerate(zip(LAYERS, self._convolutions)):
            if index in POOLED:
                x = _windows(x, 3, 2).max((3, 4))
            x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
            patches = _windows(x, kernel, stride)
            x = np.maximum(patches.reshape(*patches.shape[:2], -1) @ weight + bias, 0)
            found.append(x / (np.sqrt((x * x).sum(-1, keepdims=True)) + np.float32(EPSILON)))
        return found


def prepared(image: np.ndarray) -> np.ndarray:
    """[C, H, W] as [H, W, 3] in [-1, 1], pixels repeated until the shorter side has LEAST_SIDE."""
    colour = np.clip(np.moveaxis(image, 0, -1), -1, 1).astype(np.float32)
    times = enlargement(image.shape)
    return np.broadcast_to(colour, (*colour.shape[:2], 3)).repeat(times, 0).repeat(times, 1)


def enlargement(shape: tuple[int, ...]) -> int:
    """How many times each pixel of an image [C, H, W] is repeated in each direction."""
    return -(-LEAST_SIDE // min(shape[-2:]))


def load_lpips(path: Path) -> Lpips:
    """From a safetensors file, or a folder whose safetensors files hold all weights together. InputError."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise InputError(f"lpips {path}: a safetensors file, or a folder with some, is wanted")
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ModuleNotFoundError as error:
        raise InputError(f"--lpips needs {error.name}, which is not installed: pip install 'rlsd[report]'") from None
    weights: dict[str, np.ndarray] = {}
    for file in files:
        try:
            weights.update(load_file(file))
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"lpips {file} cannot be read as safetensors: {error}") from error
    try:
        return Lpips(weights)
    except InputError as error:
        raise InputError(f"lpips {path}: {error}") from None


def _weight(weights: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in weights:
        raise InputError(f"there is no weight {name!r}")
    value = np.asarray(weights[name], np.float32)
    if value.shape != shape or not np.isfinite(value).all():
        raise InputError(f"weight {name!r} is {list(value.shape)}, finite values of shape {list(shape)} are wanted")
    return value


def _windows(x: np.ndarray, side: int, stride: int) -> np.ndarray:
    """All windows of x [H, W, C]: [H', W', C, side, side]."""
    return np.lib.stride_tricks.sliding_window_view(x, (side, side), (0, 1))[::stride, ::stride]
