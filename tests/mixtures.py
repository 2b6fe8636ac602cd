"""Priors whose score is known exactly, as torch modules ready to be packaged."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from rlsd.export import Networks, Operator


class MixtureDenoiser(nn.Module):
    """The noise prediction of an equal mixture of isotropic Gaussians: exact, for every timestep.

    means: [M, d]; deviation: standard deviation of each component; abar: [T].
    """

    def __init__(self, means: Tensor, deviation: float, abar: Tensor):
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("signal", abar.sqrt().float())
        self.register_buffer("noise", (1 - abar).sqrt().float())
        self.variance = deviation**2

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        flat = z_t.flatten(1)
        signal, noise = self.signal[t][:, None], self.noise[t][:, None]
        variance = signal**2 * self.variance + noise**2
        offset = flat[:, None] - signal[..., None] * self.means
        weight = torch.softmax(-0.5 * offset.square().sum(-1) / variance, 1)
        return (noise / variance * (weight[..., None] * offset).sum(1)).reshape(z_t.shape)


class Identity(nn.Module):
    """The identity decoder."""

    def forward(self, z: Tensor) -> Tensor:
        return z * 1.0


class Nothing(Operator):
    """A measurement that says nothing about the image."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.0


def abar_table(steps: int = 1000) -> Tensor:
    """Stable Diffusion's schedule abar, resampled to `steps` timesteps: [steps], float64."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    logarithm = np.log(np.cumprod(1 - betas))
    return torch.from_numpy(np.exp(np.interp(np.linspace(0, 999, steps), np.arange(1000), logarithm)))


def ring(modes: int = 8, radius: float = 2.0) -> Tensor:
    """[modes, 2]: equally spaced points on a circle."""
    angle = torch.arange(modes) * (2 * math.pi / modes)
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


def ring_networks(deviation: float, steps: int) -> Networks:
    """A ring of Gaussians in the plane, seen through an identity decoder; nothing is observed."""
    abar = abar_table(steps)
    return Networks(
        denoiser=MixtureDenoiser(ring(), deviation, abar),
        decoder=Identity(),
        alphas_cumprod=abar,
        latent=(2, 1, 1),
        image=(2, 1, 1),
        operators={"nothing": Nothing()},
    )
