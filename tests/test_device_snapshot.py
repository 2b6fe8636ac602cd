"""Snapshots and gathered jobs on CUDA, over the stand-in for the driver."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("onnx")
from bundle_factory import write_bundle
from device_case import NETS, PARAMS, bundle_fixture, fake_fixture, jobs_of_all_kinds  # noqa: F401
from hosted import hosted_bundle
from snapshot_case import bytes_of, host_view, interrupted
from tiny import make_job

from rlsd.engine import Engine, Params


def test_interrupted_jobs_end_with_the_same_bytes(fake, bundle):
    jobs = [replace(job, trace=i == 0) for i, job in enumerate(jobs_of_all_kinds())]
    with Engine(bundle) as engine:
        wanted = [bytes_of(result) for result in engine.reconstruct(jobs)]
    assert interrupted(bundle, jobs, 2) == wanted


def test_lowered_cotangents_stay_so(fake, tmp_path):
    """What overflowed is not tried again by the engine that goes on: a job may do but few steps again."""
    loud = hosted_bundle(write_bundle(tmp_path / "cpu", NETS, 4), tmp_path / "cuda", scales=(2.0**17, 8.0))
    job = make_job(NETS, particles=3, params=Params(**PARAMS))
    with Engine(loud) as engine:
        handle = engine.submit(job)
        for _ in range(3):
            engine.tick()
        assert engine.stats()["redone"] > 0
        snapshot = handle.snapshot()
        engine.run()
        wanted = bytes_of(handle.result())
    with Engine(loud) as engine:
        (found,) = engine.reconstruct([replace(job, snapshot=snapshot)])
        assert engine.stats()["redone"] == 0 and bytes_of(found) == wanted


@pytest.mark.parametrize("repulsion", ["features", "latent"])
def test_one_share_of_a_job(fake, bundle, repulsion):
    job = make_job(NETS, particles=5, params=Params(gamma=2.0, repulsion=repulsion, **PARAMS))
    seen: list[np.ndarray] = []

    def watch(rows, first, count):
        assert (first, count) == (0, 5)
        seen.append(host_view(rows).copy())

    with Engine(bundle) as engine:
        (wanted,) = engine.reconstruct([job])
        (alone,) = engine.reconstruct([replace(job, all_particles=5, gather=watch)])
        assert bytes_of(alone) == bytes_of(wanted) and len(seen) == 4
        steps = iter(seen)

        def replay(rows, first, count):
            mine, all_rows = host_view(rows), next(steps)
            assert mine[first : first + count].tobytes() == all_rows[first : first + count].tobytes()
            mine[:] = all_rows

        part = replace(job, particles=2, first_particle=3, all_particles=5, gather=replay)
        (found,) = engine.reconstruct([part])
    assert found.particles.tobytes() == wanted.particles[3:].tobytes()
