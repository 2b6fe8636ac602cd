"""Writes a checkpoint in diffusers layout with random weights: Stable Diffusion's architectures at full size.

    python -m rlsd.export.random_checkpoint sd15|sd21-base|sdxl --out FOLDER

For sizes, times and exports where the real weights are not at hand; it draws noise, not pictures. Weights in halves,
about 1.9 GB, and 5.3 GB for sdxl. The sizes are those of the published configurations. A seed gives the same weights
with every version of torch, whose own generator does not promise that: bundles of two machines can be compared.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

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


Network = TypeVar("Network", bound=nn.Module)


def write(kind: str, out: Path, seed: int = 0) -> None:
    """Writes unet, vae, scheduler and a random null context to the folder `out`."""
    bits = np.random.PCG64(seed)
    unet = drawn(lambda: UNet2DConditionModel(**UNETS[kind]), bits)
    unet.save_pretrained(out / "unet")
    drawn(lambda: build_vae(**VAES.get(kind, {})), bits).save_pretrained(out / "vae")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    ).save_pretrained(out / "scheduler")
    (out / "context").mkdir()
    rows = (1, TOKENS + pooled_rows(unet.config), unet.config.cross_attention_dim)
    save_file({"context": uniform(bits, rows, math.sqrt(3))}, out / "context" / "context.safetensors")
    (out / "context" / "config.json").write_text(json.dumps({"names": ["null"], "null": 0}) + "\n")


def drawn(build: Callable[[], Network], bits: np.random.BitGenerator) -> Network:
    """What `build` makes, in halves, with weights from `bits`: uniform within 1 / sqrt(inputs), as torch begins.

    Norms begin with ones and zeros, what has no inputs (tokens, positions) within 0.05.
    Raises NotImplementedError for a network with buffers.
    """
    with torch.device("meta"):
        network = build().half()
    network.to_empty(device="cpu")
    if names := [name for name, _ in network.named_buffers()]:
        raise NotImplementedError(f"buffers are not drawn: {', '.join(names)}")
    for module in network.modules():
        weight = getattr(module, "weight", None)
        inputs = math.prod(weight.shape[1:]) if isinstance(weight, Tensor) and weight.dim() > 1 else 0
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("weight", "bias") and not inputs:
                parameter.data.fill_(1 if name == "weight" else 0)
            else:
                bound = inputs**-0.5 if name in ("weight", "bias") else 0.05
                parameter.data.copy_(uniform(bits, parameter.shape, bound))
    return network


def uniform(bits: np.random.BitGenerator, shape: Sequence[int], bound: float) -> Tensor:
    """Halves [*shape] between -bound and bound, four of each 64-bit word that the generator gives."""
    count = math.prod(shape)
    words = bits.random_raw(-(-count // 4)).astype("<u8").view("<u2")[:count]
    values = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2 * bound / 65536) - np.float32(bound)
    return torch.from_numpy(values.astype(np.float16)).reshape(*shape)


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
