"""Imports deepinv for the tests, or skips the module that imports this one.

`make test` puts deepinv into a folder of its own, out of the way of all other tests: on a machine without a GPU the
package index has only a torchvision whose compiled part needs CUDA's libraries. Its Python part is all that deepinv
uses, and can be imported once the two operators that it describes are declared; who calls one gets an error.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
FOLDER = Path(sys.prefix) / "deepinv"

if FOLDER.is_dir() and "deepinv" not in sys.modules:
    sys.path.append(str(FOLDER))
    if torch.version.cuda is None:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
deepinv = pytest.importorskip("deepinv")
