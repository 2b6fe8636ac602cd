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


def test_a_checkpoint_is_exported_opened_and_takes_a_step(tmp_path: Path) -> None:
    checkpoint = checkpoints.stable_diffusion(tmp_path / "thin", text=False)
    exported = full_size.export(checkpoint, tmp_path / "bundle", 16, OPERATORS)
    assert exported["operators"] == list(OPERATORS) and exported["gib"] == full_size.size_of(tmp_path / "bundle")
    assert set(exported["errors"]) == {"denoiser", "decoder", "decoder_pull", "operators.forward", "operators.loss"}
    assert all(0 <= error < 1e-4 for error in exported["errors"].values())
    opened = full_size.open_bundle(tmp_path / "bundle")
    assert opened == {"latent": [4, 2, 2], "image": [3, 16, 16], "operators": list(OPERATORS)}
    done = full_size.step(tmp_path / "bundle")
    assert done == {"tasks": [task.name for task in TASKS.values() if task.operator in OPERATORS]}


@pytest.mark.parametrize(
    ("stages", "wanted"),
    [
        ((), [("checkpoint", None), ("export", 512), ("open", 512), ("export", 64), ("step", 64)]),
        (("--stages", "step"), [("checkpoint", None), ("export", 64), ("step", 64)]),
        (("--stages", "export"), [("checkpoint", None), ("export", 512)]),
    ],
)
def test_every_stage_leaves_a_line_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: tuple[str, ...], wanted: list
) -> None:
    def written(act: Callable[..., dict], *given: Any) -> dict[str, Any]:
        for folder in given:
            if isinstance(folder, Path):
                folder.mkdir(exist_ok=True)
        return {"act": act.__name__}

    monkeypatch.setattr(full_size, "apart", written)
    work, results = tmp_path / "work", tmp_path / "lines"
    full_size.main(["--family", "sdxl", "--work", str(work), "--results", str(results), *stages])
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["stage"], line["size"]) for line in lines] == wanted and not work.exists()
    acts = {"checkpoint": "write_checkpoint", "export": "export", "open": "open_bundle", "step": "step"}
    assert all(line["act"] == acts[line["stage"]] and line["network"] == "sdxl" for line in lines)


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
