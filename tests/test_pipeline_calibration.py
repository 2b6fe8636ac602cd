"""Calibration on draws whose distribution is known, and against counting by hand."""

import numpy as np
import pytest

from rlsd.pipeline.calibration import EDGES, calibration, coverage, pool

RNG = np.random.default_rng(3)


def draws(n, scale=1.0):
    """Particles and a truth around a common centre of each pixel, the particles scale times as wide."""
    centre = RNG.normal(size=(1, 1, 200, 200)) * 0.1
    return centre + 0.1 * scale * RNG.normal(size=(n, 1, 200, 200)), (centre + 0.1 * RNG.normal(size=centre.shape))[0]


@pytest.mark.parametrize("n", [2, 3, 8])
def test_particles_that_are_draws_of_the_same_are_calibrated(n):
    found = calibration(*draws(n))
    assert found["ratio"] == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(found["ranks"], 1 / (n + 1), atol=0.01)
    assert [nominal for nominal, _ in found["coverage"]] == [(n + 1 - 2 * k) / (n + 1) for k in range(1, n // 2 + 1)]
    assert all(empirical == pytest.approx(nominal, abs=0.015) for nominal, empirical in found["coverage"])


def test_particles_that_are_too_sure_and_too_unsure():
    sure, unsure = calibration(*draws(6, 0.3)), calibration(*draws(6, 3))
    assert sure["ratio"] < 0.5 < 1.5 < unsure["ratio"]
    assert sure["coverage"][0][1] < 5 / 7 - 0.2 and unsure["coverage"][0][1] > 5 / 7 + 0.2


def test_against_counting():
    particles = np.array([-1.0, 0.0, 0.0, 0.5])[:, None, None, None] * np.ones((1, 1, 1, 3))
    truth = np.array([[[-0.5, 0.0, 9.0]]])  # above one; equal to two of four; clipped to 1: above all
    found = calibration(particles, truth)
    np.testing.assert_allclose(found["ranks"], np.array([0, 1 + 1 / 3, 1 / 3, 1 / 3, 1]) / 3)
    variance = particles[:, 0, 0, 0].var(ddof=1) * 5 / 4
    assert found["spread"] == pytest.approx(np.sqrt(variance))
    assert found["error"] == pytest.approx(np.sqrt(np.mean([(-0.125 + 0.5) ** 2, 0.125**2, 1.125**2])))
    at = int((np.sqrt(variance) >= EDGES).sum())
    assert found["bins"]["pixels"][at] == 3 == sum(found["bins"]["pixels"])
    assert found["bins"]["variance"][at] == pytest.approx(3 * variance)


def test_what_is_equal_at_8_bits_counts_as_equal():
    particles, truth = np.full((3, 1, 2, 2), -0.9985), np.full((1, 2, 2), -1.0)
    np.testing.assert_allclose(calibration(particles, truth)["ranks"], 0.25)
    tenth = 10 / 127.5 - 1  # the nearest level counts, from either side
    for near in (-0.3, 0.3):
        found = calibration(np.full((3, 1, 2, 2), tenth + near / 127.5), np.full((1, 2, 2), tenth))
        np.testing.assert_allclose(found["ranks"], 0.25)


def test_one_particle_has_no_spread_and_no_error_no_ratio():
    assert calibration(np.zeros((1, 1, 2, 2)), np.zeros((1, 2, 2))) is None
    assert calibration(np.zeros((2, 1, 2, 2)), np.zeros((1, 2, 2)))["ratio"] is None
    assert coverage(np.array([0.5, 0.5])) == []


def test_pooled_items_are_one_large_item():
    particles, truth = draws(4, 0.7)
    parts = [calibration(particles[..., i:j], truth[..., i:j]) for i, j in ((0, 20), (20, 200))]
    whole, pooled = calibration(particles, truth), pool([*parts, calibration(*draws(3))])
    assert pooled["items"] == 2 and pool([]) is None
    for key in ("error", "spread", "ratio", "ranks", "coverage"):
        np.testing.assert_allclose(pooled[key], whole[key], rtol=1e-9)
    np.testing.assert_allclose(pooled["bins"]["variance"], whole["bins"]["variance"], rtol=1e-9)
