"""Metrics against scikit-image and against plain definitions in float64."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from rlsd.pipeline import metrics

RNG = np.random.default_rng(1)


def images(*shape):
    truth = RNG.uniform(-1, 1, shape)
    return (truth + 0.2 * RNG.normal(size=shape)).astype(np.float32), truth.astype(np.float32)


def plain_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004 as written, for intensities from 0 to 255.

    Gaussian window 11 x 11, sigma 1.5, K = (0.01, 0.03); windows inside the image.
    """
    taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(taps, taps) / taps.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            a, b = (image[row : row + 11, column : column + 11] for image in (x, y))
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * a * a).sum() - ma**2, (window * b * b).sum() - mb**2
            cov = (window * a * b).sum() - ma * mb
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 17, 40)])
def test_psnr(shape):
    image, truth = images(*shape)
    want = peak_signal_noise_ratio(truth.astype(float), np.clip(image, -1, 1).astype(float), data_range=2)
    assert metrics.psnr(image, truth) == pytest.approx(want, rel=1e-9)
    assert metrics.psnr(truth, truth) == float("inf")


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 17, 20)])
def test_ssim(shape):
    image, truth = images(*shape)
    shown, meant = (255 * (np.clip(each, -1, 1).astype(float) + 1) / 2 for each in (image, truth))
    want = np.mean([plain_ssim(a, b) for a, b in zip(shown, meant)])
    assert metrics.ssim(image, truth) == pytest.approx(want, abs=1e-7)
    assert metrics.ssim(truth, truth) == pytest.approx(1)
    assert metrics.ssim(image[:, :10], truth[:, :10]) is None


def test_cosine_similarity():
    phi = RNG.normal(size=(5, 7)).astype(np.float32)
    unit = phi / np.linalg.norm(phi, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(5) for j in range(5) if i != j]
    assert metrics.cosine_similarity(phi) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert metrics.cosine_similarity(phi[:1].repeat(3, 0)) == pytest.approx(1)
    assert metrics.cosine_similarity(phi[:1]) is None
    assert metrics.cosine_similarity(1e-4 * phi) == pytest.approx(np.mean(pairs), abs=1e-6)  # of directions alone


def test_deviation():
    particles = RNG.normal(size=(6, 3, 4, 5)).astype(np.float32)
    clipped = np.clip(particles.astype(float), -1, 1)
    np.testing.assert_allclose(metrics.deviation(particles), np.sqrt((clipped.std(0) ** 2).mean(0)))
    np.testing.assert_allclose(metrics.mean_image(particles), clipped.mean(0))
    assert metrics.deviation(particles[:1]).max() == 0


def test_residual_counts_what_was_observed():
    y, predicted = np.zeros((1, 4, 4), np.float32), np.full((2, 1, 4, 4), 0.5, np.float32)
    assert metrics.residual(y, predicted, {}).tolist() == [0.5, 0.5]
    mask = np.zeros((1, 4, 4), np.float32)
    mask[:, :2] = 1
    assert metrics.residual(y, predicted * mask, {"mask": mask}).tolist() == [0.5, 0.5]
    chain = {
        "first_mask": np.ones_like(mask),
        "second_mask": mask,
    }  # of a chain, the last one's
    assert metrics.residual(y, predicted * mask, chain).tolist() == [0.5, 0.5]
    assert metrics.data_mask(y, {"mask": np.ones((1, 8, 8))}) is None  # of the image, not of what is measured of it
    assert metrics.observed_share(y, chain) == 0.5 and metrics.observed_share(y, {"first_mask": mask}) == 1
