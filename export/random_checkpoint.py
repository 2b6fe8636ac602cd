"""Writes a checkpoint in diffusers layout with random weights: Stable Diffusion's architectures at full size.

    python -m rlsd.export.random_checkpoint sd15|sd21-base|sdxl --out FOLDER

For sizes, times and exports where the real weights are not at hand; it draws noise, not pictures. Weights in halves,
about 1.9 GB, and 5.3 GB for sdxl. The sizes are those of the published configurations.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

from rlsd.export.contexts import TOKENS
from rlsd.export.diffusers_unet import pooled_rows

_FIRST: dict = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280)}
UNETS: dict[str, dict] = {
    "sd15": {**_FIRST, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21-base": {
        **_FIRST,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAES: dict[str, dict] = {"sdxl": {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}}


def write(kind: str, out: Path, seed: int = 0) -> None:
    """Writes unet, vae, scheduler and a random null context to the folder `out`."""
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float16)  # or SDXL's UNet would take 10 GB of memory
    try:
        unet = UNet2DConditionModel(**UNETS[kind])
        vae = build_vae(**VAES.get(kind, {}))
    finally:
        torch.set_default_dtype(torch.float32)
    unet.save_pretrained(out / "unet")
    vae.save_pretrained(out / "vae")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    ).save_pretrained(out / "scheduler")
    (out / "context").mkdir()
    save_file(
        {"context": torch.randn(1, TOKENS + pooled_rows(unet.config), unet.config.cross_attention_dim).half()},
        out / "context" / "context.safetensors",
    )
    (out / "context" / "config.json").write_text(json.dumps({"names": ["null"], "null": 0}) + "\n")


def build_vae(**changes: object) -> AutoencoderKL:
    """Stable Diffusion's autoencoder: [B, 3, 512, 512] <-> [B, 4, 64, 64], 83.7 M parameters."""
    settings: dict = dict(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    return AutoencoderKL(**{**settings, **changes})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(UNETS))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    write(args.kind, args.out)


if __name__ == "__main__":
    main()
