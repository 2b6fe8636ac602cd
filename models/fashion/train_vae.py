"""Trains the autoencoder: latents that are smooth, then a decoder that makes the most of them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from rlsd.models.fashion import data
from rlsd.models.fashion.loop import Recipe, batch_indices, generator, train
from rlsd.models.fashion.networks import Vae, build_vae
from rlsd.models.fashion.recipe import SEED, autocast, average_of, batch_of, channels_last, flip_half

KL_WEIGHT = 5e-3  # per latent value, against a loss per pixel: smooth latents first, decibels second


def vae_for(images: Tensor) -> Vae:
    """An autoencoder for images uint8 [N, C, H, W], with random weights."""
    return build_vae(images.shape[1], data.side_of(images))


def train_vae(images: Tensor, work: Path, recipe: Recipe, stop_at: int | None = None) -> Vae:
    """images uint8 [N, C, H, W] -> the averaged AutoencoderKL."""
    torch.manual_seed(SEED["vae"])
    vae = channels_last(vae_for(images))

    def loss_of(step: int) -> Tensor:
        g = generator(SEED["vae"], step)
        chosen = batch_indices(SEED["vae"], step, batch_of("vae", len(images)), len(images))
        x = flip_half(data.to_model(images[chosen]), g).contiguous(memory_format=torch.channels_last)
        with autocast():
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)
            shown = vae.decode(z).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        return F.l1_loss(shown, x) + F.mse_loss(shown, x) + KL_WEIGHT * kl

    return train("vae", vae, loss_of, recipe, work / "vae.pt", stop_at=stop_at)


def train_decoder(images: Tensor, work: Path, recipe: Recipe, stop_at: int | None = None) -> Vae:
    """Go on with the decoder alone, on latents that stay as they are: no KL term holds it back any more.

    The loss adds the L1 of neighbouring pixels' differences, which keeps edges and straps from fading.
    """
    mean, std = encode_all(images, work)
    torch.manual_seed(SEED["vae-decoder"])
    vae = average_of(vae_for(images), work / "vae.pt").train()
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    vae = channels_last(vae)

    def loss_of(step: int) -> Tensor:
        g = generator(SEED["vae-decoder"], step)
        chosen = batch_indices(SEED["vae-decoder"], step, batch_of("vae-decoder", len(mean)), len(mean))
        x = data.to_model(images[chosen % len(images)])
        x = torch.where((chosen >= len(images))[:, None, None, None], x.flip(-1), x)
        z = mean[chosen].float() + std[chosen].float() * torch.randn(mean[chosen].shape, generator=g)
        with autocast():
            shown = vae.decode(z.contiguous(memory_format=torch.channels_last)).sample
        error = shown.float() - x
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + error.square().mean() + edges

    return train("vae-decoder", vae, loss_of, recipe, work / "vae-decoder.pt", stop_at=stop_at)


@torch.no_grad()
def encode_all(images: Tensor, work: Path) -> tuple[Tensor, Tensor]:
    """Posterior mean and std, fp16 [2N, 4, H/4, W/4] each: the images, then their mirror images.

    Cached in the work folder until the VAE there changes.
    """
    path, source = work / "latents.pt", work / "vae.pt"
    vae = channels_last(average_of(vae_for(images), source))
    if path.exists() and path.stat().st_mtime >= source.stat().st_mtime:
        cached = torch.load(path, weights_only=True)
        return cached["mean"], cached["std"]
    means, stds = [], []
    for batch in (*images.split(256), *images.flip(-1).split(256)):
        x = data.to_model(batch).contiguous(memory_format=torch.channels_last)
        with autocast():  # its rounding is far below the posterior's own std
            posterior = vae.encode(x).latent_dist
        means.append(posterior.mean.half())
        stds.append(posterior.std.half())
    mean, std = torch.cat(means), torch.cat(stds)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    torch.save({"mean": mean, "std": std}, temporary)
    os.replace(temporary, path)
    return mean, std


def scaling_of(mean: Tensor, std: Tensor) -> float:
    """1 / (standard deviation of the sampled latents), the convention of latent diffusion."""
    total = mean.float().var() + std.float().square().mean()
    return round(float(total.rsqrt()), 6)
