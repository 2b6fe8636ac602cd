"""Repulsion among many particles on CUDA: each size of crowd has kernels of its own."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
from bundle_factory import write_bundle
from device_case import NETS, PARAMS, TOLERANCE, difference, fake_fixture  # noqa: F401
from hosted import hosted_bundle
from tiny import make_job, reference
from traced import wanted_trace

from rlsd.engine import Engine, Params

SIZES = [5, 17, 65]


@pytest.fixture(name="bundle", scope="module")
def bundle_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a batch for each crowd: the interpreter takes its time for every lane."""
    folder = tmp_path_factory.mktemp("wide")
    return hosted_bundle(write_bundle(folder / "cpu", NETS, 1, *SIZES), folder / "cuda")


@pytest.mark.parametrize(
    "particles, repulsion, kernel",
    zip(SIZES, ("latent", "features", "latent"), ("repulsion_crowd_16", "repulsion_crowd_64", "repulsion_gradient")),
)
def test_a_crowd_of_any_size_agrees(fake, bundle, particles, repulsion, kernel):
    params = Params(gamma=5.0, repulsion=repulsion, **{**PARAMS, "steps": 2})
    job = make_job(NETS, particles=particles, params=params, trace=True)
    with Engine(bundle) as engine:
        (found,) = engine.reconstruct([job])
    assert difference(found.particles, reference(NETS, job)) < TOLERANCE
    np.testing.assert_allclose(found.trace, wanted_trace(NETS, job), rtol=2e-2)  # losses and bandwidths
    launched = {line.split()[1] for line in fake.log() if line.startswith("cuLaunchKernel repulsion_")}
    assert kernel in launched and len(launched) == (3 if particles > 64 else 2)


def test_kernels_know_what_is_padding_and_which_jobs_are_under_repulsion(fake, bundle, monkeypatch):
    """Two jobs that go through the kernels together; one is repelled in the first half of its steps."""
    seen = []

    def note(known, line, grid, values):
        if line.split()[1] == "repulsion_crowd_4":
            kinds = [word.split(":") for word in line.split() if ":" in word]
            given = {name: fake._argument(kind, raw) for (name, kind), raw in zip(kinds, values)}
            seen.append((given["D"], given["values"], given["steps"][:2].tolist()))

    monkeypatch.setattr(fake, "_run", note)
    with Engine(bundle) as engine:
        for particles, until in ((3, 1.0), (4, 0.5)):
            own = {"gamma": 5.0, "repulsion": "features", "repulsion_until": until, "steps": 5}
            params = Params(**{**PARAMS, **own})
            engine.submit(make_job(NETS, particles=particles, params=params))
        engine.run()
    idle, values = -(2**63), NETS.weights["F"].shape[1]
    assert values % 16 != 0 and seen == [(16, values, steps) for steps in ([0, 0], [1, 1], [2, idle], [3, idle])]


def test_a_crowd_whose_distances_do_not_fit_goes_strip_by_strip(fake, monkeypatch, tmp_path):
    """A strip that is not all of them has no tile to copy from the other side of the diagonal. No kernel runs here:
    that would take minutes."""
    bundle = hosted_bundle(write_bundle(tmp_path / "cpu", NETS, 1024), tmp_path / "cuda")
    strips = []

    def note(known, line, grid, values):
        if line.split()[1] == "repulsion_distances_16":
            names = [word.split(":")[0] for word in line.split() if ":" in word]
            given = dict(zip(names, values))
            strips.append([struct.unpack("<i4x", given[name])[0] for name in ("first", "rows", "mirror")])

    monkeypatch.setattr(fake, "_run", note)
    params = Params(gamma=5.0, repulsion="latent", **{**PARAMS, "steps": 2})
    with Engine(bundle) as engine:
        engine.reconstruct([make_job(NETS, particles=8300, params=params)])
    assert strips == [[0, 8064, 0], [8064, 8064, 0]]
