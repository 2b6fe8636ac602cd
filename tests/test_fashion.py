"""The embedded prior's bundle: what its users rely on, from the committed files, without torch."""

import numpy as np
import pytest

from rlsd.engine import Engine, Job, Params
from rlsd.models.fashion import CLASS_NAMES, PATH

MASK = np.ones((1, 32, 32), np.float32)
MASK[:, :, :16] = 0


def job(particles: int, item: int = 0, **params) -> Job:
    y = MASK * np.linspace(-1, 1, 32, dtype=np.float32)
    settings = {"steps": 8, "gamma": 5.0, "lr_z": 0.1, "lr_x": 0.2} | params
    return Job(y, "inpainting", {"mask": MASK}, particles, item=item, params=Params(**settings))


@pytest.fixture(scope="module")
def alone() -> bytes:
    with Engine(PATH / "bundle", threads=1) as engine:
        return engine.reconstruct([job(3)])[0].particles.tobytes()


@pytest.mark.parametrize("threads, limit, place", [(1, 0, 0), (2, 0, 2), (3, 4, 1), (2, 1, 3)])
def test_same_bytes_however_it_is_packed(alone, threads, limit, place):
    """Its graphs exist for batches of 2, 8 and 16: which of them a particle goes through must not show."""
    others = [job(n, item=n, steps=4) for n in (30, 14, 1, 5)]
    with Engine(PATH / "bundle", threads=threads, max_particles=limit) as engine:
        assert engine.reconstruct([*others[:place], job(3), *others[place:]])[place].particles.tobytes() == alone


def test_facts():
    with Engine(PATH / "bundle") as engine:
        assert engine.name == "fashion"
        assert (engine.image_shape, engine.latent_shape, engine.context_shape) == ((1, 32, 32), (4, 8, 8), (1, 64))
        assert set(engine.contexts) == set(CLASS_NAMES)
        checks = [line.split() for line in engine.describe()["check"]]
        assert {graph for graph, *_ in checks} == {line.split()[0] for line in engine.describe()["graph"]}
        assert all(float(error) <= 1e-4 for *_, error in checks)


def test_repulsion_makes_the_particles_more_diverse():
    with Engine(PATH / "bundle") as engine:
        plain, apart = engine.reconstruct([job(4, steps=40, gamma=0.0), job(4, steps=40, gamma=20.0)])
    assert apart.particles.std(0).mean() > plain.particles.std(0).mean()


def test_a_class_as_context_with_guidance():
    with Engine(PATH / "bundle") as engine:
        context = engine.context("trouser")
        given = job(2, guidance=3.0)
        (result,) = engine.reconstruct(
            [Job(given.y, "inpainting", {"mask": MASK}, 2, context=context, params=given.params)]
        )
        assert engine.stats()["denoiser_runs"] == 2 * 2 * 7
    assert np.isfinite(result.particles).all()
