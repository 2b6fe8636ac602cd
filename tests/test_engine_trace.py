"""The trace of a job: as the reference has it, its own whatever it is packed with, and no change to the result."""

import ctypes
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("onnx")
from bundle_factory import write_bundle
from tiny import make_job, make_nets
from traced import wanted_trace

from rlsd.engine import Engine, Params, RlsdError, Status, native

NETS = make_nets()
PARAMS = {"steps": 21, "lr_x": 0.05, "lr_z": 0.05, "lambda_": 0.3, "repulsion_until": 0.6}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle", NETS, 1, 4)


@pytest.mark.parametrize("repulsion, gamma", [("auto", 0.0), ("features", 3.0), ("latent", 3.0)])
@pytest.mark.parametrize("variant", ["rlsd", "rlsd-nonaug"])
@pytest.mark.parametrize("operator", ["inpainting", "saturate"])
def test_agrees_with_the_reference(bundle, operator, variant, repulsion, gamma):
    params = Params(variant=variant, repulsion=repulsion, gamma=gamma, **PARAMS)
    job = make_job(NETS, operator, particles=5, seed=2**40 + 3, item=7, params=params)
    with Engine(bundle, threads=2) as engine:
        (plain,) = engine.reconstruct([job])
        (result,) = engine.reconstruct([replace(job, trace=True)])
    assert plain.trace is None and result.trace is not None
    assert result.particles.tobytes() == plain.particles.tobytes()
    wanted = wanted_trace(NETS, job)
    assert np.isnan(wanted[:, :, 1]).sum() == (5 * 20 if gamma == 0 else 5 * 8)
    np.testing.assert_allclose(result.trace, wanted, rtol=1e-4)


def test_few_particles_and_many(bundle):
    """Repulsion is computed for 16 of them at a time."""
    for particles in (1, 2, 40):
        job = make_job(NETS, particles=particles, params=Params(gamma=3.0, **PARAMS), trace=True)
        with Engine(bundle) as engine:
            (result,) = engine.reconstruct([job])
        assert result.trace is not None
        np.testing.assert_allclose(result.trace, wanted_trace(NETS, job), rtol=1e-4)


def test_a_buffer_of_before_gets_no_diversity(bundle):
    job = make_job(NETS, particles=3, params=Params(gamma=3.0, **PARAMS), trace=True)
    library, narrow = native.library(), np.zeros((20, 3, 2), np.float32)
    taken = library.rlsd_submit

    def submit(engine, params, request, pointer):
        request.out_trace, request.out_trace_count = narrow.ctypes.data, narrow.size
        return taken(engine, params, request, pointer)

    with Engine(bundle) as engine:
        (wanted,) = engine.reconstruct([job])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library, "rlsd_submit", submit)
            engine.reconstruct([job])
    np.testing.assert_array_equal(narrow, wanted.trace[..., :2])


def test_packing_changes_nothing(bundle):
    jobs = [
        make_job(NETS, particles=5, trace=True, params=Params(gamma=3.0, **PARAMS)),
        make_job(NETS, "saturate", particles=2, seed=1, params=Params(**PARAMS)),
        make_job(NETS, particles=4, item=3, trace=True, params=Params(variant="rlsd-nonaug", **PARAMS)),
        make_job(NETS, "saturate", particles=3, item=4, trace=True, params=Params(gamma=1.0, **{**PARAMS, "steps": 2})),
    ]
    with Engine(bundle, threads=1) as engine:
        alone = [engine.reconstruct([job])[0] for job in jobs]
    for options in ({"threads": 3}, {"threads": 2, "max_particles": 6}):
        with Engine(bundle, **options) as engine:
            together = engine.reconstruct(jobs)
        for one, other, job in zip(alone, together, jobs, strict=True):
            assert (one.trace is not None) == (other.trace is not None) == job.trace
            if one.trace is not None and other.trace is not None:
                assert one.trace.tobytes() == other.trace.tobytes()


def test_a_job_that_was_cancelled_has_zeros(bundle):
    with Engine(bundle) as engine:
        handle = engine.submit(make_job(NETS, trace=True, params=Params(gamma=3.0, **PARAMS)))
        engine.tick()
        engine.tick()
        assert handle._trace[0, :, 0].all()
        engine.cancel()
        with pytest.raises(RlsdError, match="cancelled"):
            engine.run()
        assert not handle._trace.any()


def test_callers_who_do_not_know_of_it(bundle):
    """A struct as it was before the trace, with whatever lies behind it in the caller's memory."""
    struct = native.RequestStruct()
    before = native.RequestStruct.out_trace.offset
    struct.out_trace, struct.out_trace_count = 1, 1
    native.check(native.library().rlsd_request_init(struct, before))
    assert (struct.size, struct.out_trace, struct.out_trace_count) == (before, 1, 1)
    job = make_job(NETS, particles=1)
    y, out = np.ascontiguousarray(job.y), np.zeros((1, 1, 4, 4), np.float32)
    mask = np.ascontiguousarray(job.operator_params["mask"])
    tensors = (native.TensorStruct * 1)(native.TensorStruct(b"mask", mask.ctypes.data, mask.size, 1))
    struct.op, struct.y, struct.y_count = b"inpainting", y.ctypes.data, y.size
    struct.params, struct.param_count = tensors, 1
    struct.out, struct.out_count = out.ctypes.data, out.size
    params, pointer = native.ParamsStruct(), ctypes.c_void_p()
    native.check(native.library().rlsd_params_init(params, ctypes.sizeof(params)))
    params.steps = 21
    with Engine(bundle) as engine:
        native.check(native.library().rlsd_submit(engine._pointer, params, struct, pointer))
        engine.run()
        native.library().rlsd_job_release(pointer)
        assert out.any()
        struct.size = ctypes.sizeof(struct)  # now it knows
        with pytest.raises(RlsdError, match="out_trace has 1 elements, 60 are needed") as raised:
            native.check(native.library().rlsd_submit(engine._pointer, params, struct, pointer))
        assert raised.value.status is Status.INVALID_ARGUMENT
