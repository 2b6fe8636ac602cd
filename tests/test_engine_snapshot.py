"""A job that goes on from its snapshot, and one measurement over several engines: the same bytes as in one go."""

import hashlib
from dataclasses import fields, replace

import numpy as np
import pytest

pytest.importorskip("onnx")
from bundle_factory import write_bundle
from corrupted_bundles import lines_of, seal
from snapshot_case import Exchange, bytes_of, interrupted, spread
from tiny import make_job, make_nets

from rlsd.engine import Engine, Job, Params, Result, RlsdError, Status

NETS = make_nets()
PARAMS = {"steps": 15, "lr_x": 0.05, "lr_z": 0.05, "lambda_": 0.3, "repulsion_until": 0.6}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle", NETS, 1, 4)


def jobs():
    latents_only = Params(variant="rlsd-nonaug", gamma=2.0, repulsion="latent", **PARAMS)
    return [
        make_job(NETS, particles=5, trace=True, params=Params(gamma=3.0, **PARAMS)),
        make_job(NETS, "saturate", particles=2, seed=1, params=Params(**PARAMS)),
        make_job(NETS, particles=3, item=3, params=latents_only),
        make_job(NETS, "saturate", particles=3, item=4, trace=True, params=Params(**{**PARAMS, "steps": 2})),
    ]


@pytest.mark.parametrize("ticks", [1, 4])
@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 2, "max_particles": 6}], ids=["all", "queued"])
def test_interrupted_jobs_end_with_the_same_bytes(bundle, ticks, options):
    with Engine(bundle) as engine:
        wanted = [bytes_of(result) for result in engine.reconstruct(jobs())]
    assert interrupted(bundle, jobs(), ticks, **options) == wanted


def test_a_snapshot_disturbs_nothing_and_a_queued_job_has_one(bundle):
    with Engine(bundle, max_particles=5) as engine:
        handles = [engine.submit(job) for job in jobs()[:2]]
        queued = handles[1].snapshot()
        for _ in range(3):
            engine.tick()
            assert handles[0].snapshot() == handles[0].snapshot()
        engine.run()
        found = [bytes_of(handle.result()) for handle in handles]
        assert found == [bytes_of(result) for result in engine.reconstruct(jobs()[:2])]
        assert bytes_of(engine.reconstruct([replace(jobs()[1], snapshot=queued)])[0]) == found[1]
        with pytest.raises(RlsdError, match="the job is done"):
            handles[0].snapshot()


def snapshot_after(bundle, job, ticks):
    with Engine(bundle) as engine:
        handle = engine.submit(job)
        for _ in range(ticks):
            engine.tick()
        return handle.snapshot()


def refused(bundle, job: Job) -> str:
    with Engine(bundle) as engine, pytest.raises(RlsdError) as error:
        engine.submit(job)
    assert error.value.status is Status.INVALID_ARGUMENT
    return str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 9}, {"item": 9}, {"particles": 4}, {"params": Params(gamma=3.1, **PARAMS)}, {"first_particle": 1},
        {"y": np.zeros((1, 4, 4), np.float32)}, {"operator_params": {"mask": np.ones((1, 4, 4), np.float32)}},
        {"params": Params(gamma=3.0, variant="rlsd-nonaug", **PARAMS)}, {"context": np.ones((2, 3), np.float32)},
        {"gather": print, "all_particles": 9},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_snapshot_of_another_job_is_refused(bundle, change):
    job = jobs()[0]
    snapshot = snapshot_after(bundle, job, 2)
    assert "another bundle, request or parameters" in refused(bundle, replace(job, **change, snapshot=snapshot))


def test_a_snapshot_of_other_parameters_is_refused(bundle):
    """Each of them: none is without influence on the result."""
    context = np.ones((2, 3), np.float32)
    params = Params(gamma=3.0, guidance=2.0, **PARAMS)
    job = make_job(NETS, particles=2, context=context, params=params)
    snapshot = snapshot_after(bundle, job, 2)
    words = {"variant": "rlsd-nonaug", "repulsion": "latent", "steps": 16}
    for field in fields(Params):
        other = words[field.name] if field.name in words else 0.9 * getattr(params, field.name)
        changed = replace(job, params=replace(params, **{field.name: other}), snapshot=snapshot)
        assert "another bundle, request or parameters" in refused(bundle, changed), field.name


def test_a_snapshot_of_another_bundle_is_refused(bundle, tmp_path):
    other = write_bundle(tmp_path / "other", make_nets(seed=1), 1, 4)
    snapshot = snapshot_after(other, jobs()[0], 2)
    assert "another bundle" in refused(bundle, replace(jobs()[0], snapshot=snapshot))


def test_damaged_snapshots_are_refused(bundle):
    job = jobs()[0]
    snapshot = snapshot_after(bundle, job, 2)
    rng = np.random.default_rng(0)
    for position in [0, 8, 12, 16, 24, 25, 40, len(snapshot) - 1, *rng.integers(0, len(snapshot), 20)]:
        damaged = bytearray(snapshot)
        damaged[position] ^= 1 << int(rng.integers(8))
        refused(bundle, replace(job, snapshot=bytes(damaged)))
    for length in [0, 1, 95, 96, 160, len(snapshot) - 1]:
        refused(bundle, replace(job, snapshot=snapshot[:length]))
    refused(bundle, replace(job, snapshot=snapshot + b"\0"))


def forged(body: bytes) -> bytes:
    """A snapshot whose checksum was made to fit."""
    return body + hashlib.sha256(body).hexdigest().encode()


@pytest.mark.parametrize("step", [-1, 15])
def test_a_snapshot_with_a_step_that_the_job_does_not_have(bundle, step):
    """There is no timestep for it."""
    body = snapshot_after(bundle, jobs()[0], 2)[:-64]
    body = body[:12] + step.to_bytes(4, "little", signed=True) + body[16:]
    assert f"step {step}, which do not fit the job" in refused(bundle, replace(jobs()[0], snapshot=forged(body)))


def test_a_snapshot_of_another_format_or_size(bundle):
    """What its head says of its length has to be so: it is copied from there."""
    body = snapshot_after(bundle, jobs()[0], 2)[:-64]
    for at, value, words in (
        (0, b"x", "not one of this library"),
        (8, b"\2", "has format 2, allowed is 1"),
        (24, b"\0", "do not fit the job"),  # neither particles
        (25, b"\0", "do not fit the job"),  # nor a trace
    ):
        other = body[:at] + value + body[at + 1 :]
        assert words in refused(bundle, replace(jobs()[0], snapshot=forged(other))), words
    for other in (body[:-4], body + bytes(4), body[:96]):
        assert "do not fit the job" in refused(bundle, replace(jobs()[0], snapshot=forged(other)))
    assert "at least 160 are needed" in refused(bundle, replace(jobs()[0], snapshot=body[:159]))
    without = snapshot_after(bundle, replace(jobs()[0], trace=False), 2)[:-64]
    short = without[:25] + b"\1" + without[26:]
    assert "do not fit the job" in refused(bundle, replace(jobs()[0], snapshot=forged(short)))


def test_a_snapshot_of_another_operator_is_refused(tmp_path):
    """One with the same shapes and the same measurement."""
    path = write_bundle(tmp_path / "bundle", NETS, 1)
    same = [line.replace("inpainting", "painting", 1) for line in lines_of(path) if "inpainting" in line]
    seal(path, [*lines_of(path), *same])
    job = jobs()[0]
    snapshot = snapshot_after(path, job, 2)
    assert "another bundle, request" in refused(path, replace(job, operator="painting", snapshot=snapshot))


def test_a_trace_needs_a_snapshot_with_one(bundle):
    job = replace(jobs()[0], trace=False)
    snapshot = snapshot_after(bundle, job, 2)
    assert "no trace" in refused(bundle, replace(job, trace=True, snapshot=snapshot))
    with_trace = snapshot_after(bundle, replace(job, trace=True), 2)
    unbegun = snapshot_after(bundle, job, 0)
    with Engine(bundle) as engine:
        found, wanted = engine.reconstruct([replace(job, snapshot=with_trace), job])
        traced, again = engine.reconstruct([replace(job, trace=True), replace(job, trace=True, snapshot=unbegun)])
    assert bytes_of(found) == bytes_of(wanted)
    assert bytes_of(again) == bytes_of(traced)


# ------------------------------------------------------------ several engines


@pytest.mark.parametrize("shares", [(3, 3), (5, 1), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("repulsion, variant", [("features", "rlsd"), ("latent", "rlsd"), ("features", "rlsd-nonaug")])
def test_spread_over_engines(bundle, shares, repulsion, variant):
    job = make_job(
        NETS, particles=6, item=5, trace=True, params=Params(variant=variant, gamma=3.0, repulsion=repulsion, **PARAMS)
    )
    with Engine(bundle) as engine:
        (wanted,) = engine.reconstruct([job])
    exchange = Exchange(shares)
    found = spread(bundle, job, shares, exchange, threads=1)
    assert exchange.calls == 9  # of 14 steps, repulsion_until = 0.6
    parts = [each for each in found if isinstance(each, Result)]
    assert len(parts) == len(shares), found
    assert np.concatenate([each.particles for each in parts]).tobytes() == wanted.particles.tobytes()
    assert np.concatenate([each.latents for each in parts]).tobytes() == wanted.latents.tobytes()
    traces = np.concatenate([each.trace for each in parts if each.trace is not None], axis=1)
    assert wanted.trace is not None and traces[..., :2].tobytes() == wanted.trace[..., :2].tobytes()
    alone = np.repeat([size == 1 for size in shares], shares)  # diversity is that among a share's own particles
    assert np.isnan(traces[:, alone, 2]).all() and (traces[:, ~alone, 2] > 0).all()


def test_particles_further_on_without_a_gather(bundle):
    job = make_job(NETS, particles=6, params=Params(**PARAMS))
    with Engine(bundle) as engine:
        whole, part = engine.reconstruct([job, replace(job, particles=2, first_particle=3)])
    assert part.particles.tobytes() == whole.particles[3:5].tobytes()


def test_a_gather_that_fails_ends_the_job(bundle):
    job = make_job(NETS, particles=4, params=Params(gamma=3.0, **PARAMS))
    found = spread(bundle, job, (2, 2), Exchange((2, 2), lost=3), threads=1)
    assert all(isinstance(each, ConnectionError) for each in found), found

    def fails(rows, first, count):
        rows[first + count :] = np.nan  # what came of it is no reason of its own
        raise ConnectionError("gone")

    with Engine(bundle) as engine:
        handle = engine.submit(replace(job, all_particles=5, gather=fails))
        with pytest.raises(ConnectionError):
            engine.tick()
        with pytest.raises(RlsdError, match="item 0: the gather of other processes' particles failed at step 0 of 14"):
            handle.result()


def test_numbers_of_others_that_are_not_finite(bundle):
    def spoilt(rows, first, count):
        rows[first + count :] = np.nan

    job = make_job(NETS, particles=4, all_particles=6, gather=spoilt, params=Params(gamma=3.0, **PARAMS))
    with Engine(bundle) as engine, pytest.raises(RlsdError, match="particles of another process are NaN") as error:
        engine.reconstruct([job])
    assert error.value.status is Status.NON_FINITE


def test_particles_that_are_not_finite_are_shown_to_nobody(tmp_path):
    """The job ends before it asks for theirs."""
    nets, asked = make_nets(), []
    nets.weights["b2"][:] = np.nan
    job = make_job(NETS, particles=2, all_particles=3, params=Params(gamma=3.0, **PARAMS))
    job = replace(job, gather=lambda rows, first, count: asked.append(first))
    bundle = write_bundle(tmp_path / "bundle", nets, 2)
    with Engine(bundle) as engine, pytest.raises(RlsdError, match=r"particle 0: the state became NaN .* at step 0"):
        engine.reconstruct([job])
    assert asked == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"first_particle": -1}, "first_particle is -1, allowed is 0 to"),
        ({"all_particles": -1}, "all_particles is -1, allowed is 0 to"),
        ({"all_particles": 9}, "all_particles is 9, which needs a gather"),
        ({"all_particles": 5, "first_particle": 2, "gather": print}, "all_particles is 5, allowed is 6"),
    ],
)
def test_impossible_shares(bundle, change, message):
    assert message in refused(bundle, make_job(NETS, particles=4, params=Params(**PARAMS), **change))
