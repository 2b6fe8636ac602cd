"""How good and how diverse reconstructions are. Images are [..., C, H, W] in [-1, 1], clipped to it first."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

DATA_RANGE = 2.0
SSIM_SIGMA, SSIM_WINDOW = 1.5, 11


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images."""
    error = np.mean((_clipped(image) - _clipped(truth)) ** 2)
    return float(10 * np.log10(DATA_RANGE**2 / error)) if error > 0 else float("inf")


def ssim(image: np.ndarray, truth: np.ndarray) -> float | None:
    """Structural similarity (Wang et al., 2004: Gaussian window of 11, sigma 1.5); None for images below 11 pixels.

    Of intensities with black at 0, for which it is defined: an offset would change it.
    """
    if min(image.shape[-2:]) < SSIM_WINDOW:
        return None
    from skimage.metrics import structural_similarity  # slow to import

    value = structural_similarity(
        _clipped(image) + 1,
        _clipped(truth) + 1,
        channel_axis=0,
        data_range=DATA_RANGE,
        gaussian_weights=True,
        sigma=SSIM_SIGMA,
        use_sample_covariance=False,
    )
    return float(value)


def cosine_similarity(features: np.ndarray) -> float | None:
    """Mean cosine similarity over the pairs of particles' features [N, D]: lower is more diverse. None for one."""
    n = len(features)
    if n < 2:
        return None
    unit = features.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    return float(((unit.sum(0) ** 2).sum() - n) / (n * (n - 1)))


def deviation(particles: np.ndarray) -> np.ndarray:
    """Standard deviation over the particles [N, C, H, W] of each pixel, root mean square over channels: [H, W]."""
    return np.sqrt(_clipped(particles).var(axis=0).mean(axis=0))


def mean_image(particles: np.ndarray) -> np.ndarray:
    """The mean of the particles [N, C, H, W], each clipped: [C, H, W]."""
    mean: np.ndarray = _clipped(particles).mean(axis=0)
    return mean


def residual(y: np.ndarray, predicted: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
    """sqrt(mean (y - f(x))^2) of each particle, y [...] and f(x) [N, ...]; under a mask over what was observed."""
    squared = (predicted.astype(np.float64) - y) ** 2
    mask = data_mask(y, params)
    if mask is not None:
        weight = np.broadcast_to(mask, y.shape)
        return np.sqrt((squared * weight).reshape(len(squared), -1).sum(1) / max(weight.sum(), 1))
    return np.sqrt(squared.reshape(len(squared), -1).mean(1))


def observed_share(y: np.ndarray, params: Mapping[str, np.ndarray]) -> float:
    """The share of the values of y that a mask says were observed; 1 without a mask."""
    mask = data_mask(y, params)
    return 1.0 if mask is None else float(np.broadcast_to(mask, y.shape).mean())


def data_mask(y: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The operator's parameter that says which values of y were observed: its mask, of a chain the last one's."""
    mask = params.get("mask", params.get("second_mask"))
    return mask if mask is not None and mask.shape[1:] == y.shape[1:] else None


def _clipped(image: np.ndarray) -> np.ndarray:
    return np.clip(image.astype(np.float64), -1, 1)
