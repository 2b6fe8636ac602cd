"""What tests of the engine's calls share: tiny networks, their bundle, and settings for a short run."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnx")
from bundle_factory import write_bundle
from tiny import make_nets

from rlsd.engine import Params

NETS = make_nets()
PARAMS = Params(steps=21, gamma=3.0, lr_x=0.05, lr_z=0.05)


@pytest.fixture(name="bundle", scope="module")
def bundle_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle", NETS, 3)
