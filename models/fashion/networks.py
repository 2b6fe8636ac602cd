"""The two networks of the prior and its noise schedule, all from diffusers, and how they are written to disk."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlsd.models.fashion import CLASS_NAMES
from rlsd.models.fashion.classifier import Classifier
from rlsd.models.fashion.data import PAD

# diffusers' lazy imports show mypy placeholder classes without methods: its objects are Any to the type checker.
Vae = Any  # diffusers.AutoencoderKL
Unet = Any  # diffusers.UNet2DConditionModel
Schedule = Any  # diffusers.DDIMScheduler

NULL = len(CLASS_NAMES)  # row of the context table that means "any garment"
CONTEXT_WIDTH = 64


def build_vae(channels: int = 1, side: int = 32) -> Vae:
    """Images [B, channels, side, side] <-> latents [B, 4, side / 4, side / 4]; 0.68 M parameters."""
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=side,
    )


def build_scheduler() -> Schedule:
    """The noise schedule of Stable Diffusion 1.x and 2.x: what the method's published settings were tuned on."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )


class Prior(nn.Module):
    """Noise predictor eps(z_t, t, context) with its learned context table [classes + 1, 1, 64]; 3.92 M parameters."""

    def __init__(self, unet: Unet = None, classes: int = NULL, side: int = 32) -> None:
        super().__init__()
        self.unet: Unet = unet or UNet2DConditionModel(
            sample_size=side // 4,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(64, 128),
            layers_per_block=1,
            cross_attention_dim=CONTEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=16,
        )
        self.context = nn.Embedding(classes + 1, CONTEXT_WIDTH)

    def forward(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """z [B, 4, h, w], t int64 [B], labels int64 [B] in 0 .. classes (classes: null) -> eps like z."""
        return self.unet(z, t, self.context(labels)[:, None], return_dict=False)[0]


def write_checkpoint(
    out: Path,
    vae: Vae,
    prior: Prior,
    classifier: Classifier | None,
    names: Sequence[str] = CLASS_NAMES,
    padding: int = PAD,
) -> None:
    """Write everything as fp16 safetensors in the layout of diffusers; out is replaced as a whole at the end.

    names: of the classes, in the order of the context table. padding: black pixels on each side of the images.
    """
    new, old = out.with_name(f".{out.name}.new{os.getpid()}"), out.with_name(f".{out.name}.old{os.getpid()}")
    new.mkdir(parents=True)
    copy.deepcopy(vae).half().save_pretrained(new / "vae")
    copy.deepcopy(prior.unet).half().save_pretrained(new / "unet")
    build_scheduler().save_pretrained(new / "scheduler")
    if classifier is not None:
        copy.deepcopy(classifier).half().save_pretrained(new / "features")
    (new / "context").mkdir()
    table = prior.context.weight.detach().half()[:, None].contiguous()
    save_file({"context": table}, new / "context" / "context.safetensors")
    described = {"shape": list(table.shape), "names": [*names, "null"], "null": len(names)}
    (new / "context" / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    index: dict[str, object] = {
        "_class_name": "DiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if padding:
        index["image_padding"] = [padding] * 4
    (new / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[Vae, Prior, Schedule]:
    """Read VAE, noise predictor and schedule; fp32, eval mode."""
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    table = load_file(folder / "context" / "context.safetensors")["context"]
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    prior = Prior(unet, classes=len(table) - 1)
    with torch.no_grad():
        prior.context.weight.copy_(table[:, 0])
    return vae.eval(), prior.eval(), DDIMScheduler.from_pretrained(folder / "scheduler")
