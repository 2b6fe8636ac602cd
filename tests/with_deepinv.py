"""Imports deepinv for the tests, or skips the module that imports this one.

`make test` puts deepinv into a folder of its own, out of the way of all other tests: on a machine without a GPU the
package index has only a torchvision whose compiled part needs CUDA's libraries. Its Python part is all that deepinv
uses, and can be imported once the two operators that it describes are declared; who calls one gets an error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder, MetadataPathFinder
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
FOLDER = Path(sys.prefix) / "deepinv"


class Apart:
    """Finds what is in FOLDER and nowhere else; sys.path stays as it is, which tests hand to other processes."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(FOLDER)], target) if path is None else None

    @staticmethod
    def find_distributions(context: DistributionFinder.Context) -> Iterable[Distribution]:
        there = DistributionFinder.Context(name=context.name, path=[str(FOLDER)])
        return MetadataPathFinder.find_distributions(there)


if FOLDER.is_dir() and Apart.__name__ not in {getattr(finder, "__name__", "") for finder in sys.meta_path}:
    sys.meta_path.append(Apart)  # type: ignore[arg-type]
    if torch.version.cuda is None:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
deepinv = pytest.importorskip("deepinv")
