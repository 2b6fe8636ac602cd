"""`rlsd batch`: wrong options claim no folder, whatever finds out that they are wrong."""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from batch_case import batch, bundle, contents, here  # noqa: F401
from PIL import Image

from rlsd.pipeline import batch as batches
from rlsd.pipeline import cli
from rlsd.pipeline.batch_list import list_inputs
from rlsd.pipeline.batch_work import Work
from rlsd.pipeline.settings import settings_for
from rlsd.pipeline.tasks import TASKS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mask", "wide.png"], "wide.png: has the shape 1 x 4 x 9; 1 x 4 x 4 is wanted"),
        (["--mask", "bundle/manifest.txt"], "manifest.txt is not a PNG, JPEG, TIFF, NPY or DICOM file"),
        (["--prompt", "a cat"], "names no text encoder"),
        (["--prompt", "a cat", "--workers", 2], "names no text encoder"),
        (["--measured"], "task random needs the operator's mask [1, 4, 4]: give it with --mask FILE"),
        (["--log", "no/where"], "log no/where cannot be written"),
        (["--metrics", 80000], "metrics 80000 cannot be offered"),
        (["--threads", -1], "threads is -1; allowed are 0"),
        (["--device", "cuda:0"], "device is 'cuda:0'"),
        (["-i", "bundle"], "input bundle is a folder among 2 inputs; allowed are one folder or files"),
    ],
)  # fmt: skip
def test_a_wrong_option_leaves_the_folder_free(capsys: pytest.CaptureFixture[str], words, message: str) -> None:
    Image.fromarray(np.full((4, 9), 255, np.uint8)).save("wide.png")
    assert batch(*words, source="in/0.png", out="new/out") == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("rlsd: ") and said.count("\n") == 1
    assert not Path("new").exists()


@pytest.mark.parametrize(("task", "name", "shape", "value"), [
    ("quantise", "levels", (1,), 1), ("jpeg", "tables", (1, 8, 8), 0),
])  # fmt: skip
def test_a_parameter_that_no_operator_takes_leaves_the_folder_free(capsys, task, name, shape, value) -> None:
    np.save("p.npy", np.full(shape, value, np.float32))
    words = ["-m", "fashion", "-t", task, "-i", "in", "-o", "out", "--param", f"{name}=p.npy"]
    assert cli.run(["batch", *words]) == 2
    assert f"p.npy has values that the parameter {name} cannot have" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_folder_is_given_up_only_if_nothing_is_in_it() -> None:
    Path("out").mkdir()
    assert batch("--threads", -1) == 2 and os.listdir("out") == []
    assert batch("--seed", 1) == 0
    before = contents(Path("out"))
    assert batch("--seed", 1, "--threads", -1) == 0 and contents(Path("out")) == before  # there is nothing left to do
    shutil.rmtree("out/items/000003-3")
    assert batch("--seed", 1, "--threads", -1) == 2 and Path("out/run.json").exists()


@pytest.mark.parametrize(("out", "code", "message"), [
    ("in/0.png/out", 2, "0.png is a file; a folder is wanted"),
    ("/proc/nope/out", 1, "/proc/nope: cannot be made: No such file or directory\n"),
])  # fmt: skip
def test_a_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str], out: str, code: int, message: str) -> None:
    assert batch(out=out) == code
    assert message in capsys.readouterr().err


def test_a_port_is_no_file_in_the_output_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    Path("here").mkdir()
    monkeypatch.chdir("here")
    words = ["-m", "../bundle", "-t", "half", "-i", "../in/0.png", "-o", ".", "-n", "1", "--steps", "3"]
    assert cli.run(["batch", *words, "--metrics", str(port)]) == 0


def test_help_tells_of_batches_own_rules(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["batch", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "of the same batch" in said and "A manifest's column `mask`" in said and "once for each" not in said


def test_the_text_encoder_is_part_of_what_a_batch_is() -> None:
    settings = settings_for(TASKS["half"], "fashion", {"prompt": "a cat", "text_encoder": "sd"})
    given = batches.Batch(Work("bundle", "half", settings, "out"), ["in"])
    assert batches.identity(given, list_inputs(["in"], None, ()))["text_encoder"] == "sd"


@pytest.mark.parametrize(
    "change",
    [
        {"measured": True}, {"pictures": True}, {"given": {}}, {"given": {"mask": "in/1.png"}}, {"task": "half"},
        {"bundle": "other"}, {"settings": settings_for(TASKS["random"], "fashion", {"seed": 1})},
    ],
)  # fmt: skip
def test_what_decides_the_bytes_makes_another_batch(change: dict) -> None:
    """Else a run would go on with what another one left."""
    shutil.copytree("bundle", "other")
    with open("other/manifest.txt", "a") as file:
        file.write("info of another\n")
    settings, listing = settings_for(TASKS["random"], "fashion", {}), list_inputs(["in"], None, ())
    given = batches.Batch(Work("bundle", "random", settings, "out", given={"mask": "in/0.png"}), ["in"])
    changed = replace(given, work=replace(given.work, **change))
    assert batches.identity(changed, listing) != batches.identity(given, listing)
    apart = replace(given, work=replace(given.work, threads=2, snapshot_every=1.0, window=7, device="cuda:1"))
    assert batches.identity(apart, listing) == batches.identity(given, listing)
