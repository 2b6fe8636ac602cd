"""Ctrl-C in the midst of a run, and an interpreter that exits while a thread of it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx")
from bundle_factory import write_bundle
from tiny import make_nets

START = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *filter(None, sys.path)]!r}\n"
PROGRAM = """
import os, signal, threading, time
import numpy as np
from tiny import make_job, make_nets
from rlsd.engine import Engine, Params

def gather(rows, first, count):
    rows[count:] = rows[0]

bundle, way = sys.argv[1:]
nets = make_nets()
short = make_job(nets, particles=3, params=Params(steps=9))
share = {"all_particles": 1501, "gather": gather, "particles": 1500} if way == "gather" else {"particles": 4000}
long = make_job(nets, params=Params(steps=120, gamma=1.0 if way == "gather" else 0), **share)
engine = Engine(bundle, threads=2, max_particles=4000, progress=(lambda progress: None) if way != "none" else None)
wanted = engine.reconstruct([short])[0].particles
handle = engine.submit(long)
"""
INTERRUPTED = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born with it ignored
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    engine.run()
except KeyboardInterrupt:
    info = handle.info()
    assert (info.status, info.step < 119) == (7, True), (info.status, info.step)
else:
    sys.exit("the run was not interrupted")
assert np.array_equal(engine.reconstruct([short])[0].particles, wanted)
"""
GATHERING = """
def waiting(rows, first, count):
    time.sleep(1)
    rows[count:] = rows[0]

share = make_job(nets, particles=2, all_particles=3, gather=waiting, params=Params(steps=9, gamma=1.0))
waits = engine.submit(share)
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    engine.run()
except KeyboardInterrupt:
    assert handle.done and waits.done and handle.info().status == 7, handle.info().status
else:
    sys.exit("the run was not interrupted")
"""
LEFT = """
threading.Thread(target=engine.run, daemon=True).start()
time.sleep(0.2)
assert not handle.done
"""


def run(tmp_path: Path, program: str, way: str) -> subprocess.CompletedProcess[str]:
    bundle = write_bundle(tmp_path / "tiny", make_nets(), 2)
    arguments = [sys.executable, "-c", START + PROGRAM + program, str(bundle), way]
    return subprocess.run(arguments, timeout=60, capture_output=True, text=True)


@pytest.mark.parametrize("way", ["none", "progress", "gather"])
def test_a_run_is_interrupted(tmp_path: Path, way: str) -> None:
    done = run(tmp_path, INTERRUPTED, way)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_is_interrupted_whole_in_a_gather(tmp_path: Path) -> None:
    """Not its job alone, with the others' hours to wait for."""
    done = run(tmp_path, GATHERING, "none")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("way", ["none", "progress"])
def test_an_interpreter_that_exits_waits_for_the_tick_of_a_thread(tmp_path: Path, way: str) -> None:
    done = run(tmp_path, LEFT, way)
    assert done.returncode == 0, done.stderr
    assert "onnxruntime" not in done.stderr
