"""The command line on the stand-in engine, in a folder of its own: shared by the tests of `rlsd`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipeline_fake import FakeEngine, make_bundle

from rlsd.pipeline import cli, model

FAKE: dict = {}  # options of every stand-in that is opened


class Engine(FakeEngine):
    def __init__(self, bundle, **options):
        super().__init__(bundle, **options, **FAKE)


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch) -> Path:
    """A working folder with a bundle and an image; every bundle opens as the stand-in."""
    FAKE.clear()
    monkeypatch.setattr(model, "Engine", Engine)
    monkeypatch.chdir(tmp_path)
    make_bundle(tmp_path / "bundle")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)).save("a.png")
    return tmp_path


def rlsd(*words: str) -> int:
    """The exit code of `rlsd WORDS`."""
    return cli.run([str(word) for word in words])


def reconstruct(*words: str, task="random", source="a.png", out="out", bundle="bundle") -> int:
    """The exit code of a short `rlsd reconstruct`."""
    return rlsd("reconstruct", "-m", bundle, "-t", task, "-i", source, "-o", out, "--steps", "4", *words)


def files_in(folder: Path) -> set[str]:
    """All that lies below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
