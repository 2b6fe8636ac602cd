"""Writes a checkpoint in diffusers layout with random weights: Stable Diffusion's architectures at full size.

    python -m rlsd.export.random_checkpoint sd15|sd21-base --out FOLDER

For sizes, times and exports where the real weights are not at hand; it draws noise, not pictures. Weights in halves,
about 1.9 GB. The sizes are those of the published configurations.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

UNETS: dict[str, dict] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21-base": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
}
TOKENS = 77


def write(kind: str, out: Path, seed: int = 0) -> None:
    """Writes unet, vae, scheduler and a random null context to the folder `out`."""
    torch.manual_seed(seed)
    settings = UNETS[kind]
    unet = UNet2DConditionModel(sample_size=64, block_out_channels=(320, 640, 1280, 1280), **settings)
    unet.half().save_pretrained(out / "unet")
    del unet
    build_vae().half().save_pretrained(out / "vae")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    ).save_pretrained(out / "scheduler")
    (out / "context").mkdir()
    save_file(
        {"context": torch.randn(1, TOKENS, settings["cross_attention_dim"]).half()},
        out / "context" / "context.safetensors",
    )
    (out / "context" / "config.json").write_text(json.dumps({"names": ["null"], "null": 0}) + "\n")


def build_vae() -> AutoencoderKL:
    """Stable Diffusion's autoencoder: [B, 3, 512, 512] <-> [B, 4, 64, 64], 83.7 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )


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
