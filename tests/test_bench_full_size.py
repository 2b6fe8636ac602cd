"""The command that exports networks at their published sizes, on a small checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
import checkpoints

from rlsd.bench import full_size
from rlsd.export.random_checkpoint import UNETS
from rlsd.pipeline.tasks import TASKS

OPERATORS = ("inpainting", "luminance")


def here(act: Callable[..., dict], *given: Any) -> dict[str, Any]:
    """In place of a process of its own, which would import torch again."""
    return full_size._measured(act, given)


def test_every_stage_leaves_a_line_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size, "apart", here)
    checkpoint = checkpoints.stable_diffusion(tmp_path / "thin", text=False)
    words = ["--checkpoint", str(checkpoint), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "lines")]
    full_size.main([*words, "--size", "32", "--small", "16", "--operators", *OPERATORS])
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [(line["stage"], line["size"]) for line in lines] == [
        ("export", 32), ("open", 32), ("export", 16), ("step", 16)
    ]  # fmt: skip
    assert all(line["network"] == "thin" and line["seconds"] >= 0 and line["most_gib"] > 0.1 for line in lines)
    assert lines[0]["operators"] == lines[1]["operators"] == list(OPERATORS)
    assert set(lines[0]["errors"]) == {"denoiser", "decoder", "decoder_pull", "operators.forward", "operators.loss"}
    assert all(0 <= error < 1e-4 for error in lines[0]["errors"].values()) and lines[1]["image"] == [3, 32, 32]
    assert lines[3]["tasks"] == [task.name for task in TASKS.values() if task.operator in OPERATORS]
    assert not (tmp_path / "work").exists() and checkpoint.is_dir()


def test_a_stage_runs_in_a_process_of_its_own() -> None:
    line = full_size.apart(dict, {"said": 1})
    assert line["said"] == 1 and 0 < line["most_gib"] < 0.5 and line["seconds"] < 5


@pytest.mark.parametrize(("family", "millions"), [("sd15", 860), ("sd21-base", 866), ("sdxl", 2567)])
def test_the_published_configurations_have_the_published_numbers_of_weights(family: str, millions: int) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[family])
    assert round(sum(weight.numel() for weight in unet.parameters()) / 1e6) == millions
