"""`rlsd batch`: what it writes, what it refuses, what it survives."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from batch_case import arrays, batch, bundle, contents, failures, here, picture, record  # noqa: F401
from batch_kills import Injection, end_of, start
from PIL import Image
from rich.console import Console

from rlsd.engine import Engine
from rlsd.pipeline import batch as batches
from rlsd.pipeline import batch_folder, batch_lock, cli
from rlsd.pipeline.batch_list import list_inputs
from rlsd.pipeline.batch_monitor import Monitor, monitored
from rlsd.pipeline.batch_work import Event, Nothing, Work, Worker
from rlsd.pipeline.settings import settings_for
from rlsd.pipeline.tasks import TASKS


def work(out: str, **changes) -> Work:
    settings = settings_for(TASKS["random"], "fashion", {"particles": 2, "steps": 12})
    return Work("bundle", "random", settings, out, threads=1, **changes)


def test_items_are_those_of_reconstruct() -> None:
    assert batch("--pictures") == 0
    words = ["-m", "bundle", "-t", "random", "-o", "plain", "-n", "2", "--steps", "12", "-i"]
    assert cli.run(["reconstruct", *words, "in/0.png", "in/1.png"]) == 0
    table = Path("out/items.csv").read_text().splitlines()
    assert sorted(os.listdir("out")) == ["items", "items.csv", "run.json"] and len(table) == 7
    for index in range(2):
        name = f"{index:06}-{index}"
        mine, plain = arrays(Path("out/items") / name), arrays(Path("plain") / str(index))
        assert mine["particles"].tobytes() == plain["particles"].tobytes()
        assert np.array_equal(mine["mean"], plain["particles"].mean(0))
        facts, reported = (
            record(Path("out"), name),
            json.loads((Path("plain") / str(index) / "item.json").read_text()),
        )
        del reported["residual"]["of_mean_image"]  # one more run of the operator
        for key in ("item", "task", "source", "sha256", "residual", "psnr", "best_by_fit"):
            assert facts[key] == reported[key], key
        assert np.allclose(mine["residual"], facts["residual"]["particles"])
        assert table[index + 1].startswith(f"{index},{name},in/{index}.png,2,0.01,{facts['residual']['mean']},")
    files = sorted(os.listdir("out/items/000003-3"))
    assert files == ["arrays.npz", "item.json", "mean.png", "particle_00.png", "particle_01.png"]
    assert Image.open("out/items/000003-3/mean.png").size == (4, 4)


def test_a_bad_item_is_skipped_and_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    Path("in/3.png").write_text("no image")
    os.mkfifo("in/2b.png")  # no regular file: not listed
    assert batch() == 1
    said = capsys.readouterr()
    assert "5 of 6 items done" in said.out and "1 of 6 items failed: see out/failures.jsonl" in said.err
    assert failures(Path("out")) == {"000003-3": "in/3.png is not a PNG, JPEG, TIFF, NPY or DICOM file"}
    before = {path: os.stat(path).st_mtime_ns for path in Path("out/items").rglob("*")}
    Image.fromarray(picture(3)).save("in/3.png")
    assert batch() == 0
    assert all(os.stat(path).st_mtime_ns == stamp for path, stamp in before.items())
    assert batch(out="other") == 0
    assert contents(Path("out")) == contents(Path("other"))


def test_names_of_files_need_not_be_text() -> None:
    for name in (b"in/\xff.png", b"in/new\nline.png"):
        shutil.copy("in/0.png", name)
    Path(os.fsdecode(b"in/bad\xfe.png")).write_text("no image")
    assert batch() == 1
    assert sorted(os.listdir("out/items"))[-3:] == ["000005-5", "000007-new-line", "000008"]
    ((name, error),) = failures(Path("out")).items()
    assert name == "000006-bad" and "is not a PNG" in error
    assert b"8,000008,in/\xff.png,2," in Path("out/items.csv").read_bytes()


def test_an_item_that_becomes_nan_is_reported() -> None:
    for index in range(3):
        np.save(f"in/y{index}.npy", np.full((1, 4, 4), 3e38 if index == 1 else 0.1, np.float32))
    np.save("mask.npy", np.ones((1, 4, 4), np.float32))
    for workers in (1, 2):
        out = Path(f"out{workers}")
        assert batch("--measured", "--mask", "mask.npy", "--workers", workers, source="in/y*.npy", out=out) == 1
        ((name, error),) = failures(out).items()
        assert name == "000001-y1" and "NaN or infinite" in error
        assert sorted(os.listdir(out / "items")) == ["000000-y0", "000002-y2"]
        facts = record(out, "000000-y0")
        assert facts["measured"] and "psnr" not in facts and facts["sigma"] is None  # not known


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: batch("--seed", 1), "holds a batch whose seed is 0; this one's is 1"),
        (lambda: batch(task="half"), 'whose task is "random"; this one\'s is "half"'),
        (lambda: batch("--pictures"), "whose pictures is false"),
        (lambda: (shutil.copy("in/0.png", "in/00.png"), batch())[1], "whose items is 6; this one's is 7"),
        (lambda: (os.rename("in/5.png", "in/8.png"), batch())[1], "whose list of items is another; files or"),
        (lambda: (Path("out/run.json").write_text("{"), batch())[1], "its run.json cannot be read as JSON"),
        (lambda: (os.mkdir("in/.tmp-mine"), batch(out="in"))[1], "output in is not empty and has no run.json"),
        (lambda: (Path("out/run.json").unlink(), batch())[1], "is not empty and has no run.json"),
        (lambda: batch(out="in/0.png"), "is a file; a folder is wanted"),
        (lambda: batch("--log", "out/log"), "lies in the output folder"),
        (lambda: batch("--workers", 0), "workers is 0; allowed are 1 to 256"),
        (lambda: batch("--snapshot-every", 0), "snapshot-every is 0; it must be more than 0"),
        (lambda: batch("--steps", 500), "steps is 500; the prior has 120 timesteps"),
        (lambda: batch("--class", "cat"), "class 'cat' is not known to the prior; its classes: loud"),
        (lambda: batch("--param", "gain=in/0.png"), "has no parameter 'gain'; allowed is mask"),
        (lambda: batch("--mask", "none.png"), "none.png does not exist"),
        (lambda: batch("--mask", "a", "--mask", "b"), "mask has 2 files; a manifest's column"),
        (lambda: batch("--root", "."), "root is ., which is for a manifest"),
        (lambda: batch(source="nowhere"), "input nowhere does not exist"),
        (lambda: batch(source="x*.png"), "matches no file"),
        (lambda: batch(source="bundle"), "has no files named .png"),
        (lambda: batch("--metrics", "no/where"), "metrics no/where cannot be offered"),
        (lambda: batch("--log", "no/where"), "log no/where cannot be written"),
    ],
)  # fmt: skip
def test_what_is_refused(capsys: pytest.CaptureFixture[str], change, message: str) -> None:
    assert batch() == 0
    before = contents(Path("out/items"))
    capsys.readouterr()
    assert change() == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.startswith("rlsd: ") and said.err.count("\n") == 1
    assert contents(Path("out/items")) == before and os.path.exists("in/.tmp-mine") == ("output in" in message)


def test_two_runs_never_share_a_folder(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(batch_lock, "PATIENCE", 0.1)
    Path("out").mkdir()
    lock = os.open("out/.lock", os.O_RDWR | os.O_CREAT)  # a file, open for writing: what NFS can lock
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert batch() == 2
    assert "output out is in use: another run is writing to it" in capsys.readouterr().err
    assert os.listdir("out") == [".lock"]
    os.close(lock)
    assert batch() == 0 and not os.path.exists("out/.lock")


def test_a_lock_whose_file_is_gone_is_none(monkeypatch) -> None:
    """The holder removes the file and lets go, after another has opened it and before that one has the lock."""
    first, second = (batch_folder.BatchFolder(Path("out"), {}) for _ in range(2))
    real, calls = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            first.__exit__(None, None, None)
        real(descriptor, how)

    first.__enter__()
    monkeypatch.setattr(fcntl, "flock", flock)
    with second:
        assert len(calls) == 2 and os.path.samestat(os.stat("out/.lock"), os.fstat(second.lock.descriptor))
        second.check()
        os.rename("out/.lock", "elsewhere")
        with pytest.raises(OSError, match=r"the folder, or \.lock in it, was replaced"):
            second.check()
    assert sorted(os.listdir("out")) == [".snapshots", "items", "run.json"] and os.path.exists("elsewhere")


def test_a_lock_that_a_network_file_system_lost_is_tried_again(monkeypatch) -> None:
    """The holder on another machine removed the file that is open here: ESTALE, from either call."""
    real_lock, real_same, failures = fcntl.flock, os.path.sameopenfile, [errno.ESTALE, errno.ESTALE]

    def stale(real, *given):
        if failures:
            raise OSError(failures.pop(), "Stale file handle")
        return real(*given)

    monkeypatch.setattr(fcntl, "flock", lambda *given: stale(real_lock, *given))
    with batch_folder.BatchFolder(Path("out"), {}):
        assert not failures
    failures += [errno.ESTALE]
    monkeypatch.setattr(fcntl, "flock", real_lock)
    monkeypatch.setattr(os.path, "sameopenfile", lambda *given: stale(real_same, *given))
    with batch_folder.BatchFolder(Path("out"), {}):
        assert not failures
    monkeypatch.setattr(fcntl, "flock", lambda *given: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks")))
    with pytest.raises(OSError, match="No locks"), batch_folder.BatchFolder(Path("other"), {}):
        pass


@pytest.mark.parametrize("words", [["--threads", -1], ["--mask", "none.png"]])
def test_a_lock_that_a_killed_run_left_is_no_content(words) -> None:
    Path("out").mkdir()
    Path("out/.lock").touch()
    assert batch(*words) == 2 and set(os.listdir("out")) <= {".lock"}
    assert batch() == 0
    Path("full").mkdir()
    Path("full/mine").touch()
    assert batch(out="full") == 2 and os.listdir("full") == ["mine"]


def undisturbed(out: Path) -> dict[str, bytes]:
    assert batch(out=out) == 0
    return contents(out)


class ReadsFirst(Worker):
    """Reads all that its window has room for before the first step, however long that takes."""

    def _items(self, *given):
        return (item for item in super()._items(*given) if item is not None)


def test_snapshots_are_gone_on_from_and_bad_ones_dropped() -> None:
    wanted = undisturbed(Path("whole"))
    listing = list_inputs(["in"], None, ())
    entries = listing.entries()
    given = work("out", window=64)
    with (
        batch_folder.BatchFolder(Path("out"), batches.identity(batches.Batch(given, ["in"]), listing)),
        Engine("bundle", threads=1) as engine,
        batch_folder.Items(Path("out")) as items,
        pytest.raises(KeyboardInterrupt),
    ):
        worker = ReadsFirst(engine, given, items, lambda event: None, lambda: len(worker.taken) == 6)
        worker.run(lambda wait: next(entries, Nothing.EVER))
    kept = sorted(Path("out/.snapshots").iterdir())
    assert [file.name for file in kept] == [f"{index:06}-{index}" for index in range(6)]
    good = kept[0].read_bytes()
    kept[1].write_bytes(good)  # of another item
    kept[2].write_bytes(kept[2].read_bytes()[:-7])
    kept[3].write_bytes(bytes([kept[3].read_bytes()[0]]) + os.urandom(100))
    kept[4].write_bytes(b"")
    kept[5].write_bytes(kept[5].read_bytes()[:-1] + bytes([kept[5].read_bytes()[-1] ^ 1]))
    assert batch("--log", "log") == 0
    notes = {
        each["item"]: each["text"]
        for each in map(json.loads, Path("log").read_text().splitlines())
        if each["event"] == "note"
    }
    assert notes.pop(0) == "goes on from its snapshot" and sorted(notes) == [1, 2, 3, 4, 5]
    assert all(text.startswith("starts anew, its snapshot is not usable: ") for text in notes.values())
    assert contents(Path("out")) == wanted


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupts_keep_what_is_under_way(workers: int) -> None:
    words = ["batch", "-m", "bundle", "-t", "random", "-i", "in", "-o", "out", "-n", "64", "--steps", "120"]
    words += ["--workers", str(workers), "--log", "log", "--snapshot-every", "0.01"]
    process = start(words, Injection())
    end = time.monotonic() + 60
    while not any(Path("out/.snapshots").glob("0*")) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process, signal.SIGINT)
    code = end_of(process)
    assert code in (0, 130)  # it may have been quicker
    if code == 130:
        assert any(Path("out/.snapshots").glob("0*"))
    assert cli.run(words) == 0
    assert code == 0 or "goes on from its snapshot" in Path("log").read_text()
    assert cli.run([word if word != "out" else "whole" for word in words]) == 0
    assert contents(Path("out")) == contents(Path("whole"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_stops_it_and_nothing_is_lost(capsys, monkeypatch, workers: int) -> None:
    wanted = undisturbed(Path("whole"))
    if workers == 2:
        full_disk_for_workers(monkeypatch)
    real, calls = os.fsync, iter(range(10**9))

    def full(descriptor: int) -> None:
        if next(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        if workers == 1:
            patch.setattr(os, "fsync", full)
        assert batch("--workers", workers) == 1
    said = capsys.readouterr().err
    assert "cannot be written: No space left on device; what is finished stays" in said
    shown = {name: data for name, data in contents(Path("out")).items() if not name.startswith((".", "items/.tmp"))}
    assert shown.items() <= wanted.items() and "run.json" in shown
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert batch() == 0
    assert contents(Path("out")) == wanted


def full_disk_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started from now on find the disk full when they sync a file of an item."""
    Path("site").mkdir()
    Path("site/sitecustomize.py").write_text(
        "import errno, os\n"
        "real = os.fsync\n"
        "def full(fd):\n"
        "    if 'items' in os.readlink(f'/proc/self/fd/{fd}'):\n"
        "        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "    real(fd)\n"
        "os.fsync = full\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.path.abspath("site"))


def test_a_folder_that_vanishes(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    original = Monitor.__call__

    def vanish(self: Monitor, event: Event) -> None:
        if event.kind == "done" and os.path.exists("out"):
            os.rename("out", "elsewhere")
        original(self, event)

    monkeypatch.setattr(Monitor, "__call__", vanish)
    assert batch() == 1
    assert "out: cannot be written: the folder is gone" in capsys.readouterr().err


def test_an_item_that_kills_its_workers_fails_alone(monkeypatch) -> None:
    Path("site").mkdir()
    Path("site/sitecustomize.py").write_text(
        "import os\n"
        "real = os.open\n"
        "def deadly(path, *words, **options):\n"
        "    if str(path).endswith('in/2.png'):\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return real(path, *words, **options)\n"
        "os.open = deadly\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.path.abspath("site"))
    assert batch("--workers", 2) == 1
    ((name, error),) = failures(Path("out")).items()
    assert name == "000002-2" and "its worker ended 4 times" in error and "signal 9" in error
    monkeypatch.delenv("PYTHONPATH")
    assert batch("--workers", 2) == 0
    assert contents(Path("out")) == undisturbed(Path("whole"))


def test_workers_say_what_stops_them(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("bundle", "broken")
    weights = Path("broken/weights.bin")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert (
        cli.run(["batch", "-m", "broken", "-t", "half", "-i", "in", "-o", "out", "--workers", "2", "--steps", "9"]) == 2
    )
    assert "weights.bin" in capsys.readouterr().err


def test_log_and_metrics() -> None:
    Path("in/3.png").write_text("no image")
    assert batch("--log", "log", "--metrics", "metrics.prom") == 1
    lines = [json.loads(line) for line in Path("log").read_text().splitlines()]
    assert [line["item"] for line in lines if line["event"] == "failed"] == [3]
    assert sorted(line["item"] for line in lines if line["event"] == "done") == [0, 1, 2, 4, 5]
    assert lines[-1]["event"] == "end" and lines[-1]["text"].startswith("5 of 6 items done, 1 failed")
    values = dict(line.split() for line in Path("metrics.prom").read_text().splitlines() if line[0] != "#")
    expected = {"items": "6", "items_done_total": "5", "items_failed_total": "1", "particle_steps_total": "110"}
    assert expected.items() <= {key.removeprefix("rlsd_batch_"): value for key, value in values.items()}.items()
    assert values["rlsd_batch_running"] == "0" and not list(Path().glob("metrics.prom.*"))


def test_metrics_over_http() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with monitored(7, Console(quiet=True), None, str(port)) as monitor:
        monitor(Event("done", 3, "x"))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            text = answer.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/")
    assert "rlsd_batch_items 7\n" in text and "rlsd_batch_items_done_total 1\n" in text
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1)


def test_metrics_that_cannot_be_written_stop_nothing(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("there").mkdir()
    monkeypatch.setattr(Monitor, "look", lambda self: shutil.rmtree("there", ignore_errors=True))
    assert batch("--metrics", "there/metrics") == 0
    assert "metrics there/metrics cannot be written: No such file" in capsys.readouterr().err
    if os.path.exists("/dev/full"):
        assert batch("--log", "/dev/full", out="other") == 0
        assert "log cannot be written: No space left on device; the batch goes on" in capsys.readouterr().err


def test_workers_share_processors_and_devices() -> None:
    facts = batches.facts_of(Path("bundle"))
    given = batches.Batch(work("out"), ["in"], workers=3)
    assert [each.threads for each in batches.works_of(given, facts)] == [1, 1, 1]
    for_cuda = batches.Facts(facts.frame, facts.operators, (), 100, True)
    assert [each.device for each in batches.works_of(given, for_cuda)] == ["cuda:0", "cuda:1", "cuda:2"]
    given = batches.Batch(work("out"), ["in"], workers=3, devices=["cuda:1", "cuda:3"])
    assert [each.device for each in batches.works_of(given, for_cuda)] == ["cuda:1", "cuda:3", "cuda:1"]
