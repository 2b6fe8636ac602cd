from pathlib import Path

import torch
from torch import nn

from rlsd.engine import Engine, Job, Params
from rlsd.export import Networks, package
from rlsd.export.operators import Inpainting


class Denoiser(nn.Module):
    """The exact noise predictor of latents that are standard normal: eps = sqrt(1 - abar) z_t."""

    def __init__(self, abar):
        super().__init__()
        self.register_buffer("spread", (1 - abar).sqrt().float())

    def forward(self, z, t):
        return z * self.spread[t].reshape(-1, 1, 1, 1)


abar = torch.linspace(0.999, 0.01, 100, dtype=torch.float64)
networks = Networks(
    denoiser=Denoiser(abar),
    decoder=nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2, 1, 3, padding=1), nn.Tanh()),
    alphas_cumprod=abar,
    latent=(2, 4, 4),
    image=(1, 8, 8),
    operators={"inpainting": Inpainting()},
)
bundle = package(networks, Path("my-bundle"), name="mine", batches=(4,))
with Engine(bundle) as engine:
    mask = torch.ones(1, 8, 8).numpy()
    (result,) = engine.reconstruct([Job(0.1 * mask, "inpainting", {"mask": mask}, params=Params(steps=20))])
print(result.particles.shape)  # (4, 1, 8, 8)
