"""Jobs that end early: cancelled, not finite, refused. The engine and the other jobs go on."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from bundle_factory import write_bundle
from engine_case import NETS, PARAMS, bundle_fixture  # noqa: F401
from tiny import make_job, make_nets

from rlsd.engine import Engine, Params, RlsdError, Status, native


def poisoned(tmp_path, value, t=51, batch=3):
    """A bundle whose denoiser returns `value` at timestep t."""
    nets = make_nets()
    nets.weights["offset"][t] = value
    return write_bundle(tmp_path / "poisoned", nets, batch)


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e30])
def test_what_is_not_finite_is_found_within_the_step(tmp_path, bundle, value):
    """Timestep 51 is step 10 of K = 21 and no step of K = 31: 120 // 21 = 5, 120 // 31 = 3."""
    healthy = make_job(NETS, particles=4, params=dataclasses.replace(PARAMS, steps=31))
    with Engine(bundle) as engine:
        wanted = engine.reconstruct([healthy])[0].particles.tobytes()
    with Engine(poisoned(tmp_path, value, t=51), threads=2) as engine:
        ill = engine.submit(make_job(NETS, particles=2, item=9, params=PARAMS))
        well = engine.submit(healthy)
        for _ in range(10):
            engine.tick()
        assert ill.info().status == 0
        with pytest.raises(RlsdError, match=r"item 9.*particle 0.*step 10") as raised:
            engine.tick()
        assert raised.value.status == Status.NON_FINITE
        engine.run()
        assert well.result().particles.tobytes() == wanted
        with pytest.raises(RlsdError, match="item 9"):
            ill.result()


@pytest.mark.parametrize("variant", ["rlsd", "rlsd-nonaug"])
@pytest.mark.parametrize("repulsion", ["features", "latent"])
def test_a_decoder_that_overflows(tmp_path, variant, repulsion):
    nets = make_nets(linear=True)
    nets.weights["V1"] *= np.float32(1e20)
    nets.weights["V2"] *= np.float32(1e20)
    params = dataclasses.replace(PARAMS, variant=variant, repulsion=repulsion)
    with Engine(write_bundle(tmp_path / "bundle", nets, 3)) as engine:
        handle = engine.submit(make_job(NETS, particles=40, params=params))
        with pytest.raises(RlsdError, match="particle") as raised:
            engine.run()
        assert raised.value.status == Status.NON_FINITE
        assert handle.info().step == 0


def test_run_reports_the_first_failure_after_finishing_the_others(tmp_path):
    with Engine(poisoned(tmp_path, np.inf, t=51)) as engine:
        handles = [engine.submit(make_job(NETS, item=i, params=PARAMS)) for i in range(2)]
        handles.append(engine.submit(make_job(NETS, item=2, params=dataclasses.replace(PARAMS, steps=31))))
        with pytest.raises(RlsdError, match="item 0"):
            engine.run()
        assert handles[2].result().particles.any()
        assert engine.tick() == 0


DOES_NOT_FIT = """
import dataclasses, resource, sys
from pathlib import Path
from tiny import make_job, make_nets
from rlsd.engine import Engine, Params, RlsdError

nets, params, seen = make_nets(), Params(steps=21, gamma=3.0, lr_x=0.05, lr_z=0.05), []
with Engine(sys.argv[1], threads=1, progress=seen.append) as engine:
    running = engine.submit(make_job(nets, params=params))
    engine.tick()
    share = make_job(nets, particles=1, item=1, params=dataclasses.replace(params, repulsion="latent"))
    large = engine.submit(dataclasses.replace(share, all_particles=10**6, gather=lambda rows, first, count: None))
    queued = engine.submit(make_job(nets, item=2, params=params))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 30 * 2**20, before[1]))
    try:
        engine.tick()
    except RlsdError as error:
        print(error, int(error.status), int(large.info().status))
    resource.setrlimit(resource.RLIMIT_AS, before)
    engine.run()
    print(running.result().particles.any(), queued.result().particles.any(), seen[-1].jobs_done)
"""


def test_a_job_that_does_not_fit_leaves_the_others_alone(bundle):
    """Rows for the million particles of which it is one would take 64 MB: there are 30. In a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = subprocess.run(
        [sys.executable, "-c", DOES_NOT_FIT, str(bundle)], env=environment, capture_output=True, text=True
    )
    assert run.stdout.split("\n")[:2] == ["out of memory 5 5", "True True 3"], run.stderr


def test_cancel_from_another_thread(bundle):
    with Engine(bundle, threads=2, max_particles=4) as engine:
        endless = dataclasses.replace(PARAMS, steps=120)
        handles = [engine.submit(make_job(NETS, item=i, params=endless)) for i in range(400)]
        timer = threading.Timer(0.1, engine.cancel)
        timer.start()
        with pytest.raises(RlsdError) as raised:
            engine.run()
        timer.join()
        assert raised.value.status == Status.CANCELLED
        assert handles[-1].info().status == Status.CANCELLED
        assert not handles[-1]._particles.any()
        assert len(engine.reconstruct([make_job(NETS, params=PARAMS)])) == 1


def test_progress_counts_and_stops(bundle):
    seen = []

    def progress(now):
        seen.append(now)
        return len(seen) == 5

    with Engine(bundle, progress=progress) as engine:
        engine.submit(make_job(NETS, particles=3, params=PARAMS))
        with pytest.raises(RlsdError) as raised:
            engine.run()
    assert raised.value.status == Status.CANCELLED
    assert [now.particle_steps for now in seen] == [3, 6, 9, 12, 15]
    assert [now.particle_steps_left for now in seen] == [57, 54, 51, 48, 45]
    assert {(now.jobs_queued, now.jobs_active, now.jobs_done) for now in seen} == {(0, 1, 0)}


def test_progress_of_a_second_run_counts_anew(bundle):
    seen = []
    with Engine(bundle, progress=seen.append) as engine:
        for _ in range(2):
            engine.reconstruct([make_job(NETS, particles=3, params=dataclasses.replace(PARAMS, steps=3))])
    assert [now.particle_steps for now in seen] == [3, 6, 6] * 2


@pytest.mark.parametrize("interval, least, most", [(0, 21, 21), (0.05, 3, 9), (1e9, 1, 1)])
def test_progress_at_intervals_and_at_the_end(bundle, interval, least, most):
    """Each of 20 steps waits 0.02 s for a gather."""
    seen = []
    waiting = make_job(NETS, particles=3, params=PARAMS, all_particles=4, gather=lambda *_: time.sleep(0.02))
    with Engine(bundle, progress=seen.append, progress_interval=interval) as engine:
        engine.reconstruct([waiting])
    waited = np.diff([0, *(now.seconds for now in seen[:-1])])
    assert (waited > interval - 0.005).all()
    assert least <= len(seen) <= max(most, 1 + seen[-1].seconds / (interval or 1)) and seen[-1].particle_steps_left == 0


def test_without_progress_a_run_seldom_calls_into_python(bundle, monkeypatch):
    calls = []
    monkeypatch.setattr(Engine, "_on_progress", lambda *_: calls.append(time.monotonic()) or 0)
    with Engine(bundle) as engine:
        start = time.monotonic()
        engine.reconstruct([make_job(NETS, params=PARAMS)])
        assert 1 <= len(calls) <= 1 + (time.monotonic() - start) / 0.2


@pytest.mark.parametrize("interval", [-1.0, np.nan])
def test_intervals_of_progress_that_are_none(bundle, interval):
    with pytest.raises(RlsdError, match=f"progress_interval is {interval:g}, allowed is 0 or more"):
        Engine(bundle, progress=print, progress_interval=interval)


def test_jobs_that_were_cancelled_count_as_done(bundle):
    seen, job = [], make_job(NETS, params=dataclasses.replace(PARAMS, steps=3))
    with Engine(bundle, progress=seen.append) as engine:
        engine.submit(job)
        engine.cancel()
        with pytest.raises(RlsdError, match="cancelled"):
            engine.run()
        engine.reconstruct([job])
    assert seen[-1].jobs_done == 2


def test_an_exception_in_the_callback_comes_back(bundle):
    """At once, and once: it ends the run, and is none of the next one's."""
    seen = []

    def progress(now):
        seen.append(now)
        if len(seen) == 1:
            raise KeyError("mine")

    with Engine(bundle, progress=progress) as engine:
        engine.submit(make_job(NETS, params=PARAMS))
        with pytest.raises(KeyError, match="mine"):
            engine.run()
        assert len(seen) == 1
        engine.run()
        assert engine.tick() == 0


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"operator": "zoom"}, "zoom.*inpainting, saturate"),
        ({"y": np.zeros(3, np.float32)}, "y has 3 elements, 16 are needed"),
        ({"y": np.full((1, 4, 4), np.nan, np.float32)}, "y has a value that is not finite"),
        ({"operator_params": {}}, "mask|parameters"),
        ({"operator_params": {"musk": np.zeros((1, 4, 4), np.float32)}}, "mask"),
        ({"operator_params": {"mask": np.zeros(3, np.float32)}}, "mask.*3.*16"),
        ({"operator_params": {"mask": np.full((1, 4, 4), np.inf, np.float32)}}, "mask.*not finite"),
        ({"particles": 0}, "particles is 0"),
        ({"particles": -2}, "particles is -2"),
        ({"context": np.zeros(5, np.float32)}, "context has 5 elements, 6 are needed"),
        ({"params": Params(steps=121)}, "steps is 121, allowed is 2 to 120"),
        ({"params": Params(steps=9, guidance=2.0)}, "guidance is 2.*context"),
    ],
)
def test_refusals_name_field_and_value(bundle, changes, words):
    with Engine(bundle) as engine:
        with pytest.raises(RlsdError, match=words) as raised:
            engine.submit(dataclasses.replace(make_job(NETS), **changes))
        assert raised.value.status == Status.INVALID_ARGUMENT
        assert engine.tick() == 0


@pytest.mark.parametrize(
    "field, value", [("seed", -1), ("seed", 2**64), ("item", 2**32), ("particles", 2**31), ("item", 1.5)]
)
def test_numbers_that_c_cannot_hold(bundle, field, value):
    """ctypes would take their lowest bits, so that two items shared their noise."""
    with (
        Engine(bundle) as engine,
        pytest.raises(ValueError, match=f"{field} is {value}, allowed is a whole number from"),
    ):
        engine.submit(make_job(NETS, params=PARAMS, **{field: value}))


def test_numbers_and_masks_of_other_types(bundle):
    kinds = dict(steps=np.int64(4), gamma=np.float32(2), lr_z=np.float64(0.05), repulsion="latent")
    jobs = [
        make_job(NETS, params=Params(**given), particles=np.int32(2))
        for given in (kinds, {**kinds, "steps": 4, "gamma": 2.0})
    ]
    mask = np.random.default_rng(0).integers(0, 2, (1, 4, 4))
    jobs = [
        dataclasses.replace(job, operator_params={"mask": mask.astype(kind)})
        for job, kind in zip(jobs, (np.uint8, np.float32))
    ]
    with Engine(bundle) as engine:
        one, other = engine.reconstruct(jobs)
    assert one.particles.tobytes() == other.particles.tobytes()


def test_features_that_the_bundle_does_not_have(tmp_path):
    bundle = write_bundle(tmp_path / "bundle", NETS, with_features=False)
    with Engine(bundle) as engine, pytest.raises(RlsdError, match=r"repulsion.*features"):
        engine.submit(make_job(NETS, params=Params(steps=9, repulsion="features", gamma=1.0)))


@pytest.mark.parametrize("field", ["rho", "lambda_", "lr_x", "lr_z", "gamma", "guidance", "beta1", "adam_eps"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30, pytest.param(10**400, id="10**400")])
def test_params_check_themselves(field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field.rstrip('_')} is {value}")):
        Params(**{field: value})


@pytest.mark.parametrize("steps", [3.5, 4.0, "4", np.float64(3)])
def test_steps_are_a_whole_number(steps):
    """C would drop the rest."""
    with pytest.raises(ValueError, match=re.escape(f"steps is {steps!r}, allowed is a whole number")):
        Params(steps=steps)


@pytest.mark.parametrize(
    "field, value",
    [
        ("steps", 1), ("repulsion_until", 1.001), ("beta2", 1), ("lr_x", 0), ("gamma", "3"), ("rho", None),
        ("guidance", 1j), pytest.param("lambda_", 10**400, id="lambda_-too long for a float"),
    ],
)  # fmt: skip
def test_params_that_no_range_has(field, value):
    with pytest.raises(ValueError, match=f"^{field.rstrip('_')} is {value}, allowed is "):
        Params(**{field: value})


def test_an_engine_that_nobody_keeps_goes_at_once(bundle):
    """Its memory with it, not when the interpreter collects cycles."""
    engine = Engine(bundle, progress=print, log=print)
    kept = weakref.ref(engine)
    del engine
    assert kept() is None


def test_a_job_that_is_refused_leaves_none_behind(bundle):
    good = make_job(NETS, params=PARAMS)
    with Engine(bundle) as engine:
        with pytest.raises(RlsdError, match="nothing"):
            engine.reconstruct([good, dataclasses.replace(good, operator="nothing")])
        assert engine.tick() == 0 and engine.stats()["particle_steps"] == 0


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda path: Engine(path, threads=2**32 + 1), "threads is 4294967297"),
        (lambda path: Engine(path, max_particles=2**33 + 1), "max_particles is 8589934593"),
        (lambda path: native.normal(-1, 0, 0, 0, 1), "seed is -1"),
        (lambda path: native.normal(0, 2**32 + 1, 0, 0, 1), "item is 4294967297"),
        (lambda path: native.repulsion(np.zeros((2, 2)), step=2**32), "step is 4294967296"),
        (lambda path: Engine(path).evaluate("decoder", ["image"]), "'decoder' is given no inputs"),
        (
            lambda path: Engine(path).evaluate("decoder", ["y"], z=np.zeros((1, 4, 2, 2))),
            "'y' of graph 'decoder' has no",
        ),
    ],
)
def test_numbers_that_c_would_cut_and_graphs_without_their_like(bundle, call, words):
    with pytest.raises(ValueError, match=words):
        call(bundle)


def test_nothing_is_released_twice(bundle):
    with Engine(bundle) as engine:
        handle = engine.submit(make_job(NETS, params=PARAMS))
        engine.run()
        engine.close()
        engine.close()
    del handle


def test_libraries_of_cuda_are_loaded_from_wheels(tmp_path, monkeypatch):
    """Those that load, of the names that ONNX Runtime's provider needs; what is none of them stays where it is."""
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    shutil.copy(native.library_path(), folder / "libcudart.so.13")
    (folder / "libcublas.so.13").write_bytes(b"not a library")
    shutil.copy(native.library_path(), folder / "libother.so.1")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    native.preload_cuda.cache_clear()
    assert native.preload_cuda() == (str(folder / "libcudart.so.13"),)
    native.preload_cuda.cache_clear()
