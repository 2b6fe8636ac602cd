"""How each phase of the training goes, and what the phases share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlsd.models.fashion.loop import Module, Recipe

UNET_PHASES = ("unet", "unet-finish", "unet-guided")
PHASES = ("vae", "vae-decoder", "classifier", "classifier-mild", *UNET_PHASES, "export-weights")
RECIPES = {
    "vae": Recipe(steps=2800, lr=1.5e-3, weight_decay=1e-4, ema=0.995),
    "vae-decoder": Recipe(steps=2000, lr=8e-4, weight_decay=1e-4, ema=0.998),
    "classifier": Recipe(steps=3500, lr=2e-3, weight_decay=0.05, ema=0.998),
    "classifier-mild": Recipe(steps=2500, lr=1.5e-3, weight_decay=0.05, ema=0.998),
    "unet": Recipe(steps=4900, lr=1e-3, warmup=400, horizon=6000, cooldown=1075, weight_decay=0.01, ema=0.999),
    "unet-finish": Recipe(steps=12000, lr=8e-4, warmup=300, weight_decay=0.01, ema=0.9995),
    "unet-guided": Recipe(steps=3000, lr=4e-4, warmup=100, weight_decay=0.01, ema=0.998),
}
# For images of one's own: the same without the finishing touches, as far as they are known to pay everywhere.
OWN_PHASES = ("vae", "vae-decoder", "classifier", "own-unet")
OWN_RECIPES = {
    **{phase: RECIPES[phase] for phase in OWN_PHASES[:3]},
    "own-unet": Recipe(steps=12000, lr=1e-3, warmup=400, weight_decay=0.01, ema=0.9995),
}
BATCH = {
    "vae": 64,
    "vae-decoder": 64,
    "classifier": 128,
    "classifier-mild": 128,
    **dict.fromkeys(UNET_PHASES, 96),
    "own-unet": 96,
}
SEED = {
    "vae": 11,
    "vae-decoder": 12,
    "classifier": 22,
    "classifier-mild": 23,
    "unet": 33,
    "unet-finish": 34,
    "unet-guided": 35,
    "own-unet": 36,
}


def flip_half(images: Tensor, g: torch.Generator) -> Tensor:
    """Mirror a random half of images [B, 1, H, W]."""
    flip = torch.rand(len(images), 1, 1, 1, generator=g) < 0.5
    return torch.where(flip, images.flip(-1), images)


def batch_of(phase: str, count: int) -> int:
    """Items in a batch of the phase, of `count` items in all."""
    return min(BATCH[phase], count)


def channels_last(model: Any) -> Any:
    """The layout that oneDNN's convolutions prefer. Any: torch's annotations of `to` lack memory_format."""
    return model.to(memory_format=torch.channels_last)


def autocast() -> torch.autocast:
    """bf16 where it is safe: 1.6 times faster on a CPU that has it."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def average_of(model: Module, path: Path) -> Module:
    """Load the moving average that a phase left at `path`."""
    if not path.exists():
        raise FileNotFoundError(f"--work: {path} is missing: run the phase {path.stem!r} first")
    model.load_state_dict(torch.load(path, weights_only=True)["ema"])
    return model.eval().requires_grad_(False)
