"""Which scheduler configurations give a bundle its table abar, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from rlsd.export import CheckpointError  # noqa: E402
from rlsd.export.diffusers_unet import load_schedule  # noqa: E402

PLAIN = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def schedule(folder: Path, **changes: Any) -> Any:
    """The schedule of Stable Diffusion's configuration with changes."""
    (folder / "scheduler_config.json").write_text(json.dumps(PLAIN | changes))
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
