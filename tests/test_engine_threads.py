"""Calls that come while another is under way: from other threads, and from the engine's own callbacks."""

import threading
import time

import numpy as np
import pytest
from engine_case import NETS, PARAMS, bundle_fixture  # noqa: F401
from tiny import make_job

from rlsd.engine import Engine, RlsdError, Status


@pytest.mark.parametrize("where", ["progress", "gather"])
def test_callbacks_cannot_call_into_their_engine(bundle, where):
    said = []

    def nested():
        image = np.zeros((1, *engine.image_shape), np.float32)
        for call in (
            engine.tick, engine.run, handle.snapshot, engine.close, lambda: engine.submit(job),
            lambda: engine.features(image),
        ):  # fmt: skip
            with pytest.raises(RlsdError, match="the engine is at work") as raised:
                call()
            assert raised.value.status == Status.INVALID_ARGUMENT
            said.append(call)

    def gather(rows, first, count):
        rows[count:] = 0.25
        if where == "gather":
            nested()

    job = make_job(NETS, particles=2, params=PARAMS, all_particles=3, gather=gather)
    with Engine(bundle, progress=lambda now: nested() if where == "progress" and now.jobs_active else None) as engine:
        handle = engine.submit(job)
        engine.run()
        disturbed, many = handle.result(), len(said)
        where = "nowhere"
        assert many >= 6 * 20 and np.array_equal(disturbed.particles, engine.reconstruct([job])[0].particles)
        assert len(said) == many


def test_another_thread_waits_for_its_turn(bundle):
    """Its job is not lost, and its arrays not freed, while the first thread ends jobs of its own."""
    job = make_job(NETS, particles=2, params=PARAMS)
    with Engine(bundle) as engine:
        wanted = engine.reconstruct([job])[0].particles.tobytes()
        handles, stop = [], threading.Event()

        def tick():
            while not stop.is_set():
                engine.tick()

        ticking = threading.Thread(target=tick)
        ticking.start()
        for _ in range(200):
            handles.append(engine.submit(job))
        stop.set()
        ticking.join()
        engine.run()
        assert {handle.result().particles.tobytes() for handle in handles} == {wanted}


def test_closing_ends_what_another_thread_runs(bundle):
    raised, seen, started = [], [], threading.Event()

    def progress(now):
        seen.append(now)
        started.set()
        time.sleep(0.1)

    engine = Engine(bundle, progress=progress)
    handle = engine.submit(make_job(NETS, params=PARAMS))

    def run():
        try:
            engine.run()
        except RlsdError as error:
            raised.append(error.status)

    running = threading.Thread(target=run)
    running.start()
    assert started.wait(60)
    engine.close()
    running.join(60)
    assert not running.is_alive() and raised == [Status.CANCELLED] and handle.done and len(seen) < 20
    with pytest.raises(RlsdError, match="engine is NULL"):
        engine.tick()
