"""A folder with a tiny bundle and images, and `rlsd batch` on it: shared by the tests of batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_factory import write_bundle
from PIL import Image
from tiny import make_nets

from rlsd.pipeline import cli


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle."""
    return write_bundle(tmp_path_factory.mktemp("batch") / "bundle", make_nets(), 1, 4)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    """A new working folder, with six images in the folder `in` and the bundle as `bundle`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle").symlink_to(bundle)
    (tmp_path / "in").mkdir()
    for index in range(6):
        Image.fromarray(picture(index)).save(tmp_path / "in" / f"{index}.png")


def picture(seed: int) -> np.ndarray:
    """uint8 [4, 4]."""
    return np.random.default_rng(seed).integers(0, 256, (4, 4), np.uint8)


def batch(*words: Any, source: Any = "in", out: Any = "out", task: str = "random") -> int:
    """The exit code of a short `rlsd batch`."""
    given = ["-m", "bundle", "-t", task, "-i", source, "-o", out, "-n", 2, "--steps", 12, "--threads", 1, *words]
    return cli.run(["batch", *map(str, given)])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, by its path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """What a finished item holds."""
    with np.load(folder / "arrays.npz") as file:
        return dict(file)


def failures(out: Path) -> dict[str, str]:
    """Each failed item's error, by name."""
    lines = (out / "failures.jsonl").read_text().splitlines()
    return {each["name"]: each["error"] for each in map(json.loads, lines)}


def record(out: Path, name: str) -> dict[str, Any]:
    """An item's item.json."""
    found: dict[str, Any] = json.loads((out / "items" / name / "item.json").read_text())
    return found
