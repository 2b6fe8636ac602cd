"""The page on deepinv: every piece of code on it, as it stands there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from with_deepinv import deepinv  # isort: skip
import torch
from bundle_factory import manifest
from PIL import Image
from typer.testing import CliRunner

from rlsd.models import fashion
from rlsd.pipeline import model
from rlsd.pipeline.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "deepinv.md"
FIRST, SCAN, SECOND = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
FASHION = Path(next(iter(fashion.__path__)))


@pytest.fixture(scope="module")
def one_batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped prior with one of its batches, so that an export takes a third of the time."""
    folder = tmp_path_factory.mktemp("models") / "fashion"
    shutil.copytree(FASHION / "test_images", folder / "test_images")
    bundle, source = folder / "bundle", FASHION / "bundle"
    bundle.mkdir()
    lines = [line.split() for line in (source / "manifest.txt").read_text().splitlines()[1:-1]]
    facts = [words for words in lines if words[0] not in ("graph", "check", "file") or words[2] == "8"]
    dropped = {words[3] for words in lines if words[0] == "graph" and words[2] != "8"}
    files = {file.name: file.read_bytes() for file in source.iterdir() if file.name not in {*dropped, "manifest.txt"}}
    for name, content in files.items():
        (bundle / name).write_bytes(content)
    (bundle / "manifest.txt").write_bytes(manifest([" ".join(words) for words in facts], files))
    return bundle


@pytest.fixture(autouse=True)
def here(one_batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "shipped", lambda: {"fashion": one_batch})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def printed(code: str, capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    """What the code prints: name: figure dB."""
    space: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), space)
    found = re.findall(r"^(.+): (-?[\d.]+) dB$", capsys.readouterr().out, re.M)
    return {name: float(value) for name, value in found}


def test_tomography_and_mri(capsys: pytest.CaptureFixture[str]) -> None:
    figures = printed(FIRST, capsys)
    assert figures.keys() == {"ct", "mri"}
    assert min(figures.values()) > 20


def test_reconstructor_beside_a_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    figures = printed(SECOND, capsys)
    assert figures["RLSD"] > figures["total variation"] + 2 > figures["back-projection"] + 2


def test_command_line(one_batch: Path, tmp_path: Path) -> None:
    (tmp_path / "scan.py").write_text(SCAN)
    shutil.copy(next((one_batch.parent / "test_images").iterdir()), tmp_path / "photo.png")
    line = next(line for line in PAGE.read_text().splitlines() if "rlsd reconstruct" in line)
    words = [*line.split()[1:], "--steps", "60", "--particles", "2"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    arrays = np.load(tmp_path / "result" / "photo" / "arrays.npz")
    photo = np.asarray(Image.open(tmp_path / "photo.png").convert("L"), np.float32) / 255
    image = torch.from_numpy(np.pad(photo, 2))[None, None]
    y = deepinv.physics.Tomography(angles=12, img_width=32, normalize=True).A(image)[0].numpy()
    assert arrays["y"].shape == y.shape and np.abs(arrays["y"] - y).max() < 0.06  # noise of 0.01
    assert arrays["particles"].shape == (2, 1, 32, 32)
