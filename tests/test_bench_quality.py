"""The comparison of methods: its samplers on a problem with a known posterior, its statistics, its bookkeeping."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from rlsd.bench.quality import figures, items, reference, report, sample, settings, tune
from rlsd.bench.quality.dps import Dps, dps
from rlsd.bench.quality.items import Chosen, Item
from rlsd.bench.quality.problem import Array, Noise, Pull, Schedule
from rlsd.bench.quality.psld import Psld, psld
from rlsd.bench.quality.resample import ReSample, fit, resample
from rlsd.engine import Params
from rlsd.engine import reference as algorithm
from rlsd.pipeline.fit import Frame

SHAPE, SIGMA = (1, 2, 2), 0.1
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


@dataclass
class Gaussian:
    """z ~ N(0, I): eps is exact. D(z) = z W^T, E(x) = x W^-T."""

    w: Array
    abar: Array = field(default_factory=lambda: ABAR)
    counts: dict[str, int] = field(default_factory=dict)

    def eps(self, z_t: Array, t: int, keep: bool = True) -> tuple[Array, Pull]:
        self.counts["denoiser"] = self.counts.get("denoiser", 0) + len(z_t)
        scale = np.sqrt(1 - self.abar[t])
        return scale * z_t, lambda cotangent: scale * cotangent

    def decode(self, z: Array, keep: bool = True) -> tuple[Array, Pull]:
        return times(z, self.w), lambda cotangent: times(cotangent, self.w.T)

    def encode(self, x: Array, keep: bool = True) -> tuple[Array, Pull]:
        inverse = np.linalg.inv(self.w)
        return times(x, inverse), lambda cotangent: times(cotangent, inverse.T)


@dataclass
class FirstPixels:
    """y: the first two of four pixels, with noise."""

    y: Array
    sigma: float = SIGMA
    linear: bool = True
    mask: Array = field(default_factory=lambda: np.array([1.0, 1, 0, 0]).reshape(SHAPE))

    @property
    def count(self) -> int:
        return 2

    def squared(self, x: Array) -> tuple[Array, Array]:
        gap = self.mask * (x - self.y)
        return np.square(gap).sum((1, 2, 3)), gap

    def normal_map(self, x: Array) -> Array:
        return self.mask * x


def times(z: Array, w: Array) -> Array:
    return (z.reshape(len(z), -1) @ w.T).reshape(z.shape)


def posterior(w: Array, y: Array) -> tuple[Array, Array]:
    """Mean and covariance of x = W z given the first two pixels."""
    seen = w[:2]
    gain = seen.T @ np.linalg.inv(seen @ seen.T + SIGMA**2 * np.eye(2))
    return w @ gain @ y, w @ (np.eye(4) - gain @ seen) @ w.T


@pytest.fixture
def problem() -> tuple[Gaussian, FirstPixels, Noise, Array]:
    generator = np.random.default_rng(3)
    w = np.eye(4) + 0.4 * generator.standard_normal((4, 4))
    y = np.array([0.9, -0.6])
    f = FirstPixels(np.concatenate([y, [0, 0]]).reshape(1, *SHAPE))
    return Gaussian(w), f, Noise(5, tuple((0, p) for p in range(64)), SHAPE), y


@pytest.mark.parametrize(
    ("method", "chosen"),
    [
        (dps, Dps(0.05)),
        (psld, Psld(0.05, 0.01)),
        (resample, ReSample(gamma=4.0, pixel_rate=0.05, latent_rate=0.05, latent_steps=60, last_steps=200)),
    ],
)
def test_methods_move_to_the_posterior(problem, method, chosen) -> None:
    prior, f, noise, y = problem
    schedule = Schedule(ABAR, 200)
    found = method(prior, f, noise, schedule, chosen).reshape(64, 4)
    mean, covariance = posterior(prior.w, y)
    spread = np.sqrt(np.diag(prior.w @ prior.w.T))
    assert np.abs(found[:, :2] - y).max() < 6 * SIGMA  # the prior's deviation is 10 times SIGMA
    assert (np.abs(found.mean(0) - mean) < 0.4 * spread).all()  # what was not seen follows from what was
    assert found[:, 2:].std(0).min() > 0.3 * np.sqrt(np.diag(covariance))[2:].min()  # and stays open
    assert prior.counts["denoiser"] == 64 * 199


def test_without_a_measurement_dps_draws_from_the_prior(problem) -> None:
    prior, f, _, _ = problem
    noise = Noise(5, tuple((0, p) for p in range(2000)), SHAPE)
    found = dps(prior, f, noise, Schedule(ABAR, 500), Dps(0.0)).reshape(2000, 4)
    np.testing.assert_allclose(np.cov(found.T), prior.w @ prior.w.T, atol=0.15)


def test_a_fit_stops_at_the_noise() -> None:
    target = np.zeros((2, 1, 1, 1))
    loss = lambda v: (np.square(v - target).sum((1, 2, 3)), v - target)  # noqa: E731
    found = fit(loss, np.array([1.0, 0.05]).reshape(2, 1, 1, 1), 0.05, 500, enough=0.01)
    assert 0.0025 < found[0, 0, 0, 0] <= 0.1 and found[1, 0, 0, 0] == 0.05


class Watched:
    """Networks that do nothing but note the timesteps."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def denoise(self, z_t: Array, t: int) -> Array:
        self.seen.append(t)
        return z_t

    def decode(self, z: Array) -> Array:
        return z

    def decode_pull(self, z: Array, cotangent: Array) -> Array:
        return cotangent

    def features(self, image: Array) -> Array:
        return image

    def features_pull(self, image: Array, cotangent: Array) -> Array:
        return cotangent

    def data_gradient(self, x: Array) -> Array:
        return x


@pytest.mark.parametrize("steps", [2, 50, 100, 999])
def test_all_methods_visit_the_engines_timesteps(steps: int) -> None:
    net = Watched()
    algorithm.rlsd(net, ABAR, 4, 4, 1, Params(steps=steps), 0, 0, 1, "latent")
    assert Schedule(ABAR, steps).timesteps()[:-1] == net.seen


def test_ddim_goes_back_along_exact_noise() -> None:
    schedule, z0 = Schedule(ABAR, 20), np.full((1, *SHAPE), 0.7)
    eps = np.ones_like(z0)
    for k in range(19):
        now = schedule.level(k + 1)
        np.testing.assert_allclose(schedule.step(z0, eps, k, 0.0, eps), np.sqrt(now) * z0 + np.sqrt(1 - now) * eps)


def test_reference_posterior_is_bayes_rule() -> None:
    generator = np.random.default_rng(0)
    images, y, sigma = generator.standard_normal((7, 3)), generator.standard_normal(3), 0.4
    known = reference.Posterior(images, np.array([0, 2, 3]), sigma, np.square(images).sum(1))
    padded = np.array([y[0], 99.0, y[1], y[2]])
    likelihood = np.exp(-np.square(images - y).sum(1) / (2 * sigma**2))
    np.testing.assert_allclose(known.weights(padded), likelihood / likelihood.sum(), rtol=1e-12)
    likelihood[4] = 0
    np.testing.assert_allclose(known.weights(padded, without=4), likelihood / likelihood.sum(), rtol=1e-12)


def test_distances_of_distributions() -> None:
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.5, 0.5])
    assert reference.total_variation(p, q) == 0.5 and reference.total_variation(p, p) == 0
    assert reference.perplexity(p) == pytest.approx(2) and reference.effective(p) == pytest.approx(2)
    assert reference.expected_modes(p, 2) == pytest.approx(1.5)
    assert reference.expected_variation(np.array([1.0, 0, 0]), 4, 0) == 0
    # two draws of two equal classes: apart with probability 1/2, else both alike
    assert reference.expected_variation(p, 2, 0, 20_000) == pytest.approx(0.25, abs=0.01)


def test_fewer_repeats_alone_bring_a_histogram_nearer() -> None:
    """What findings.md says of TV: draws that repel each other are nearer to a posterior which their sampler misses."""
    generator, distances = np.random.default_rng(0), {"independent": [], "stratified": []}
    for _ in range(2000):
        posterior, off = generator.dirichlet(np.full(10, 0.5), 2)
        sampler = (0.6 * posterior + 0.4 * off).cumsum()
        places = {"independent": generator.random(8), "stratified": (np.arange(8) + generator.random()) / 8}
        for name, at in places.items():
            share = np.bincount(np.searchsorted(sampler, at).clip(max=9), minlength=10) / 8
            distances[name].append(reference.total_variation(share, posterior))
    assert np.mean(distances["independent"]) == pytest.approx(0.42, abs=0.005)
    assert np.mean(distances["stratified"]) == pytest.approx(0.32, abs=0.005)


def test_intervals_cover_the_mean() -> None:
    generator, covered = np.random.default_rng(1), 0
    for key in range(200):
        mean, low, high = figures.interval(generator.exponential(1, 60).tolist(), key)
        assert low <= mean <= high
        covered += low <= 1 <= high
    assert 0.88 <= covered / 200 <= 0.99
    assert figures.ratio([2, 4, 6], [1, 2, 3]) == (2, 2, 2)


def test_what_phase_retrieval_cannot_tell_is_moved_back() -> None:
    generator = np.random.default_rng(4)
    truth = np.full((1, 8, 8), -0.9)
    truth[:, 2:5, 1:6] = generator.uniform(-0.9, 0.9, (1, 3, 5))
    noisy = truth + generator.normal(0, 0.02, truth.shape)
    there, moved = figures.aligned(noisy, truth)
    assert not moved and there == pytest.approx(10 * np.log10(4 / 0.02**2), abs=1)
    for moved in (noisy[:, ::-1, ::-1], np.roll(noisy, (3, -1), (1, 2)), np.roll(noisy[:, ::-1, ::-1], 2, 1)):
        assert figures.aligned(moved, truth) == (pytest.approx(there), True)
    assert figures.aligned(np.roll(noisy, (1, -1), (1, 2)), truth) == (pytest.approx(there), False)  # a pixel is none
    assert figures.aligned(noisy[:, ::-1], truth)[0] < there - 10  # a mirror image is another image


def test_methods_without_repulsion_differ_in_nothing_else(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(settings, "CHOSEN", tmp_path / "chosen.json")
    table = {"half": {"rlsd": {"gamma": 5.0, "lr_z": 0.3}, "nonaug": {"gamma": 2.0, "variant": "rlsd-nonaug"}}}
    settings.CHOSEN.write_text(json.dumps(table))
    setup = settings.Setup(0.05, 4, 30)
    for method, bare in (("rlsd", "nonrepuls"), ("nonaug", "red-diff")):
        with_it, without = (settings.settings_of("half", name, setup) for name in (method, bare))
        assert with_it.gamma > 0 and replace(with_it, gamma=0.0) == without and without.steps == 30
    with pytest.raises(ValueError, match="dps was not tuned for half"):
        settings.settings_of("half", "dps", setup)


def test_rlsd_has_been_tuned_for_every_task() -> None:
    for task, setup in settings.SETUPS.items():
        for method in settings.METHODS[:4]:
            assert settings.settings_of(task, method, setup).steps == setup.steps


def test_the_rule_of_tuning() -> None:
    def line(psnr: float, best: float, residual: float, deviation: float = 0, variation: float = 1) -> dict:
        return {"psnr": psnr, "psnr_best": best, "residual": residual, "deviation": deviation, "variation": variation}

    lines = [line(20, 21, 1), line(22, 22, 9), line(19, 25, 2, variation=0.2)]
    assert tune.choose("half", lines) is lines[0]  # the better one does not fit the data
    assert tune.choose("phase-retrieval", lines) is lines[2]
    assert tune.choose("small-visible", lines) is lines[2]
    assert tune.choose("half", lines[1:2]) is lines[1]
    repelled = [line(20, 20.9, 1, 0.1), line(20, 20.85, 1, 0.3), line(20, 19, 1, 0.9)]
    assert tune.choose_repulsion("half", lines[0], repelled) is repelled[1]
    assert tune.choose_repulsion("half", lines[0], repelled[2:]) is lines[0]


def an_item(index: int) -> Item:
    x = np.full((1, 32, 32), -0.5, np.float32)
    return Item(index, x, 3, x, {"mask": np.ones((1, 32, 32), np.float32)})


def test_what_is_drawn_is_kept_whole(tmp_path) -> None:
    setup = settings.Setup(0.1, 2, 10)
    shard = sample.Work("half", "dps", setup, [an_item(4), an_item(9)], tmp_path, tmp_path / "a" / "0000-0002.npz")
    drawn = sample.Drawn(np.zeros((2, 2, 1, 32, 32), np.float32), 1.5, {"denoiser": 36})
    sample.store(shard, drawn)
    again = sample.stored(shard)
    assert (again.seconds, again.counts) == (1.5, {"denoiser": 36}) and again.particles.shape == (2, 2, 1, 32, 32)
    assert [path.name for path in shard.out.parent.iterdir()] == [shard.out.name]
    with pytest.raises(ValueError, match="other items"):
        sample.stored(replace(shard, items=[an_item(4), an_item(8)]))
    sample.draw_all([shard], 1)  # nothing is missing: no process is started, which would fail on the empty prior


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    chosen = Chosen([an_item(i) for i in range(3)], 7, np.full((3, 10), 0.1), np.full(3, 12.0))

    def rows(modes: float) -> report.Rows:
        row = {"modes": modes, "residual": 1.0, "variation": 0.5, "psnr": 20.0, "psnr_best": 21 + modes}
        row |= {"psnr_best_fit": 20.5}
        return report.Rows([row] * 3, np.zeros((3, 8, 1, 32, 32)), 3.0, {"denoiser": 24 * 99})

    results = {("small-visible", "rlsd"): rows(6), ("small-visible", "nonrepuls"): rows(4)}
    lines = [
        {"task": "small-visible", "method": method, "images": 3, "figures": figures.means(found.items),
         "evaluations": {"denoiser": 99.0}, "seconds_a_particle": 0.125}
        for (_, method), found in results.items()
    ]  # fmt: skip
    text = report.write(
        tmp_path, lines, results, {"small-visible": chosen}, 0.923, Frame((1, 32, 32), (2, 2, 2, 2))
    ).read_text()
    figures_of_pair = "| 3 | 1.50 (1.50 to 1.50) | 1.000 (1.000 to 1.000) | 2.00 (2.00 to 2.00) |"
    assert f"| small-visible | RLSD; NonRepuls-RLSD (gamma = 0) {figures_of_pair}" in text
    assert text.count("| small-visible | RLSD; ") == 1  # nothing else was drawn
    assert "; latent DPS (every task)" in text and "RLSD (half, sr4," in text
    assert "92.3 % right" in text and "3 of the first 7 images are open" in text
    assert "| NonRepuls-RLSD (gamma = 0) | 12 | 3 | 20.00 +-0.00 |" in text and "| 99 (0), 0 (0) | 125 |" in text
    assert (tmp_path / "docs/quality/small-visible.png").stat().st_size > 500


def test_test_images_come_in_a_fixed_order() -> None:
    order = items.order()
    assert sorted(order.tolist()) == list(range(10_000)) and order[:3].tolist() != [0, 1, 2]
    np.testing.assert_array_equal(order, items.order())


def test_tries_that_are_known(monkeypatch, tmp_path) -> None:
    setup = settings.SETUPS["half"]
    bench = tune.Bench.__new__(tune.Bench)
    bench.task, bench.setup, bench.pairs = "half", setup, [(an_item(1), None)] * 2
    line = {"task": "half", "method": "dps", "images": 2, **asdict(setup), "psnr": 20.0}
    told = [
        line | {"settings": {"zeta": z}} | more
        for z, more in ((1.0, {}), (2.0, {"images": 4}), (4.0, {"chosen": True}))
    ]
    monkeypatch.setattr(tune.measure, "RESULTS", tmp_path)
    (tmp_path / "quality-tune.jsonl").write_text("".join(json.dumps(each) + "\n" for each in told))
    assert set(bench.recorded("dps")) == {Dps(1.0), Dps(4.0)} and "chosen" not in bench.recorded("dps")[Dps(4.0)]
    assert not bench.recorded("psld")
