"""A process that forks: its child has none of the engine's threads, and must neither wait for them nor end them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx")
from bundle_factory import write_bundle
from tiny import make_nets

PROGRAM = """
import os, signal, sys
import numpy as np
from tiny import make_job, make_nets
from rlsd.engine import Engine, Params, RlsdError

bundle, threads = sys.argv[1], int(sys.argv[2])
job = make_job(make_nets(), particles=3, params=Params(steps=9, gamma=2.0))
with Engine(bundle, threads=threads) as engine:
    wanted = engine.reconstruct([job])[0].particles
    under_way = engine.submit(job)
    engine.tick()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # who waits for a thread that is not there waits without end
        submit, see = lambda: engine.submit(job), lambda: engine.features(wanted)
        for call in (engine.tick, engine.run, submit, see, under_way.snapshot):
            try:
                call()
            except RlsdError as error:
                assert f"belongs to process {os.getppid()}, which forked this one, {os.getpid()}" in str(error), error
            else:
                os._exit(3)
        del under_way
        engine.close()
        with Engine(bundle, threads=threads) as own:
            os._exit(0 if np.array_equal(own.reconstruct([job])[0].particles, wanted) else 4)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    engine.run()
    assert np.array_equal(under_way.result().particles, wanted)
"""

WHILE_A_THREAD_RUNS = """
import os, signal, sys, threading, time
from tiny import make_job, make_nets
from rlsd.engine import Engine, Params, RlsdError

engine = Engine(sys.argv[1], threads=int(sys.argv[2]), max_particles=4000)
long = engine.submit(make_job(make_nets(), particles=4000, params=Params(steps=120)))
thread = threading.Thread(target=engine.run, daemon=True)
thread.start()
time.sleep(0.1)
child = os.fork()
if child == 0:
    signal.alarm(20)
    try:
        engine.run()
    except RlsdError:
        sys.exit(0)  # as any other program
    os._exit(3)
_, status = os.waitpid(child, 0)
assert (status, long.done) == (0, False), (status, long.done)
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_a_child_has_to_open_an_engine_of_its_own(tmp_path: Path, threads: int) -> None:
    run(tmp_path, PROGRAM, threads)


def test_a_child_does_not_wait_for_its_parents_thread(tmp_path: Path) -> None:
    run(tmp_path, WHILE_A_THREAD_RUNS, 2)


def run(tmp_path: Path, program: str, threads: int) -> None:
    bundle = write_bundle(tmp_path / "tiny", make_nets(), 2)
    path = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *filter(None, sys.path)]!r}\n"
    subprocess.run([sys.executable, "-c", path + program, str(bundle), str(threads)], check=True, timeout=200)
