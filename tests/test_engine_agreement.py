"""The native engine against engine/reference.py on tiny networks: 50 steps, every variant, operator and repulsion."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("onnx")
from bundle_factory import write_bundle
from tiny import CONTEXT, OPERATORS, make_job, make_nets, reference

from rlsd.engine import Engine, Params

NETS = make_nets()
PARAMS = {"steps": 51, "lr_x": 0.08, "lr_z": 0.05, "lambda_": 0.3, "repulsion_until": 0.8}


@pytest.fixture(scope="module", params=[1, 3], ids=["B=1", "B=3"])
def engine(request, tmp_path_factory):
    with Engine(write_bundle(tmp_path_factory.mktemp("tiny") / "bundle", NETS, request.param), threads=2) as engine:
        yield engine


def difference(engine, job, with_features=True):
    """Largest difference to the reference, relative to its largest entry."""
    (result,) = engine.reconstruct([job])
    wanted = reference(NETS, job, with_features)
    return np.abs(result.particles - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("repulsion, gamma", [("auto", 0.0), ("features", 3.0), ("latent", 3.0)])
@pytest.mark.parametrize("variant", ["rlsd", "rlsd-nonaug"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_agreement(engine, operator, variant, repulsion, gamma):
    params = Params(variant=variant, repulsion=repulsion, gamma=gamma, **PARAMS)
    assert difference(engine, make_job(NETS, operator, particles=5, seed=2**40 + 3, item=7, params=params)) < 1e-5


@pytest.mark.parametrize("particles", [1, 2, 3])
def test_few_particles(engine, particles):
    job = make_job(NETS, particles=particles, params=Params(gamma=5.0, **PARAMS))
    assert difference(engine, job) < 1e-5


def test_repulsion_changes_the_particles_and_one_particle_has_none(engine):
    def particles(count, gamma):
        job = make_job(NETS, particles=count, params=Params(gamma=gamma, **PARAMS))
        return engine.reconstruct([job])[0].particles

    assert np.abs(particles(2, 5.0) - particles(2, 0.0)).max() > 1e-3
    assert particles(1, 5.0).tobytes() == particles(1, 0.0).tobytes()


@pytest.mark.parametrize("guidance", [1.0, 0.0, 2.5])
def test_guidance(engine, guidance):
    context = np.random.default_rng(1).standard_normal(CONTEXT).astype(np.float32)
    job = make_job(NETS, particles=2, context=context, params=Params(guidance=guidance, **PARAMS))
    before = engine.stats()
    assert difference(engine, job) < 1e-5
    runs = engine.stats()["denoiser_runs"] - before["denoiser_runs"]
    assert runs == 2 * 50 * (1 if guidance == 1 else 2)


def test_runs_are_counted_for_particles_that_step(engine):
    """Two jobs in one batch, where the shorter one's last decoding is beside a step of the other."""
    context = np.zeros(CONTEXT, np.float32)
    lengths = [Params(guidance=2.0, **{**PARAMS, "steps": steps}) for steps in (4, 9)]
    before = engine.stats()
    engine.reconstruct([make_job(NETS, particles=1, context=context, params=params) for params in lengths])
    spent = {name: value - before[name] for name, value in engine.stats().items()}
    assert (spent["denoiser_runs"], spent["decoder_runs"], spent["decoder_pull_runs"]) == (2 * 11, 13, 11)


def test_parameters_reach_the_operator_by_name(tmp_path, monkeypatch):
    """Of two parameters of one shape the operator uses the second."""
    monkeypatch.setitem(OPERATORS, "saturate", (OPERATORS["saturate"][0], {"spare": (1,), "gain": (1,)}))
    job = make_job(NETS, "saturate", particles=2, params=Params(**PARAMS))
    job = replace(job, operator_params={**job.operator_params, "spare": np.array([7], np.float32)})
    with Engine(write_bundle(tmp_path / "bundle", NETS)) as engine:
        assert difference(engine, job) < 1e-5


@pytest.mark.parametrize("steps", [2, 3, 120])
def test_the_ends_of_the_range_of_steps(engine, steps):
    job = make_job(NETS, particles=2, params=Params(steps=steps, gamma=2.0, lr_x=0.05, lr_z=0.05))
    assert difference(engine, job) < 1e-4


def test_automatic_repulsion_without_an_extractor_is_latent(tmp_path):
    job = make_job(NETS, particles=4, params=Params(gamma=3.0, **PARAMS))
    with Engine(write_bundle(tmp_path / "bundle", NETS, with_features=False)) as engine:
        assert engine.feature_dim is None
        assert difference(engine, job, with_features=False) < 1e-5


def test_one_decoder_run_and_one_pull_for_a_particle_and_step(engine):
    before = engine.stats()
    (result,) = engine.reconstruct([make_job(NETS, particles=4, params=Params(gamma=3.0, **PARAMS))])
    spent = {name: value - before[name] for name, value in engine.stats().items()}
    assert spent["denoiser_runs"] == spent["decoder_pull_runs"] == spent["particle_steps"] == 4 * 50
    assert spent["decoder_runs"] == 4 * 51
    assert spent["ticks"] == 51
    assert all(spent[name] > 0 for name in ("denoiser", "decoder", "decoder_pull", "features", "operators", "wall"))
    assert 0 < result.seconds < 60


def test_the_final_latents_decode_to_the_result_without_augmentation(engine):
    job = make_job(NETS, particles=3, params=Params(variant="rlsd-nonaug", **PARAMS))
    (result,) = engine.reconstruct([job])
    image = engine.evaluate("decoder", ["image"], z=result.latents)["image"]
    np.testing.assert_array_equal(image, result.particles)
