"""Which scheduler configurations give a bundle its table abar, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from rlsd.export import CheckpointError  # noqa: E402
from rlsd.export.diffusers_unet import LEAST, load_schedule  # noqa: E402

PLAIN = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def schedule(folder: Path, **changes: Any) -> Any:
    """The schedule of Stable Diffusion's configuration with changes; None leaves a field out."""
    config = {name: value for name, value in (PLAIN | changes).items() if value is not None}
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    return load_schedule(folder)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0}, "CogVideoXDDIMScheduler has no table"),
        ({"_class_name": "CogVideoXDPMScheduler"}, "CogVideoXDPMScheduler has no table"),
        ({"_class_name": "IPNDMScheduler"}, "IPNDMScheduler has no table"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type 'continuous'"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas True is not supported"),
    ],
)
def test_what_is_not_the_methods_schedule_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        schedule(tmp_path, **changes)


def test_what_a_sampler_says_of_no_flow_is_taken(tmp_path: Path) -> None:
    schedule(tmp_path, _class_name="EulerDiscreteScheduler", timestep_type="discrete", use_flow_sigmas=False)


@pytest.mark.parametrize("name", ["LCMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("field", ["beta_start", "beta_end"])
def test_betas_that_are_not_said_are_not_guessed(tmp_path: Path, name: str, field: str) -> None:
    """diffusers' own defaults differ: an LCMScheduler's is 0.00085 where a DDPMScheduler's is 0.0001."""
    for value in (None, "0.02"):
        with pytest.raises(CheckpointError, match=f"{field} {value!r} is not allowed"):
            schedule(tmp_path, _class_name=name, **{field: value})


def test_betas_that_need_no_ends_are_taken(tmp_path: Path) -> None:
    ends = {"beta_start": None, "beta_end": None}
    schedule(tmp_path, beta_schedule="squaredcos_cap_v2", **ends)
    table = schedule(tmp_path, trained_betas=[0.1, 0.2], num_train_timesteps=2, **ends).alphas_cumprod
    assert torch.allclose(table, torch.tensor([0.9, 0.72]).double())


@pytest.mark.parametrize("offset", ["null", "-1", "1.5", "[1]", '"x"', "true", "1000001"])
def test_an_offset_that_no_bundle_can_hold_is_refused(tmp_path: Path, offset: str) -> None:
    text = json.dumps(PLAIN)[:-1] + f', "steps_offset": {offset}}}'
    (tmp_path / "scheduler_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"steps_offset .* is not allowed: a whole number"):
        load_schedule(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2.0},
        {"beta_start": 0},
        {"beta_start": 1.5},
        {"beta_start": 0.01, "beta_end": -0.02, "beta_schedule": "linear"},
        {"trained_betas": [1, 2, 3]},
        {"trained_betas": [1.0, 0.5]},
        {"trained_betas": []},
        {"trained_betas": 0.1},
        {"trained_betas": [[0.1, 0.2], [0.1, 0.2]]},
        {"trained_betas": [0.1, 1.2, 0.3]},
        {"trained_betas": [0.1, 0.0, 0.3]},
        {"trained_betas": [0.1, float("nan")]},
    ],
)
def test_betas_that_give_no_table_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="its betas are not allowed"):
        schedule(tmp_path, **changes)


def test_betas_of_another_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        schedule(tmp_path, trained_betas="many")


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("count, rescaled", [(1000, False), (1000, True), (20000, False)])
def test_every_table_of_diffusers_is_taken(tmp_path: Path, kind: str, count: int, rescaled: bool) -> None:
    """Also one that becomes 0 in float32 long before its end."""
    changes = {"rescale_betas_zero_snr": rescaled, "prediction_type": "v_prediction", "num_train_timesteps": count}
    table = schedule(tmp_path, beta_schedule=kind, **changes).alphas_cumprod
    assert len(table) == count and table[0] < 1 and table[-1] >= LEAST and (table.diff() <= 0).all()
