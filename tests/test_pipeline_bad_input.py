"""Whatever is wrong with the input: one sentence on standard error, exit code 2, nothing written."""

import numpy as np
import pytest
from PIL import Image
from pipeline_cli import files_in, reconstruct, rlsd, work  # noqa: F401 (a fixture of all tests here)

from rlsd.engine import RlsdError, Status
from rlsd.pipeline import model


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
    "not an image": (dict(source="bundle/manifest.txt"), (), "is not a PNG, JPEG, TIFF, NPY or DICOM file"),
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
    "unknown option": ({}, ("--particle", "3"), "No such option"),
    "threads": ({}, ("--threads", "-2"), "threads is -2"),
    "parameter without name": ({}, ("--param", "m.npy"), "--param 'm.npy' is not understood: NAME=FILE is wanted"),
    "unknown parameter": ({}, ("--param", "kernel=a.png"), "operator inpainting has no parameter 'kernel'"),
    "missing mask": ({}, ("--mask", "no.png"), "no.png does not exist"),
    "measured without mask": ({}, ("--measured",), "needs the operator's mask [1, 32, 32]: give it with --mask"),
    "output is a file": (dict(out="a.png"), (), "is a file; a folder is wanted"),
    "export sizes": (None, ("export", "--checkpoint", ".", "--out", "x", "--batch", "two"), "batch is 'two'"),
    "no command": (None, ("what",), "No such command 'what'"),
    "no task": (None, ("reconstruct", "-m", "bundle"), "Missing option"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_sentence_and_code_2(tmp_path, capsys, case):
    options, words, message = BAD[case]
    before = files_in(tmp_path)
    assert (rlsd(*words) if options is None else reconstruct(*words, **options)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("rlsd: ") and captured.err.count("\n") == 1 and captured.out == ""
    assert message in captured.err
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    "array, words, message",
    [
        (np.zeros((9, 9)), (), "has the shape 9 x 9; 1 x 32 x 32 is wanted"),
        (np.full((32, 32), np.nan), (), "NaN or infinite; a measurement must be finite"),
        (np.array([{}], object), (), "cannot be read as NPY"),
    ],
)
def test_bad_measurements(tmp_path, capsys, array, words, message):
    np.save("y.npy", array, allow_pickle=True)
    save("mask.npy", np.ones((32, 32)))
    assert reconstruct("--measured", "--mask", "mask.npy", *words, source="y.npy") == 2
    error = capsys.readouterr().err
    assert error.startswith("rlsd: y.npy") and message in error
    assert not (tmp_path / "out").exists()


def test_a_blurred_measurement_without_the_border(tmp_path, capsys):
    kernel = np.zeros((9, 9))
    kernel[4, 4] = 1
    save("k.npy", kernel)
    words = ("--measured", "--param", "kernel=k.npy", "-n", "1")
    assert reconstruct(*words, task="motion-blur") == 2  # a.png is 28 x 28
    error = capsys.readouterr().err
    assert "has the shape 1 x 28 x 28; 1 x 32 x 32 is wanted, measured with the prior's black border" in error
    Image.fromarray(np.zeros((32, 32), np.uint8)).save("whole.png")
    assert reconstruct(*words, task="motion-blur", source="whole.png") == 0


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


def test_one_bad_file_among_many_stops_everything_before_it_starts(tmp_path, capsys):
    (tmp_path / "z.png").write_bytes(b"")
    assert rlsd("reconstruct", "-m", "bundle", "-t", "sr4", "-i", "a.png", "z.png", "-o", "out") == 2
    assert capsys.readouterr().err == "rlsd: z.png is empty\n"
    assert not (tmp_path / "out").exists()


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
