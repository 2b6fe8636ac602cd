"""The model for NVIDIA's Triton Inference Server, called as the server calls it, on the shipped bundle."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton_backend as backend

from rlsd.engine import Engine, Job, Params
from rlsd.pipeline.model import find_bundle

FOLDER = Path(__file__).parent.parent / "examples" / "triton-server" / "rlsd"
CONFIG = (FOLDER / "config.pbtxt").read_text()
SETTINGS = {"threads": "1", "params.steps": "12"}  # less than the page's, for speed
PARAMS = Params(steps=12, rho=0.1, gamma=5, lr_x=0.1, lr_z=0.05)
RIGHT = np.repeat(np.float32([[0, 1]]), 16, axis=1).repeat(32, axis=0)  # [32, 32]: the right half is seen


def tensors_of(kind: str) -> dict[str, str]:
    """config.pbtxt's inputs or outputs: name -> data type."""
    block = re.search(rf"^{kind} \[(.*?)^\]", CONFIG, re.S | re.M)
    return dict(re.findall(r'name: "(\w+)", data_type: (\w+)', block[1])) if block else {}


def model_config(**changes: str) -> str:
    """The JSON that the server makes of config.pbtxt, as far as the model reads it."""
    given = dict(re.findall(r'key: "([\w.]+)", value: { string_value: "([^"]*)" }', CONFIG)) | SETTINGS | changes
    return json.dumps({"name": "rlsd", "parameters": {name: {"string_value": text} for name, text in given.items()}})


@pytest.fixture(scope="module")
def code() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", backend)
        spec = importlib.util.spec_from_file_location("rlsd_triton_model", FOLDER / "1" / "model.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def opened(code: Any, kind: str = "CPU", **changes: str) -> Any:
    model = code.TritonPythonModel()
    args = {"model_config": model_config(**changes), "model_instance_kind": kind, "model_instance_device_id": "0"}
    model.initialize(args | {"model_name": "rlsd", "model_version": "1", "model_repository": "/models/rlsd"})
    return model


@pytest.fixture(scope="module")
def model(code: Any) -> Any:
    found = opened(code)
    yield found
    found.finalize()


def request(items: int = 1, operator: str = "inpainting", cancelled_at: int | None = None, **inputs: Any) -> Any:
    """A request as clients send it; inputs: arrays in place of the usual ones, None to leave one out."""
    usual: dict[str, Any] = {
        "y": np.stack([(RIGHT * (0.3 + i / 10)).ravel() for i in range(items)]),
        "operator": np.full((items, 1), operator.encode(), np.object_),
        "parameters": np.stack([RIGHT.ravel()] * items),
        "particles": np.full((items, 1), 2, np.int32),
        "seed": np.arange(items, dtype=np.uint64)[:, None],
    }
    given = {name: value for name, value in (usual | inputs).items() if value is not None}
    assert given.keys() <= tensors_of("input").keys()
    return backend.InferenceRequest([backend.Tensor(name, value) for name, value in given.items()], cancelled_at)


def outputs(response: Any) -> dict[str, np.ndarray]:
    assert not response.has_error(), response.error().message()
    found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
    assert found.keys() == tensors_of("output").keys()
    assert all(array.dtype == np.float32 for array in found.values())
    return found


def test_requests_share_the_engine_and_equal_it_alone(model: Any) -> None:
    """Two requests, of one item and of two, in one call: as many ticks as one alone, and the same bytes."""
    before = model.engine.stats()["ticks"]
    first, second = (outputs(each) for each in model.execute([request(), request(2)]))
    assert model.engine.stats()["ticks"] - before == PARAMS.steps - 1 + 1  # the last x needs one more
    assert first["images"].shape == (1, 2, 1, 32, 32) and second["images"].shape == (2, 2, 1, 32, 32)
    assert second["seconds"].shape == (2, 1) and (second["seconds"] > 0).all()
    y = (RIGHT * np.float32(0.4)).astype(np.float32)[None]
    job = Job(y, "inpainting", {"mask": RIGHT[None]}, particles=2, seed=1, params=PARAMS)
    with Engine(find_bundle("fashion"), threads=1) as engine:
        (alone,) = engine.reconstruct([job])
    np.testing.assert_array_equal(second["images"][1], alone.particles)
    np.testing.assert_array_equal(first["images"][0], second["images"][0])


def test_bad_requests_get_their_own_errors(model: Any) -> None:
    bad = {
        "operator is 'zoom'": request(operator="zoom"),
        "y has 5": request(y=np.zeros((1, 5), np.float32)),
        "y has a value": request(y=np.full((1, 1024), np.nan, np.float32)),
        "parameters has 5 values; operator inpainting takes 1024: mask": request(parameters=np.ones((1, 5), "f4")),
        "parameters has 0": request(parameters=None),
        "particles is 65; allowed is 1 to 64": request(particles=np.array([[65]], np.int32)),
        "different numbers of particles": request(2, particles=np.array([[1], [2]], np.int32)),
    }
    responses = model.execute([*bad.values(), request()])
    for message, response in zip(bad, responses):
        assert response.error().code() == backend.TritonError.INVALID_ARG
        assert message in response.error().message()
    assert np.isfinite(outputs(responses[-1])["images"]).all()


def test_defaults_and_operators_without_parameters(model: Any) -> None:
    y = np.zeros((1, 64), np.float32)
    plain = request(operator="superres4", y=y, parameters=None, particles=None, seed=None)
    (response,) = model.execute([plain])
    assert outputs(response)["images"].shape == (1, 4, 1, 32, 32)


def test_cancelled_request_is_dropped(model: Any) -> None:
    before = model.engine.stats()["particle_steps"]
    gone, stays = model.execute([request(cancelled_at=3), request()])
    assert gone.error().code() == backend.TritonError.CANCELLED
    assert outputs(stays)["images"].shape == (1, 2, 1, 32, 32)
    steps = model.engine.stats()["particle_steps"] - before
    assert 2 * (PARAMS.steps - 1) < steps < 3 * (PARAMS.steps - 1)


def test_not_finite_ends_one_request(model: Any) -> None:
    """A measurement that is finite but too large for the step: its request fails, the other is answered."""
    failed, fine = model.execute([request(y=np.full((1, 1024), 3e38, np.float32)), request()])
    assert failed.error().code() == backend.TritonError.INTERNAL
    assert np.isfinite(outputs(fine)["images"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bundle": "/nowhere"}, "/nowhere does not exist"),
        ({"params.stepps": "5"}, "params.stepps is no parameter"),
        ({"params.gamma": "-1"}, "gamma is -1"),
        ({"particles": "many"}, "many"),
        ({"kind": "GPU"}, "cuda"),
    ],
)
def test_bad_settings_fail_to_load(code: Any, changes: dict[str, str], message: str) -> None:
    with pytest.raises(backend.TritonModelException, match=message):
        opened(code, **changes)
