"""The distance of a sampler's own distribution to the reference posterior, however its particles hang together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlsd.bench.quality import distance, reference, sample, settings
from rlsd.bench.quality.items import Item
from rlsd.bench.quality.problem import Array
from rlsd.engine import Engine, Params
from rlsd.models.fashion import PATH


def drawn(q: Array, how: str, seeds: int, particles: int = 8) -> Array:
    """Histograms [seeds, n, classes] of particles that each have the distribution q [n, classes]."""
    generator, (n, classes) = np.random.default_rng(3), q.shape
    at = generator.random((seeds, n, particles))
    if how == "stratified":  # each has its own eighth: as far apart as can be
        at = (np.arange(particles) + generator.random((seeds, n, 1))) / particles
    named = (at[..., None] > q.cumsum(1)[:, None, :-1]).sum(-1)
    return (named[..., None] == np.arange(classes)).mean(2)


@pytest.mark.parametrize("how", ["independent", "stratified"])
def test_the_distance_is_that_of_the_distribution_not_of_the_histogram(how: str) -> None:
    generator, n = np.random.default_rng(0), 4000
    p, off = generator.dirichlet(np.full(10, 0.5), (2, n))
    q = 0.6 * p + 0.4 * off
    true = np.square(q - p).sum(1).mean()
    found = distance.squared_distance(drawn(q, how, 2), p)
    assert found.mean() == pytest.approx(true, abs=4 * found.std() / n**0.5) and found.std() / n**0.5 < 0.05 * true
    exact = distance.squared_distance(drawn(p, how, 3), p)
    assert abs(exact.mean()) < 4 * exact.std() / n**0.5
    assert np.square(drawn(q, how, 1)[0] - p).sum(1).mean() > 1.2 * true  # what one seed would say


def test_one_seed_does_not_do() -> None:
    with pytest.raises(ValueError, match="seeds: 1 is too few"):
        distance.squared_distance(np.zeros((1, 3, 10)), np.full((3, 10), 0.1))


def test_rows_of_methods_and_pairs() -> None:
    p = np.random.default_rng(1).dirichlet(np.ones(4), 50)
    far = np.roll(p, 1, axis=1)
    shares = {"rlsd": np.stack([p, p]), "nonrepuls": np.stack([far, far]), "psld": np.stack([p, far])}
    rows = {(row["method"], row.get("less")): row for row in distance.lines(shares, p)}
    known = np.square(far - p).sum(1).mean()
    assert rows["rlsd", None]["squared"] == [0, 0, 0] and rows["rlsd", None]["seeds"] == 2
    assert rows["nonrepuls", None]["squared"][0] == pytest.approx(known, rel=1e-3)
    half = reference.total_variation(far, p).mean() / 2
    assert rows["psld", None]["squared"] == [0, 0, 0]  # an error in one seed alone is no error of the distribution
    assert rows["psld", None]["variation"][0] == pytest.approx(half, rel=1e-3)
    assert rows["uniform", None]["squared"][0] == pytest.approx(np.square(p - 0.25).sum(1).mean(), rel=1e-3)
    assert rows["rlsd", "nonrepuls"]["squared"][0] == pytest.approx(-known, rel=1e-3)
    assert set(rows) == {*((name, None) for name in (*shares, "uniform")), ("rlsd", "nonrepuls"), ("rlsd", "psld")}


def test_each_seed_has_its_own_particles_and_its_own_place(tmp_path: Path) -> None:
    setup = settings.Setup(0.05, 2, 3)
    x = np.full((1, 32, 32), -0.5, np.float32)
    item = Item(4, x, 3, x, {"mask": np.ones((1, 32, 32), np.float32)})
    work = {seed: next(sample.shards(tmp_path, tmp_path, "half", "rlsd", setup, [item], seed)) for seed in (0, 1)}
    assert work[0].out == next(sample.shards(tmp_path, tmp_path, "half", "rlsd", setup, [item])).out
    assert work[0].out.parent != work[1].out.parent
    with Engine(PATH / "bundle", threads=1) as engine:
        particles = {seed: sample.by_engine(engine, each, Params(steps=3))[0] for seed, each in work.items()}
        again = sample.by_engine(engine, replace(work[0], seed=1), Params(steps=3))[0]
    assert not np.array_equal(particles[0], particles[1]) and np.array_equal(particles[1], again)
