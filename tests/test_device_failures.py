"""The engine on CUDA when things go wrong: memory, any call of the driver, halves that overflow, wrong devices."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

pytest.importorskip("onnx")
from bundle_factory import write_bundle
from device_case import NETS, PARAMS, TOLERANCE, bundle_fixture, difference, fake_fixture, jobs_of_all_kinds  # noqa: F401
from hosted import hosted_bundle
from tiny import make_job, make_nets, reference

from rlsd.engine import Engine, Params, RlsdError


def test_memory_that_is_short_makes_batches_smaller(fake, bundle):
    job = make_job(NETS, particles=4, params=Params(**PARAMS))
    with Engine(bundle) as engine:
        (wanted,) = engine.reconstruct([job])
        most = fake.count("cuLaunchHostFunc")
    with Engine(bundle) as engine:  # the first seat, of 4 lanes, does not fit
        fake.fail("cuMemAlloc_v2", allocations_before_the_seat(fake, engine, job) + 3, 2)
        (found,) = engine.reconstruct([job])
        assert fake.count("cuLaunchHostFunc") > 2 * most
    assert found.particles.tobytes() == wanted.particles.tobytes()


def allocations_before_the_seat(fake, engine, job) -> int:
    """State and its backup, the job's inputs, the repulsion's arrays: what comes before any seat."""
    return 12 + 1 + 2 + len(job.operator_params)


def test_too_little_memory_for_anything_is_an_error(fake, bundle):
    with Engine(bundle) as engine:
        for n in range(400):
            fake.fail("cuMemAlloc_v2", 1 + n, 2)
        handle = engine.submit(make_job(NETS, particles=2, params=Params(**PARAMS)))
        with pytest.raises(RlsdError, match=r"cannot allocate .* bytes on the device"):
            engine.run()
        assert handle.info().status == 5 and not handle._particles.any()
        fake.reset()
        fake.run_kernels()


CALLS = [
    "cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain",
    "cuCtxSetCurrent", "cuMemAlloc_v2", "cuMemHostAlloc", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2", "cuMemsetD8Async", "cuStreamCreate", "cuStreamSynchronize", "cuEventCreate",
    "cuEventRecord", "cuEventElapsedTime", "cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel",
    "cuLaunchHostFunc",
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_an_error_of_any_call_is_reported_and_leaves_the_engine_whole(fake, bundle, call):
    """The n-th call fails, for n that meet every place it is made from: an RlsdError, no leak, and a clean next run."""
    job = make_job(NETS, particles=2, params=Params(gamma=2.0, **{**PARAMS, "steps": 3}))
    with Engine(bundle) as engine:
        (wanted,) = engine.reconstruct([job])
    total = fake.count(call)
    for n in sorted({1, 2, total // 3, 2 * total // 3, total} - {0}):
        if n > total:
            continue
        fake.fail(call, n, 719)  # CUDA_ERROR_LAUNCH_FAILED
        try:
            with Engine(bundle) as engine:
                try:
                    engine.reconstruct([job])
                except RlsdError as error:
                    assert "719" in str(error) or "CUDA_ERROR" in str(error)
                (again,) = engine.reconstruct([job])
                assert again.particles.tobytes() == wanted.particles.tobytes()
        except RlsdError as error:
            assert re.search("CUDA_ERROR|driver does not start", str(error)), error


@pytest.mark.parametrize("scales", [(2.0**17, 8.0), (64.0, 2.0**20)], ids=["decoder", "features"])
def test_a_half_that_overflows_has_its_step_done_again(fake, tmp_path, scales):
    """Cotangents scaled so high that they overflow: the step is redone with lower ones, and the result is right."""
    loud = hosted_bundle(write_bundle(tmp_path / "cpu", NETS, 4), tmp_path / "cuda", scales=scales)
    job = make_job(NETS, particles=3, params=Params(gamma=2.0, **PARAMS))
    with Engine(loud) as engine:
        (found,) = engine.reconstruct([job])
        assert engine.stats()["redone"] > 0 and engine.stats()["redone"] % 3 == 0
        assert engine.stats()["particle_steps"] == 3 * 5
    assert difference(found.particles, reference(NETS, job)) < TOLERANCE


def test_steps_of_two_jobs_are_done_again(fake, tmp_path):
    """Each from its own state before the step."""
    loud = hosted_bundle(write_bundle(tmp_path / "cpu", NETS, 4), tmp_path / "cuda", scales=(2.0**17, 8.0))
    params = Params(**{**PARAMS, "steps": 4})
    jobs = [make_job(NETS, particles=n, item=n, params=params) for n in (3, 1)]
    with Engine(loud) as engine:
        results = engine.reconstruct(jobs)
        assert engine.stats()["redone"] >= 4
    for job, found in zip(jobs, results, strict=True):
        assert difference(found.particles, reference(NETS, job)) < TOLERANCE


def test_what_stays_infinite_ends_its_job_alone(fake, tmp_path):
    nets = make_nets()
    hopeless = hosted_bundle(write_bundle(tmp_path / "cpu", nets, 4), tmp_path / "cuda", scales=(2.0**60, 8.0))
    with Engine(hopeless) as engine:
        handle = engine.submit(make_job(nets, particles=2, params=Params(**PARAMS)))
        with pytest.raises(RlsdError, match="particle 0: the state became NaN or infinite at step 0"):
            engine.run()
        assert handle.info().status == 6


def test_device_and_bundle_have_to_fit(fake, bundle, tmp_path):
    cpu = write_bundle(tmp_path / "cpu", NETS, 1)
    for path, device, words in (
        (bundle, "cpu", "exported for 'cuda'"),
        (cpu, "cuda:0", "exported for 'cpu'"),
        (bundle, "cuda:1", "this machine has 1 of them"),
        (bundle, "cuda:7", "this machine has 1 of them"),
        (bundle, "cuda:", "allowed is cpu, or cuda:0"),
        (bundle, "tpu", "allowed is cpu, or cuda:0"),
    ):
        with pytest.raises(RlsdError, match=words):
            Engine(path, device=device)
    fake.set_capability(8, 0)
    with Engine(bundle) as engine, pytest.raises(RlsdError, match=r"do not run on .*sm_80.*--arch 80"):
        engine.reconstruct([make_job(NETS, params=Params(**PARAMS))])


def test_without_a_driver_there_is_one_sentence(bundle, monkeypatch):
    monkeypatch.setenv("RLSD_LIBCUDA", "/nowhere/libcuda.so.1")
    with pytest.raises(RlsdError, match="no NVIDIA driver here") as raised:
        Engine(bundle)
    assert raised.value.status == 9


def test_cancel_and_release(fake, bundle):
    with Engine(bundle) as engine:
        handles = [engine.submit(job) for job in jobs_of_all_kinds()]
        engine.tick()
        handles[0].release()
        engine.tick()
        engine.cancel()
        with pytest.raises(RlsdError, match="cancelled"):
            engine.run()
        job = jobs_of_all_kinds()[0]
        (again,) = engine.reconstruct([job])
    assert difference(again.particles, reference(NETS, replace(job))) < TOLERANCE
