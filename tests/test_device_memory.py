"""The engine on CUDA when a graph fails or memory is short: smaller batches, turns, or one clear error."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("onnx")
from bundle_factory import write_bundle
from device_case import NETS, PARAMS, TOLERANCE, bundle_fixture, difference, fake_fixture  # noqa: F401
from hosted import hosted_bundle
from onnx import helper, numpy_helper
from tiny import make_job, make_nets, reference

from rlsd.engine import Engine, Job, Params, RlsdError, Status

SHORT = {**PARAMS, "steps": 3}


def greedy(source: Path, target: Path, batches: list[int]) -> Path:
    """A bundle whose decoder asks for 256 TiB in these batches, more than a process can address."""
    bundle = write_bundle(source, NETS, 1, 2)
    for batch in batches:
        path = bundle / f"decoder.b{batch}.onnx"
        model = onnx.load(path, load_external_data=False)
        graph = model.graph
        graph.initializer.append(numpy_helper.from_array(np.array([1 << 46]), "huge"))
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "nothing"))
        (last,) = [node for node in graph.node if "image" in node.output]
        last.output[0] = "decoded"
        graph.node.append(helper.make_node("Expand", ["nothing", "huge"], ["filled"]))
        graph.node.append(helper.make_node("ReduceMax", ["filled"], ["largest"], keepdims=0))
        graph.node.append(helper.make_node("Add", ["decoded", "largest"], ["image"]))
        path.write_bytes(model.SerializeToString())
    return hosted_bundle(bundle, target)


def test_a_graph_without_memory_makes_batches_smaller(fake, tmp_path):
    job, said = make_job(NETS, particles=4, params=Params(gamma=2.0, **SHORT)), []
    with Engine(greedy(tmp_path / "cpu", tmp_path / "cuda", [2]), log=said.append) as engine:
        (found,) = engine.reconstruct([job])
    assert said[1:] == ["memory is short: batches have at most 1 of 2 lanes"]
    assert difference(found.particles, reference(NETS, job)) < TOLERANCE


def test_a_graph_without_memory_in_any_batch_is_an_error(fake, tmp_path):
    with Engine(greedy(tmp_path / "cpu", tmp_path / "cuda", [1, 2])) as engine:
        handle = engine.submit(make_job(NETS, particles=4, params=Params(**SHORT)))
        with pytest.raises(RlsdError, match="Failed to allocate memory") as raised:
            engine.run()
        assert raised.value.status == handle.info().status == Status.OUT_OF_MEMORY
        assert not handle._particles.any()


def second_tick(engine: Engine, job: Job) -> tuple[bytes, float]:
    """The job's particles, and the launches of its second tick."""
    handle = engine.submit(job)
    engine.tick()
    before = engine.stats()["launches"]
    engine.tick()
    launches = engine.stats()["launches"] - before
    engine.run()
    return handle.result().particles.tobytes(), launches


def test_chunks_take_turns_where_only_one_seat_has_memory(fake, bundle):
    """8 particles in batches of 4, memory short by one allocation: they share a seat, where each is decoded twice."""
    job = make_job(NETS, particles=8, params=Params(gamma=2.0, **SHORT))
    with Engine(bundle) as engine:
        wanted, fewest = second_tick(engine, job)
        allocations = fake.count("cuMemAlloc_v2")
    fake.reset()
    fake.run_kernels()
    with Engine(bundle) as engine:
        fake.fail("cuMemAlloc_v2", allocations - fake.count("cuMemAlloc_v2"))
        found, launches = second_tick(engine, job)
    assert found == wanted and launches > fewest


def test_a_graph_that_fails_while_it_runs_ends_its_jobs(fake, tmp_path):
    """An index that is out of range at one timestep; the engine takes the next job."""
    nets = make_nets()
    nets.weights["offset"] = nets.weights["offset"][:100]  # of 120 timesteps
    with Engine(hosted_bundle(write_bundle(tmp_path / "cpu", nets, 2), tmp_path / "cuda")) as engine:
        ill = engine.submit(make_job(nets, particles=2, params=Params(**{**PARAMS, "steps": 120})))
        with pytest.raises(RlsdError, match="indices") as raised:
            engine.run()
        assert raised.value.status == ill.info().status == Status.RUNTIME_ERROR
        (well,) = engine.reconstruct([make_job(nets, params=Params(**{**PARAMS, "steps": 2}))])
    assert np.isfinite(well.particles).all()


def test_a_share_of_a_job_that_overflows_is_not_done_again(fake, tmp_path):
    """The other processes would go on: what a process alone does again is an error here."""
    loud = hosted_bundle(write_bundle(tmp_path / "cpu", NETS, 4), tmp_path / "cuda", scales=(2.0**17, 8.0))
    job = make_job(NETS, particles=3, params=Params(gamma=2.0, **PARAMS))
    job = replace(job, all_particles=3, gather=lambda rows, first, count: None)
    with Engine(loud) as engine:
        handle = engine.submit(job)
        with pytest.raises(RlsdError, match="became NaN or infinite at step") as raised:
            engine.run()
        assert raised.value.status == handle.info().status == Status.NON_FINITE
        assert engine.stats()["redone"] == 0


def test_a_bundle_without_features(fake, tmp_path):
    """One job of a particle alone, one with repulsion among latents; features are refused."""
    path = hosted_bundle(write_bundle(tmp_path / "cpu", NETS, 2, with_features=False), tmp_path / "cuda")
    jobs = [make_job(NETS, particles=n, params=Params(gamma=2.0, repulsion="latent", **SHORT)) for n in (1, 2)]
    with Engine(path) as engine:
        for job, found in zip(jobs, engine.reconstruct(jobs), strict=True):
            assert difference(found.particles, reference(NETS, job, with_features=False)) < TOLERANCE
        with pytest.raises(RlsdError, match=r"repulsion.*features"):
            engine.submit(make_job(NETS, params=Params(repulsion="features", gamma=1.0, **SHORT)))


def test_a_job_in_the_place_of_one_that_is_done_is_the_same(fake, bundle):
    first, long, last = (
        make_job(NETS, particles=n, item=n, params=Params(**{**PARAMS, "steps": steps}))
        for n, steps in ((3, 2), (1, 5), (2, 3))
    )
    with Engine(bundle) as engine:
        wanted = [engine.reconstruct([job])[0].particles.tobytes() for job in (long, last)]
        done, handle = engine.submit(first), engine.submit(long)
        while not done.done:
            engine.tick()
        handles = [handle, engine.submit(last)]
        engine.run()
        assert [each.result().particles.tobytes() for each in handles] == wanted


def ends_with(engine: Engine, particles: int, operator: str = "inpainting") -> Status:
    handle = engine.submit(make_job(NETS, operator, particles=particles, params=Params(gamma=2.0, **SHORT)))
    with suppress(RlsdError):
        engine.run()
    return Status(handle.info().status)


@pytest.mark.parametrize("first, failing", [(0, [4]), (2, [10, 20])])
def test_a_state_that_cannot_grow_stays_whole(fake, bundle, first, failing):
    """There is no memory for an array in the middle; with seats to give up, not after that either."""
    with Engine(bundle) as engine:
        if first:
            assert ends_with(engine, first) == Status.OK
        for nth in failing:
            fake.fail("cuMemAlloc_v2", nth, 2)
        found = [ends_with(engine, n) for n in (16, 2, 1, 2, 16)]
    assert found == [Status.OUT_OF_MEMORY, *[Status.OK] * 4]


def test_a_job_that_had_no_memory_to_be_drawn_is_drawn_again(fake, bundle):
    """Once the seats of the job before have made room; in its place lies what that one left."""
    job = make_job(NETS, particles=2, params=Params(**SHORT))
    with Engine(bundle) as engine:
        (wanted,) = engine.reconstruct([job])
        fake.fail("cuMemHostAlloc", 1, 2)
        (found,) = engine.reconstruct([job])
    assert found.particles.tobytes() == wanted.particles.tobytes()


def used(fake) -> int:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with fake.context():
        assert fake.library.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    return total.value - free.value


def test_a_job_that_does_not_fit_leaves_the_others_alone(fake, bundle):
    def job(particles: int, **changes) -> Job:
        return make_job(NETS, particles=particles, params=Params(gamma=2.0, **SHORT), **changes)

    with Engine(bundle, max_particles=500) as engine:
        (wanted,) = engine.reconstruct([job(2)])
        running = engine.submit(job(2))
        engine.tick()
        fake.set_memory(used(fake) + 20000)
        large, queued = engine.submit(job(490, item=2)), engine.submit(job(20, item=3))
        with pytest.raises(RlsdError, match=r"cannot allocate .* bytes on the device"):
            engine.tick()
        fake.set_memory(1 << 36)
        engine.run()
    assert [Status(each.info().status) for each in (running, large, queued)] == [0, Status.OUT_OF_MEMORY, 0]
    assert running.result().particles.tobytes() == wanted.particles.tobytes()
    assert np.isfinite(queued.result().particles).all() and not large._particles.any()


def test_seats_of_jobs_that_are_done_make_room(fake, bundle):
    """Enough memory for either job; seats of the first, under repulsion in many batches, lie where the other's go."""
    fake.run_kernels(False)
    with Engine(bundle) as engine:
        assert ends_with(engine, 40) == Status.OK
        fake.set_memory(used(fake) + 4096)
        assert ends_with(engine, 48, "saturate") == ends_with(engine, 2, "saturate") == Status.OK


def test_operators_share_the_seats(fake, bundle):
    with Engine(bundle) as engine:
        assert ends_with(engine, 4) == Status.OK
        before = used(fake)
        assert ends_with(engine, 4, "saturate") == Status.OK
        assert used(fake) - before < 4 * 4 * (6 + 1)  # y and gain of four lanes
        fake.clear_log()
        assert ends_with(engine, 4) == Status.OK
        assert not [line for line in fake.log() if line.startswith("cuMemAlloc") and int(line.split()[1]) > before // 4]


@pytest.mark.parametrize("nth", range(12, 20))
def test_a_seat_that_has_no_memory_for_one_more_operator(fake, bundle, nth):
    """An allocation of the second job fails, that of its y in the only seat among them: what is in use stays."""
    fake.run_kernels(False)
    with Engine(bundle) as engine:
        assert ends_with(engine, 4) == Status.OK
        fake.fail("cuMemAlloc_v2", nth)
        assert ends_with(engine, 4, "saturate") == Status.OK


def test_an_operator_whose_first_run_had_no_memory_is_run_again(fake, bundle):
    """A seat of the job before makes room; on a GPU a graph that has not run is not recorded yet."""
    fake.run_kernels(False)
    with Engine(bundle) as engine:
        assert ends_with(engine, 5) == Status.OK
        fake.clear_log()
        fake.fail("cuLaunchHostFunc", 1, 2)
        assert ends_with(engine, 4, "saturate") == Status.OK
    log = fake.log()
    tick = next(i for i, line in enumerate(log) if line.startswith("cuEventRecord"))
    runs = [line for line in log[:tick] if line.startswith("cuLaunchHostFunc")]
    assert [line.endswith("-> 2") for line in runs] == [True, False]


def test_more_particles_than_a_grid_has_rows(fake, bundle):
    """Drawn in several launches; then the first chunk has no page-locked memory, or this would take minutes."""
    fake.run_kernels(False)
    with Engine(bundle) as engine:
        for nth in (2, 3, 4):  # nor has that of any smaller batch
            fake.fail("cuMemHostAlloc", nth, 2)
        with pytest.raises(RlsdError, match="cannot allocate page-locked memory"):
            engine.reconstruct([make_job(NETS, particles=65537, params=Params(**PARAMS))])
    grids = [line.split()[3] for line in fake.log() if line.startswith("cuLaunchKernel start")]
    assert grids == ["1,65520,1", "1,17,1"] * 2  # z and x


UNSAFE = ("cuModule", "cuMemAlloc", "cuMemFree", "cuMemHostAlloc", "cuMemFreeHost")


def test_the_first_tick_does_nothing_that_spoils_a_recording_of_another_engine(fake, bundle):
    """Its packing waits for its turn; after that, from the first event on, it does not."""
    with Engine(bundle) as engine:
        for repulsion in ("features", "latent"):
            engine.submit(make_job(NETS, particles=3, params=Params(gamma=2.0, repulsion=repulsion, **SHORT)))
        fake.clear_log()
        engine.tick()
        log = fake.log()
        first = next(i for i, line in enumerate(log) if line.startswith("cuEventRecord"))
        assert [line for line in log[:first] if line.startswith("cuMemAlloc")]
        assert not [line for line in log[first:] if line.startswith(UNSAFE)]
        engine.run()
