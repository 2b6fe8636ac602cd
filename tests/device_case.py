"""What the tests of the engine on CUDA share: a bundle of tiny networks, and the stand-in for the driver."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("onnx")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter, which a GPU switches off", allow_module_level=True)

import fake_cuda
from bundle_factory import write_bundle
from device_terms import PARAMS, TOLERANCE, difference  # noqa: F401
from hosted import hosted_bundle
from tiny import make_job, make_nets

from rlsd.engine import Params

NETS = make_nets()


@pytest.fixture(name="bundle", scope="module")
def bundle_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return hosted_bundle(write_bundle(folder / "cpu", NETS, 1, 2, 4), folder / "cuda")


@pytest.fixture(name="fake")
def fake_fixture(monkeypatch: pytest.MonkeyPatch):
    """The stand-in, in its first state; afterwards nothing may be left over and no fault have been seen."""
    driver = fake_cuda.load()
    driver.reset()
    driver.run_kernels()
    monkeypatch.setenv("RLSD_LIBCUDA", driver.path)
    yield driver
    driver.check()
    assert driver.live() == ""


def jobs_of_all_kinds():
    common = {"params": Params(gamma=2.0, **PARAMS)}
    return [
        make_job(NETS, "saturate", particles=3, item=1, **common),
        make_job(NETS, "inpainting", particles=1, item=2, params=Params(**{**PARAMS, "steps": 3})),
        make_job(NETS, "inpainting", particles=5, item=3, params=Params(gamma=2.0, repulsion="latent", **PARAMS)),
        make_job(NETS, "inpainting", particles=2, item=4, params=Params(variant="rlsd-nonaug", **PARAMS)),
    ]
