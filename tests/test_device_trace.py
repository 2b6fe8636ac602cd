"""The trace on CUDA, over the stand-in for the driver: the reference's numbers, brought back in the tick's one wait."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("onnx")
from device_case import NETS, PARAMS, bundle_fixture, fake_fixture, jobs_of_all_kinds  # noqa: F401
from test_device import OnDevice
from tiny import make_job
from traced import wanted_trace

from rlsd.engine import Engine, Params, RlsdError, native

TOLERANCE = 2e-2  # of squares of values in halves


@pytest.mark.parametrize("repulsion", ["features", "latent"])
@pytest.mark.parametrize("variant", ["rlsd", "rlsd-nonaug"])
def test_agrees_with_the_reference(fake, bundle, variant, repulsion):
    params = Params(variant=variant, repulsion=repulsion, gamma=3.0, **PARAMS)
    job = make_job(NETS, "saturate", particles=3, seed=2**40 + 3, item=7, params=params)
    with Engine(bundle) as engine:
        (plain,) = engine.reconstruct([job])
        (result,) = engine.reconstruct([replace(job, trace=True)])
    assert result.particles.tobytes() == plain.particles.tobytes()
    wanted = wanted_trace(NETS, job)
    assert np.isnan(wanted).any() and result.trace is not None
    np.testing.assert_allclose(result.trace, wanted, rtol=TOLERANCE, atol=1e-3 * np.nanmax(wanted[..., 0]))


def test_one_wait_a_tick_and_no_memory(fake, bundle):
    job = make_job(NETS, particles=4, params=Params(gamma=2.0, **PARAMS), trace=True)
    with Engine(bundle) as engine:
        engine.submit(job)
        engine.tick()
        engine.tick()
        fake.clear_log()
        engine.tick()
        log = fake.log()
        engine.cancel()
    assert sum(line.startswith("cuStreamSynchronize") for line in log) == 1
    assert not [line for line in log if line.startswith(("cuMemAlloc", "cuMemFree", "cuMemHostAlloc"))]


def test_company_and_jobs_without_a_trace(fake, bundle):
    jobs = [replace(job, trace=i != 2) for i, job in enumerate(jobs_of_all_kinds())]
    with Engine(bundle, max_particles=5) as engine:
        alone = [engine.reconstruct([job])[0] for job in jobs]
        together = engine.reconstruct(jobs)
    for one, other in zip(alone, together, strict=True):
        assert one.particles.tobytes() == other.particles.tobytes()
        assert (None if one.trace is None else one.trace.tobytes()) == (
            None if other.trace is None else other.trace.tobytes()
        )


def test_memory_of_the_device_is_refused(fake, bundle):
    library = native.library()
    taken = library.rlsd_submit

    def submit(engine, params, request, pointer):
        request.out_trace, request.out_trace_count = trace.pointer, 60
        return taken(engine, params, request, pointer)

    with Engine(bundle) as engine, fake.context(), pytest.MonkeyPatch.context() as patch:
        trace = OnDevice(fake, np.zeros((5, 4, 3)))
        patch.setattr(library, "rlsd_submit", submit)
        with pytest.raises(RlsdError, match="out_trace is memory of a device, allowed is memory of the host"):
            engine.submit(make_job(NETS, particles=4, params=Params(**PARAMS), trace=True))
        trace.free()
