"""The command line with a stand-in engine: what it writes, what it refuses, and how it ends."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from pipeline_fake import FakeEngine, make_bundle
from rlsd.engine import RlsdError, Status
from rlsd.pipeline import cli, model

FAKE: dict = {}


class Engine(FakeEngine):
    def __init__(self, bundle, **options):
        super().__init__(bundle, **options, **FAKE)


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """A working folder with a bundle and an image; every bundle opens as the stand-in."""
    FAKE.clear()
    monkeypatch.setattr(model, "Engine", Engine)
    monkeypatch.chdir(tmp_path)
    make_bundle(tmp_path / "bundle")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)).save("a.png")
    return tmp_path


def rlsd(*words: str) -> int:
    return cli.run([str(word) for word in words])


def reconstruct(*words: str, task="random", source="a.png", out="out", bundle="bundle") -> int:
    return rlsd("reconstruct", "-m", bundle, "-t", task, "-i", source, "-o", out, "--steps", "4", *words)


def files_in(folder) -> set:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ------------------------------------------------------------------ what it writes


def test_reconstruct_writes_pictures_and_reports(work, capsys):
    Image.fromarray(np.zeros((50, 40, 3), np.uint8)).save("b.jpg")
    code = rlsd(
        "reconstruct", "--model", "bundle", "--task", "random", "--input", "a.png", "b.jpg", "--out", "out",
        "--steps", "4", "--particles", "3", "--seed", "7", "--sigma", "0.05", "--gamma", "2", "--class", "dog",
    )  # fmt: skip
    assert code == 0
    assert {"a", "b", "report.json", "report.html"} <= files_in(work / "out")
    assert "out/report.html" in capsys.readouterr().out
    report = json.loads((work / "out/report.json").read_text(), parse_constant=pytest.fail)
    (task,) = report["tasks"]
    assert (task["particles"], task["seed"], task["sigma"], task["gamma"], task["steps"]) == (3, 7, 0.05, 2, 4)
    assert task["class"] == "dog" and task["lambda"] == 0.15
    assert [entry["name"] for entry in report["items"]] == ["a", "b"]
    assert report["items"][0]["sha256"] == sha256(work / "a.png")
    assert report["bundle"]["manifest_sha256"] == sha256(work / "bundle/manifest.txt")
    assert "colour turned to gray" in report["items"][1]["notes"]
    assert {"rlsd", "numpy", "python", "onnxruntime"} <= set(report["versions"])
    assert {"processor", "cores", "memory"} <= set(report["machine"])
    assert report["time"]["thread_seconds"]["denoiser"] == 0.25 and report["time"]["particle_steps"] == 18


def sha256(path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


class Links(HTMLParser):
    """Collects what a page refers to, and checks that its tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.links, self.open = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [value for key, value in attributes if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_sound_and_its_pictures_are_there(work):
    Image.fromarray(np.zeros((28, 28), np.uint8)).save("x<b>&y.png")
    assert reconstruct(source="x<b>&y.png") == 0
    page = Links()
    page.feed((work / "out/report.html").read_text())
    assert page.open == [] and any(link.endswith("grid.png") for link in page.links)
    for link in page.links:
        assert (work / "out" / link).is_file()
    assert "<b>&y" not in (work / "out/report.html").read_text()


def test_measured_input_with_a_mask(work):
    mask = np.zeros((28, 28), np.uint8)
    mask[10:] = 255
    Image.fromarray(mask).save("mask.png")
    assert reconstruct("--measured", "--mask", "mask.png", "-n", "2") == 0
    with np.load("out/a/arrays.npz") as arrays:
        assert set(arrays) == {"particles", "latents", "y", "param.mask"}
        assert (arrays["y"][:, 2:12, 2:30] == 0).all()
    report = json.loads((work / "out/report.json").read_text())
    assert report["items"][0]["measured"] and "psnr" not in report["items"][0]
    assert report["tasks"][0]["parameter_files"]["mask"][0]["sha256"] == sha256(work / "mask.png")


def test_the_same_command_writes_the_same_bytes(work):
    for out in ("one", "two"):
        assert reconstruct(out=out) == 0
    for name in files_in(work / "one"):
        if (work / "one" / name).is_file() and not name.startswith("report"):
            assert (work / "one" / name).read_bytes() == (work / "two" / name).read_bytes(), name


def test_overwrite(work, capsys):
    assert reconstruct() == 0
    assert reconstruct() == 2
    assert "rlsd: output out is not empty: name another folder or add --overwrite" in capsys.readouterr().err
    assert reconstruct("--overwrite", "-n", "1") == 0
    assert "a/particle_01.png" not in files_in(work / "out")


def test_many_particles_have_names_in_order_and_a_grid_in_rows(work):
    assert reconstruct("-n", "101") == 0
    assert {"a/particle_000.png", "a/particle_100.png"} <= files_in(work / "out")
    assert max(Image.open("out/a/grid.png").size) < 2000


def test_help_and_version(capsys):
    assert rlsd("--version") == 0
    assert re.fullmatch(r"rlsd \d+\.\d+\.\d+\n", capsys.readouterr().out)
    for words in ((), ("reconstruct",), ("demo",), ("tasks",), ("info",), ("export",)):
        assert rlsd(*words, "--help") == 0
        assert len(capsys.readouterr().out) > 200


def test_tasks_and_info(capsys):
    assert rlsd("tasks") == 0
    both = capsys.readouterr().out
    assert "phase-retrieval" in both and "fashion" in both and "sd512" in both
    assert rlsd("tasks", "--model", "bundle") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["sr4"].split()[1] == "200"  # the settings' table comes last
    assert rlsd("info", "bundle") == 0
    shown = capsys.readouterr().out
    assert "28 x 28 are content" in shown and "2.0e-07" in shown and "mask 1 x 32 x 32" in shown
    assert rlsd("info") == 0
    assert "ONNX Runtime" in capsys.readouterr().out


def test_wildcards_may_follow_an_option():
    assert cli.spread(["x", "-i", "a", "b", "--out", "o", "-i", "c"], ("-i",)) == [
        "x", "-i", "a", "-i", "b", "--out", "o", "-i", "c",
    ]  # fmt: skip


# ------------------------------------------------------------------ what it refuses


def save(name: str, array) -> str:
    np.save(name, array)
    return name


BAD = {
    "no such model": (dict(bundle="nowhere"), (), "model nowhere does not exist: give a shipped prior"),
    "folder is no bundle": (dict(bundle="."), (), "model . has no manifest.txt: give a shipped prior"),
    "model is a file": (dict(bundle="a.png"), (), "model a.png is a file; a bundle is a folder"),
    "no such task": (dict(task="halve"), (), "task 'halve' is not known: choose one of half, "),
    "bundle lacks it": (dict(task="hdr"), (), "task hdr needs the operator hdr, which this bundle lacks"),
    "missing file": (dict(source="no.png"), (), "no.png does not exist"),
    "folder as file": (dict(source="bundle"), (), "bundle is a folder; a file is wanted"),
    "not an image": (dict(source="bundle/manifest.txt"), (), "is not a PNG, JPEG, TIFF or NPY file"),
    "no particles": ({}, ("--particles", "0"), "particles is 0; allowed are 1 to 65536"),
    "negative noise": ({}, ("--sigma", "-0.1"), "sigma is -0.1; it must be 0 or more"),
    "one step": ({}, ("--steps", "1"), "steps is 1"),
    "too many steps": ({}, ("--steps", "5000"), "steps is 5000, allowed is 2 to 1000"),
    "negative repulsion": ({}, ("--gamma", "-1"), "gamma is -1"),
    "unknown variant": ({}, ("--variant", "x"), "variant is 'x'"),
    "unknown space": ({}, ("--repulsion", "x"), "repulsion is 'x'"),
    "unknown class": ({}, ("--class", "cow"), "class 'cow' is not known to the prior fake; its classes: cat, dog"),
    "guidance to nothing": ({}, ("--guidance", "3"), "guidance is 3, which needs a class to guide to"),
    "not a number": ({}, ("--particles", "many"), "Invalid value for '--particles'"),
    "unknown option": ({}, ("--particle", "3"), "No such option: --particle"),
    "threads": ({}, ("--threads", "-2"), "threads is -2"),
    "parameter without name": ({}, ("--param", "mask.npy"), "--param 'mask.npy' is not understood: NAME=FILE is wanted"),
    "unknown parameter": ({}, ("--param", "kernel=a.png"), "operator inpainting has no parameter 'kernel'"),
    "missing mask": ({}, ("--mask", "no.png"), "no.png does not exist"),
    "measured without mask": ({}, ("--measured",), "task random needs the operator's mask [1, 32, 32]: give it with --mask"),
    "output is a file": (dict(out="a.png"), (), "is a file; a folder is wanted"),
    "export sizes": (None, ("export", "--checkpoint", ".", "--out", "x", "--batch", "two"), "batch is 'two'"),
    "no command": (None, ("what",), "No such command 'what'"),
    "no task": (None, ("reconstruct", "-m", "bundle"), "Missing option"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_sentence_and_code_2(work, capsys, case):
    options, words, message = BAD[case]
    before = files_in(work)
    assert (rlsd(*words) if options is None else reconstruct(*words, **options)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("rlsd: ") and captured.err.count("\n") == 1 and captured.out == ""
    assert message in captured.err
    assert files_in(work) == before


@pytest.mark.parametrize(
    "array, words, message",
    [
        (np.zeros((9, 9)), (), "has the shape 9 x 9; 1 x 32 x 32 is wanted"),
        (np.full((32, 32), np.nan), (), "NaN or infinite; a measurement must be finite"),
        (np.array([{}], object), (), "cannot be read as NPY"),
    ],
)
def test_bad_measurements(work, capsys, array, words, message):
    np.save("y.npy", array, allow_pickle=True)
    save("mask.npy", np.ones((32, 32)))
    assert reconstruct("--measured", "--mask", "mask.npy", *words, source="y.npy") == 2
    error = capsys.readouterr().err
    assert error.startswith("rlsd: y.npy") and message in error
    assert not (work / "out").exists()


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.ones((16, 16)), "has the shape 16 x 16; 1 x 32 x 32 is wanted"),
        (np.full((32, 32), 0.5), "values other than 0 and 1"),
        (np.full((32, 32), np.inf), "NaN or infinite"),
    ],
)
def test_bad_masks(capsys, mask, message):
    assert reconstruct("--mask", save("mask.npy", mask)) == 2
    assert message in capsys.readouterr().err


def test_one_bad_file_among_many_stops_everything_before_it_starts(work, capsys):
    (work / "z.png").write_bytes(b"")
    assert rlsd("reconstruct", "-m", "bundle", "-t", "sr4", "-i", "a.png", "z.png", "-o", "out") == 2
    assert capsys.readouterr().err == "rlsd: z.png is empty\n"
    assert not (work / "out").exists()


@pytest.mark.parametrize(
    "status, code", [(Status.BAD_BUNDLE, 2), (Status.NO_RUNTIME, 2), (Status.RUNTIME_ERROR, 1), (Status.INTERNAL, 1)]
)
def test_errors_of_the_engine(monkeypatch, capsys, status, code):
    def refuse(*_, **__):
        raise RlsdError(status, "file x has another SHA-256")

    monkeypatch.setattr(model, "Engine", refuse)
    assert rlsd("info", "bundle") == code
    error = capsys.readouterr().err
    assert error.startswith("rlsd: file x has another SHA-256") and error.count("\n") == 1
    assert ("pip install 'rlsd[cpu]'" in error) == (status is Status.NO_RUNTIME)


# ------------------------------------------------------------------ how it ends


def test_an_item_that_fails_is_reported_and_the_others_are_written(work, capsys):
    FAKE["broken"] = [0]
    Image.fromarray(np.zeros((28, 28), np.uint8)).save("b.png")
    assert rlsd("reconstruct", "-m", "bundle", "-t", "sr4", "-i", "a.png", "b.png", "-o", "out", "--steps", "4") == 1
    assert "rlsd: a: item 0 became NaN" in capsys.readouterr().err
    report = json.loads((work / "out/report.json").read_text())
    assert [entry["name"] for entry in report["items"]] == ["b"] and report["failed"][0]["name"] == "a"
    assert "a failed" in (work / "out/report.html").read_text() and not (work / "out/a").exists()


def test_all_items_failing(work):
    FAKE["broken"] = [0]
    assert reconstruct() == 1
    assert files_in(work / "out") == {"report.json", "report.html"}


def test_an_interrupt_leaves_nothing_half_written(work, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    FAKE["on_tick"] = interrupt
    assert reconstruct() == 130
    assert capsys.readouterr().err == "rlsd: interrupted\n"
    assert not (work / "out").exists()


def test_a_fault_while_writing_leaves_nothing_half_written(work, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(28, "No space left on device", "arrays.npz")

    monkeypatch.setattr(np, "savez", fail)
    assert reconstruct() == 1
    assert capsys.readouterr().err == "rlsd: arrays.npz: No space left on device\n"
    assert not (work / "out").exists()


def test_a_fault_of_ours_shows_where(monkeypatch, capsys):
    monkeypatch.setattr(np, "savez", lambda *_, **__: 1 / 0)
    assert reconstruct() == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error and error.endswith("please report it with the lines above\n")


def test_export_says_what_is_missing():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from rlsd.pipeline.cli import run\n"
        "sys.exit(run(['export', '--checkpoint', '.', '--out', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "rlsd: export needs torch, which is not installed: pip install 'rlsd[export]'\n"
