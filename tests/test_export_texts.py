"""Text encoders of SDXL whose configurations are unusual, against its own pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import checkpoints  # noqa: E402
from diffusers import StableDiffusionXLPipeline  # noqa: E402
from transformers import CLIPTextModel  # noqa: E402

from rlsd.export import CheckpointError  # noqa: E402
from rlsd.export.contexts import TextEncoder  # noqa: E402


def test_xl_sees_what_fills_a_prompt_up_whatever_its_encoder_says(tmp_path: Path) -> None:
    """Stable Diffusion's pipeline obeys use_attention_mask, that of SDXL does not know it."""
    checkpoints.diffusion_xl(tmp_path / "xl")
    config = checkpoints.text_config(num_hidden_layers=3, use_attention_mask=True)
    CLIPTextModel(config).save_pretrained(tmp_path / "xl" / "text_encoder")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "xl")
    with torch.no_grad():
        want = pipeline.encode_prompt("a red cat", device="cpu", do_classifier_free_guidance=False)[0][0]
    got = TextEncoder(tmp_path / "xl").encode("a red cat")
    assert torch.allclose(got[: len(want)], want, atol=1e-5)


def test_xls_encoders_take_equally_many_tokens(tmp_path: Path) -> None:
    checkpoints.diffusion_xl(tmp_path / "xl")
    config = checkpoints.text_config(num_hidden_layers=3, max_position_embeddings=40)
    CLIPTextModel(config).save_pretrained(tmp_path / "xl" / "text_encoder")
    with pytest.raises(CheckpointError, match="take 40 and 77 tokens"):
        TextEncoder(tmp_path / "xl")
