"""A job's bytes are its own: whatever it is packed with, in whatever order, on however many threads."""

import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
from bundle_factory import write_bundle
from tiny import make_job, make_nets

from rlsd.engine import Engine, Params

NETS = make_nets()


def params(**changes):
    return Params(**({"steps": 21, "gamma": 3.0, "lr_x": 0.05, "lr_z": 0.05, "repulsion_until": 0.6} | changes))


@pytest.fixture(scope="module", params=[(1,), (3,), (1, 4)], ids=str)
def bundle(request, tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle", NETS, *request.param)


def jobs():
    """Eight jobs that differ in everything a job can differ in."""
    loud = np.full((2, 3), 0.8, np.float32)
    return [
        make_job(NETS, particles=5, params=params()),
        make_job(NETS, "saturate", particles=2, seed=1, params=params(gamma=0.0)),
        make_job(NETS, particles=1, item=2, params=params(steps=7)),
        make_job(NETS, particles=4, params=params(variant="rlsd-nonaug")),
        make_job(NETS, "saturate", particles=3, seed=4, params=params(repulsion="latent", steps=33)),
        make_job(NETS, particles=2, context=loud, params=params(guidance=3.0, gamma=0.0)),
        make_job(NETS, particles=7, item=6, params=params(steps=2)),
        make_job(NETS, "saturate", particles=2, item=7, params=params(variant="rlsd-nonaug", repulsion="latent")),
    ]


def run(bundle, jobs, **options):
    with Engine(bundle, **options) as engine:
        return [result.particles.tobytes() + result.latents.tobytes() for result in engine.reconstruct(jobs)]


@pytest.fixture(scope="module")
def alone(bundle):
    return [run(bundle, [job], threads=1)[0] for job in jobs()]


def test_different_jobs_have_different_results(alone):
    assert len(set(alone)) == len(alone)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_packed_together(bundle, alone, threads):
    assert run(bundle, jobs(), threads=threads) == alone


@pytest.mark.parametrize("most", [1, 2, 5, 9])
def test_a_few_particles_at_a_time(bundle, alone, most):
    assert run(bundle, jobs(), threads=2, max_particles=most) == alone


def test_order_of_submission(bundle, alone):
    order = [4, 0, 7, 2, 6, 1, 5, 3]
    assert run(bundle, [jobs()[i] for i in order], threads=2) == [alone[i] for i in order]


def test_jobs_join_between_ticks(bundle, alone):
    handles = []
    with Engine(bundle, threads=2) as engine:
        for job in jobs():
            handles.append(engine.submit(job))
            for _ in range(3):
                left = engine.tick()
            assert left >= 1
        engine.run()
        found = [handle.result() for handle in handles]
    assert [result.particles.tobytes() + result.latents.tobytes() for result in found] == alone


def test_an_engine_can_be_used_again(bundle, alone):
    with Engine(bundle, threads=2) as engine:
        for _ in range(2):
            results = engine.reconstruct(jobs())
            assert [result.particles.tobytes() + result.latents.tobytes() for result in results] == alone


def test_engines_in_parallel_threads(bundle, alone):
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: run(bundle, jobs(), threads=2), range(4)):
            assert found == alone


def test_a_released_job_leaves_the_others_alone(bundle, alone):
    with Engine(bundle, threads=2) as engine:
        handles = [engine.submit(job) for job in jobs()]
        engine.tick()
        engine.tick()
        for i in (5, 3, 0):
            handles.pop(i).release()
        engine.run()
        found = [handle.result() for handle in handles]
    kept = [alone[i] for i in (1, 2, 4, 6, 7)]
    assert [result.particles.tobytes() + result.latents.tobytes() for result in found] == kept


def test_a_released_job_is_computed_no_more(bundle):
    with Engine(bundle, threads=1) as engine:
        handles = [engine.submit(job) for job in jobs()[:2]]
        engine.tick()
        handles.pop(0).release()
        before = engine.stats()["decoder_runs"]
        engine.tick()
        assert engine.stats()["decoder_runs"] - before == 2


def test_the_numbers_depend_on_seed_item_and_particle(bundle):
    def first(**changes):
        return run(bundle, [make_job(NETS, params=params(gamma=0.0, steps=3), **changes)])[0]

    assert len({first(seed=s, item=i, particles=1) for s, i in ((0, 0), (1, 0), (2**32, 0), (0, 1))}) == 4


def test_a_job_runs_though_nobody_keeps_its_handle(bundle):
    with Engine(bundle) as engine:
        engine.submit(make_job(NETS, particles=2, params=params()))
        assert engine.tick() == 1
        engine.run()
        assert engine.stats()["particle_steps"] == 2 * 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def apart(program: str) -> list[int]:
    """The numbers that a program prints in a process of its own: in another it may find memory that was there."""
    program = f"import sys; sys.path[:] = {sys.path!r}\nfrom test_engine_packing import *\n{program}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    return list(map(int, done.stdout.split()))


DONE = """
jobs = [make_job(NETS, item=i, particles=2000, params=Params(steps=2)) for i in range(30)]
with Engine(BUNDLE, threads=1, max_particles=2000) as engine:
    engine.reconstruct(jobs[:1])
    handles = [engine.submit(job) for job in jobs]
    before = resident()
    engine.run()
    print(resident() - before)
"""


def test_jobs_that_are_done_keep_no_state(tmp_path):
    """Whoever has submitted thousands of them may keep all their handles."""
    path = write_bundle(tmp_path / "bundle", NETS, 64)
    (grown,) = apart(f"BUNDLE = {str(path)!r}\n{DONE}")
    assert grown < 30 * 2000 * 16 * 4  # a third of their latents and moments


def test_thousands_of_batches_are_packed_at_once(tmp_path):
    """In half a second. With a look at every other batch for each it took minutes."""
    with Engine(write_bundle(tmp_path / "bundle", NETS, 2), threads=1, max_particles=24_000) as engine:
        handles = [engine.submit(make_job(NETS, item=i, particles=6000, params=Params(steps=2))) for i in range(4)]
        start = time.monotonic()
        engine.tick()
        assert time.monotonic() - start < 20
        handles[0].release()
        assert engine.tick() == 0 and all(handle.done for handle in handles[1:])


OPERATORS = """
from rlsd.engine import Job
from rlsd.models.fashion import PATH
with Engine(PATH / "bundle", threads=1) as engine:
    for name in ("inpainting", "bicubic4", "bicubic8"):
        operator = engine.operators[name]
        given = {key: np.ones(shape, np.float32) for key, shape in operator.params.items()}
        y = np.zeros(operator.measurement_shape, np.float32)
        before = resident()
        engine.reconstruct([Job(y, name, given, particles=64, params=Params(steps=2))])
        print(resident() - before)
"""


def test_operators_share_the_batches():
    """Of Stable Diffusion's, each holds gigabytes of activations."""
    grown = apart(OPERATORS)
    assert len(grown) == 3 and max(grown[1:]) < grown[0] / 4, grown
