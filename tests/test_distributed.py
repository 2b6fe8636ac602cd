"""One measurement over several processes: the bytes of one process, also after one of them was killed."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("torch")
from bundle_factory import write_bundle
from rank import launch
from tiny import make_job, make_nets

from rlsd.engine import Engine, Job, Params, RlsdError
from rlsd.pipeline.group import Group

NETS = make_nets()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of single samples: ONNX Runtime's mean of 6 values (the loss in the trace) depends on how they are aligned."""
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle", NETS, 1)


def params(**changes: object) -> Params:
    return Params(**({"steps": 21, "gamma": 3.0, "lr_x": 0.05, "lr_z": 0.05, "repulsion_until": 0.8} | changes))


def jobs() -> list[Job]:
    """7 and 11 particles are not divisible by 2 or 3 processes."""
    loud = np.full((2, 3), 0.8, np.float32)
    made = [
        make_job(NETS, particles=7, params=params()),
        make_job(NETS, "saturate", particles=11, seed=1, item=5, params=params(repulsion="latent", steps=9)),
        make_job(NETS, particles=3, params=params(variant="rlsd-nonaug", guidance=2.0), context=loud),
        make_job(NETS, particles=5, params=params(gamma=0.0)),
        make_job(NETS, particles=4, params=params(steps=2)),
    ]
    return [replace(job, trace=True) for job in made]


def alone(bundle: Path, jobs: list[Job]) -> list[list[bytes]]:
    with Engine(bundle, threads=1) as engine:
        results = engine.reconstruct(jobs)
    return [[a.tobytes() for a in (r.particles, r.latents, r.trace[..., :2].copy())] for r in results]


def found(folder: Path, count: int) -> list[list[bytes]]:
    results = []
    for index in range(count):
        with np.load(folder / f"{index}.npz") as file:
            results.append([file[name].tobytes() for name in ("particles", "latents", "trace")])
    return results


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_bytes_of_one_process(tmp_path: Path, bundle: Path, size: int) -> None:
    assert launch(size, tmp_path, bundle, jobs(), {"every": 6}) == [0] * size
    assert found(tmp_path, len(jobs())) == alone(bundle, jobs())
    assert not (tmp_path / "snapshots").exists()


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("space", ["features", "latent"])
def test_killed_and_started_again(tmp_path: Path, bundle: Path, victim: int, space: str) -> None:
    job = replace(make_job(NETS, particles=7, params=params(repulsion=space)), trace=True)
    signals = {victim: (13, signal.SIGKILL)}
    codes = launch(3, tmp_path, bundle, [job], {"every": 5, "timeout": 10_000, "signals": signals})
    others = [rank for rank in range(3) if rank != victim]
    assert codes[victim] == -signal.SIGKILL and all(codes[rank] == 1 for rank in others)
    for rank in others:
        error = (tmp_path / f"{rank}.error").read_text()
        assert error.startswith(
            f"RlsdError: process {rank} of 3: another process has ended or does not answer, at step "
        )
    written = {file.name for file in (tmp_path / "snapshots").iterdir()}
    assert written == {f"{rank}-of-3.step-10.snapshot" for rank in range(3)}
    assert launch(3, tmp_path, bundle, [job], {"every": 5}) == [0] * 3
    assert found(tmp_path, 1) == alone(bundle, [job])
    assert [(tmp_path / f"{rank}.ticks").read_text() for rank in range(3)] == ["11"] * 3  # of 21
    assert not (tmp_path / "snapshots").exists()


def test_the_last_snapshot_that_all_have(tmp_path: Path, bundle: Path) -> None:
    """One process has written a snapshot that another, killed meanwhile, has not."""
    job = replace(make_job(NETS, particles=5, params=params()), trace=True)
    launch(2, tmp_path, bundle, [job], {"every": 4, "signals": {1: (11, signal.SIGKILL)}})
    mine = {rank: tmp_path / "snapshots" / f"{rank}-of-2.step-8.snapshot" for rank in range(2)}
    later = tmp_path / "later"
    later.mkdir()
    launch(2, later, bundle, [job], {"every": 4, "signals": {1: (15, signal.SIGKILL)}})
    ahead = later / "snapshots" / "0-of-2.step-12.snapshot"
    ahead.rename(mine[0].with_name(ahead.name))
    assert launch(2, tmp_path, bundle, [job], {"every": 4}) == [0, 0]
    assert found(tmp_path, 1) == alone(bundle, [job])
    assert [(tmp_path / f"{rank}.ticks").read_text() for rank in range(2)] == ["13"] * 2


def test_one_that_does_not_answer(tmp_path: Path, bundle: Path) -> None:
    job = make_job(NETS, particles=4, params=params())
    options = {"timeout": 5, "signals": {1: (7, signal.SIGSTOP)}}
    codes = launch(2, tmp_path, bundle, [job], options, until=lambda processes: not processes[0].is_alive())
    assert codes[0] == 1
    assert "another process has ended or does not answer, at step 7" in (tmp_path / "0.error").read_text()


def test_an_error_of_one_ends_all(tmp_path: Path, bundle: Path) -> None:
    job = make_job(NETS, particles=5, params=params())
    assert launch(3, tmp_path, bundle, [job], {"signals": {1: (6, 0)}}) == [1] * 3
    errors = [(tmp_path / f"{rank}.error").read_text() for rank in range(3)]
    assert errors[1] == "OSError: [Errno 28] No space left on device"
    for rank in (0, 2):
        why = "process 1 has failed; its own message says why"
        assert errors[rank] == f"RlsdError: process {rank} of 3: {why}"


def test_what_cannot_be(tmp_path: Path, bundle: Path) -> None:
    assert launch(2, tmp_path, bundle, [make_job(NETS, particles=1, params=params())], {}) == [1, 1]
    assert "2 processes need at least one each" in (tmp_path / "1.error").read_text()
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "1-of-2.step-5.snapshot").touch()
    assert launch(3, tmp_path, bundle, [make_job(NETS, particles=3, params=params())], {"every": 5}) == [1] * 3
    assert "has snapshots of 2 processes, but there are 3" in (tmp_path / "0.error").read_text()
    (tmp_path / "snapshots" / "1-of-2.step-5.snapshot").rename(tmp_path / "snapshots" / "0-of-2.step-5.snapshot")
    (tmp_path / "snapshots" / "1-of-2.step-5.snapshot").touch()
    assert launch(2, tmp_path, bundle, [make_job(NETS, particles=3, params=params())], {"every": 5}) == [1] * 2
    assert "0-of-2.step-5.snapshot: " in (tmp_path / "0.error").read_text()  # empty: not of this job


def test_an_error_of_torch_without_a_message_is_said_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError

    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.init_process_group", broken)
    with pytest.raises(RlsdError, match=r"process 1 of 2: .* while they were found \(no message\)"):
        Group()
