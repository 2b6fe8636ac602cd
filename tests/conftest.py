"""Without a GPU the Triton kernels run in interpreter mode, which has to be chosen before triton is imported."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for tests that import onnxruntime before anything of ours


@pytest.fixture(autouse=True)
def no_hazards(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the tests of kernels, every launch in the interpreter is watched for what a GPU may do otherwise."""
    if not request.path.name.startswith("test_kernels_") or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from kernel_watch import watched

    with watched():
        yield
