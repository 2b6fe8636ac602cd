"""Repulsion finds more modes: a ring of eight Gaussians with its exact score, nothing observed, eight particles."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import mixtures  # noqa: E402

from rlsd.engine import Engine, Job, Params  # noqa: E402
from rlsd.export import package  # noqa: E402

SEEDS, DEVIATION = 20, 0.15
STEPS = 3000  # in fewer steps of so small a rate some particles are still between two modes at the end


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    networks = mixtures.ring_networks(DEVIATION, STEPS)
    bundle = package(networks, tmp_path_factory.mktemp("ring") / "bundle", name="ring", batches=[8])
    with Engine(bundle, max_particles=8 * SEEDS) as engine:
        yield engine


def modes_reached(engine: Engine, gamma: float) -> tuple[float, float]:
    """Mean number of distinct modes over the seeds, and the largest distance of a particle to its nearest mode."""
    params = Params(
        steps=STEPS, lambda_=1.0, rho=1.0, lr_z=0.015, lr_x=0.015, gamma=gamma, repulsion="latent", repulsion_until=0.8
    )
    y = np.zeros((2, 1, 1), np.float32)
    jobs = [Job(y=y, operator="nothing", particles=8, seed=seed, params=params) for seed in range(SEEDS)]
    means = mixtures.ring().numpy()
    counts, farthest = [], 0.0
    for result in engine.reconstruct(jobs):
        distance = np.linalg.norm(result.particles.reshape(8, 1, 2) - means, axis=2)
        counts.append(len(set(distance.argmin(1))))
        farthest = max(farthest, float(distance.min(1).max()))
    return float(np.mean(counts)), farthest


def test_repulsion_reaches_more_modes_and_every_particle_ends_on_one(engine):
    alone, far_alone = modes_reached(engine, 0.0)
    together, far_together = modes_reached(engine, 4.0)
    assert far_alone <= 3 * DEVIATION
    assert far_together <= 3 * DEVIATION
    assert 4.75 <= alone <= 5.75  # eight independent draws of eight modes reach 5.25 on average
    assert together >= 6.5
