"""`rlsd batch --ray` with two local actors: the bytes of one process, also where an actor is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'rlsd[ray]'")
import ray

from rlsd.engine import Params
from rlsd.models.fashion import PATH
from rlsd.pipeline import cli
from rlsd.pipeline.batch_folder import RUN, BatchFolder
from rlsd.pipeline.batch_work import Work
from rlsd.pipeline.images import sha256
from rlsd.pipeline.manifest import Entry
from rlsd.pipeline.ray_batch import Actor, Cluster
from rlsd.pipeline.settings import Settings

IMAGES = sorted((PATH / "test_images").glob("*.png"))[:6]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for image in IMAGES:
        shutil.copy(image, folder)
    return folder


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    yield
    ray.shutdown()


def batch(out: str, *words: str) -> int:
    """The exit code of `rlsd batch`, all of whose paths are relative."""
    given = ["-m", "fashion", "-t", "half", "-i", "photos", "-o", out, "-n", "2", "--steps", "24", *words]
    return cli.run(["batch", *given, "--threads", "1"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def kill_one(folder: Path, killed: list[int]) -> None:
    """Kills the actor that has written the first snapshot: a piece's file says which process has it."""
    while not (found := list(folder.glob(".snapshots/0*"))):
        time.sleep(0.02)
    half = int(found[0].name[:6]) // 3 * 3
    process = int((folder / ".snapshots" / f"~{half}").read_text().rpartition(":")[2])
    assert Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::MapWorker")
    os.kill(process, signal.SIGKILL)
    killed.append(process)


def test_killed_in_the_middle(photos: Path, tmp_path: Path, cluster: None) -> None:
    assert batch("one") == 0
    killed: list[int] = []
    killer = threading.Thread(target=kill_one, args=(tmp_path / "two", killed), daemon=True)
    killer.start()
    assert batch("two", "--ray", "local", "--workers", "2", "--snapshot-every", "0.1", "--log", "log.jsonl") == 0
    killer.join(1)
    assert killed and contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "two")) == 2 + 2 * len(IMAGES)
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {event["item"] for event in events if event["event"] == "done"} == set(range(len(IMAGES)))
    texts = [event.get("text") for event in events]
    assert f"worker {os.uname().nodename}:{killed[0]} ended; its 3 items are given to another" in texts
    assert "goes on from its snapshot" in texts


def test_a_cluster_of_its_own_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = pytest.importorskip("ray._common.usage.usage_lib", reason="Ray keeps it elsewhere")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    assert usage.usage_stats_enabled()
    with Cluster("local", workers=1).joined():
        assert not usage.usage_stats_enabled()


class Death(BaseException):
    """An actor's process ends."""


class Poisoned(Actor):
    """Dies whenever it reconstructs the item called poison, perhaps with others."""

    def _reconstruct(self, entries: Any, *more: Any) -> None:
        if any(entry.name == "poison" for entry in entries):
            raise Death
        super()._reconstruct(entries, *more)


def a_batch(photos: Path, out: Path, bundle: Path = PATH / "bundle") -> tuple[Work, dict[str, np.ndarray]]:
    """What an actor is given: three items, the second is the poisoned one."""
    work = Work(str(bundle), "half", Settings(Params(steps=4), 1), str(out), threads=1)
    names = ("a", "poison", "c")
    entries = [Entry(i, name, str(photos / IMAGES[i].name)) for i, name in enumerate(names)]
    return work, {"entry": np.array([json.dumps(asdict(entry)) for entry in entries], object)}


def told(rows: dict[str, np.ndarray]) -> list[tuple[str, int, str]]:
    events = map(json.loads, rows["event"])
    return [(event["kind"], event["index"], event["text"]) for event in events if event["kind"] != "steps"]


def test_an_item_that_kills_its_actors(photos: Path, tmp_path: Path) -> None:
    """Ray gives the piece to an actor again and again: all other items are done, and that one has failed."""
    out = tmp_path / "out"
    work, rows = a_batch(photos, out)
    with BatchFolder(out, {}):
        actor, deaths, found = Poisoned(work, os.getcwd(), sha256(out / RUN), "run"), 0, None
        while found is None:
            try:
                found = told(actor(rows))
            except Death:
                deaths += 1
        assert deaths == 4
        why = "its worker ended 4 times while it was under way, at last alone with it"
        assert found[1:] == [("done", 0, ""), ("failed", 1, why), ("done", 2, "")]
        assert {path.name for path in (out / "items").iterdir()} == {"a", "c"}
        with pytest.raises(Death):  # another run begins counting anew
            Poisoned(work, os.getcwd(), sha256(out / RUN), "another")(rows)


def test_what_stops_all(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(PATH / "bundle", tmp_path / "altered")
    with open(tmp_path / "altered" / "weights.bin", "r+b") as file:
        file.write(b"x")
    work, rows = a_batch(photos, tmp_path / "out", tmp_path / "altered")
    with BatchFolder(tmp_path / "out", {}):
        ((kind, _, text),) = told(Actor(work, os.getcwd(), sha256(tmp_path / "out" / RUN), "run")(rows))
        assert kind == "fatal" and "weights.bin" in text
        ((kind, _, text),) = told(Actor(work, os.getcwd(), "0" * 64, "run")(rows))
        assert kind == "fatal" and text.startswith(f"output {work.out} is another folder on ")
    assert batch("other", "--ray", "local", "--device", "cuda:0") == 2
    assert "Ray gives each worker its own" in capsys.readouterr().err
