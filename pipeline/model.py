"""Finds and opens bundles: the shipped ones by name, others by folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import rlsd.models
from rlsd.engine import Engine
from rlsd.engine.files import MANIFEST
from rlsd.pipeline.errors import InputError


def shipped() -> dict[str, Path]:
    """The priors that come with the package: name -> bundle."""
    folders = sorted(folder for root in rlsd.models.__path__ for folder in Path(root).iterdir())
    return {folder.name: folder / "bundle" for folder in folders if (folder / "bundle" / MANIFEST).is_file()}


def find_bundle(model: str) -> Path:
    """The bundle of a shipped prior, or the folder itself. InputError when it is neither."""
    known = shipped()
    if model in known:
        return known[model]
    path = Path(model)
    if path.is_file():
        raise InputError(f"model {model} is a file; a bundle is a folder")
    if not (path / MANIFEST).is_file():
        names = ", ".join(known) or "none here"
        what = f"has no {MANIFEST}" if path.is_dir() else "does not exist"
        raise InputError(f"model {model} {what}: give a shipped prior ({names}) or the folder of a bundle")
    return path


def open_model(
    model: str, *, device: str | None = None, threads: int = 0, log: Callable[[str], None] | None = None
) -> Engine:
    """Opens a shipped prior or a bundle; every file of it is verified. InputError or RlsdError."""
    if not 0 <= threads <= 1024:
        raise InputError(f"threads is {threads}; allowed are 0 (one per processor) to 1024")
    return Engine(find_bundle(model), device=device, threads=threads, log=log)
