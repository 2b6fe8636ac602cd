"""A diffusers AutoencoderKL's decoder as the decoder of a bundle: z, of about unit size, -> image in [-1, 1]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from rlsd.export.layout import CheckpointError, is_number, load_network, read_json


class Decoder(nn.Module):
    """z -> image in [-1, 1], the latent's scaling undone first: one factor and shift, or one for each channel."""

    def __init__(self, vae: Any):
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv or nn.Identity()
        self.scale, self.shift = 1 / vae.config.scaling_factor, vae.config.shift_factor or 0.0
        mean, std = vae.config.latents_mean, vae.config.latents_std
        self.by_channel = mean is not None
        if self.by_channel:
            self.register_buffer("factor", torch.tensor(std)[:, None, None] * self.scale)
            self.register_buffer("offset", torch.tensor(mean)[:, None, None])

    def forward(self, z: Tensor) -> Tensor:
        latent = z * self.factor + self.offset if self.by_channel else z * self.scale + self.shift
        return self.decoder(self.post_quant_conv(latent))


def load_vae(folder: Path, halves: bool = False) -> Any:
    """The autoencoder of a folder, float32, eval. CheckpointError for a scaling of its latents that is not known."""
    config = read_json(folder / "config.json")
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise CheckpointError(f"{folder} holds a {config['_class_name']}; only an AutoencoderKL can be exported")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if (mean is None) != (std is None) or (mean is not None and config.get("shift_factor")):
        raise CheckpointError(
            f"{folder}: latents_mean and latents_std must be given both or neither, and not together with shift_factor"
        )
    factor, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor")
    if not is_number(factor) or factor == 0:
        raise CheckpointError(f"{folder}: scaling_factor {factor!r} is not allowed: a number other than 0")
    if shift is not None and not is_number(shift):
        raise CheckpointError(f"{folder}: shift_factor {shift!r} is not allowed: a number")
    for field, values in (("latents_mean", mean), ("latents_std", std)):
        if values is not None and not (isinstance(values, list) and all(map(is_number, values))):
            raise CheckpointError(f"{folder}: {field} {values!r} is not allowed: a list of numbers")
        if values is not None and len(values) != config.get("latent_channels", 4):
            raise CheckpointError(
                f"{folder}: {field} has {len(values)} values for {config.get('latent_channels', 4)} channels"
            )
    return load_network(AutoencoderKL, folder, halves, low_cpu_mem_usage=False)
