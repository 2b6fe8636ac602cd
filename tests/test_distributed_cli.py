"""`rlsd reconstruct --distributed` under torchrun, which starts all processes again when one was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from rlsd.pipeline import cli
from rlsd.pipeline.model import find_bundle

IMAGE = find_bundle("fashion").parent / "test_images" / "0001-pullover.png"
WORDS = ["reconstruct", "-m", "fashion", "-t", "half", "-i", str(IMAGE), "-n", "5", "--steps", "24", "--gamma", "50"]
WORDS += ["--threads", "1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# The second: else torchrun gives restarted processes the addresses of those that ended (pytorch/pytorch#135712).
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def kill_one(torchrun: subprocess.Popen, snapshots: Path) -> None:
    """Once all processes have a snapshot, one of them dies."""
    end = time.monotonic() + 300
    while len(list(snapshots.glob("?-of-2.step-*.snapshot"))) < 2:
        assert time.monotonic() < end and torchrun.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    ranks = [child for child in map(int, children) if b"rlsd.pipeline" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(ranks[1], signal.SIGKILL)


def test_killed_under_torchrun(tmp_path: Path) -> None:
    assert cli.run([*WORDS, "-o", str(tmp_path / "one")]) == 0
    words = [*WORDS, "-o", str(tmp_path / "two"), "--distributed", "--snapshot-steps", "3"]
    command = [*TORCHRUN, "--max-restarts", "1", "--monitor-interval", "0.1", "-m", "rlsd.pipeline", *words]
    with subprocess.Popen(command, env=os.environ | ENVIRONMENT) as torchrun:
        kill_one(torchrun, tmp_path / "two.snapshots")
        assert torchrun.wait(300) == 0
    one, two = (dict(np.load(tmp_path / name / IMAGE.stem / "arrays.npz")) for name in ("one", "two"))
    for each in (one, two):
        each["trace"] = each["trace"][..., :2].copy()  # diversity is that among a process's own particles
    assert {name: array.tobytes() for name, array in one.items()} == {name: a.tobytes() for name, a in two.items()}
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["time"]["particle_steps"] % 5 == 0  # of both processes, after they were started again
    assert 0 < report["time"]["particle_steps"] <= 5 * (23 - 3)
    assert not (tmp_path / "two.snapshots").exists()


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert cli.run([*WORDS, "-o", str(tmp_path / "out"), "--distributed"]) == 2
    assert "RANK is not set: start the processes with torchrun" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
