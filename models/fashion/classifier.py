"""The garment classifier: its penultimate layer is the feature extractor phi of the repulsion term."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Residual 3 x 3 convolution after GroupNorm and SiLU: smooth everywhere, so phi has a gradient everywhere."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x)))


class Classifier(nn.Module):
    """Images [B, in_channels, H, W] in [-1, 1] (H, W >= 8, trained at 32) -> logits [B, classes]."""

    def __init__(
        self, channels: tuple[int, ...] = (32, 64, 128), classes: int = 10, groups: int = 8, in_channels: int = 1
    ) -> None:
        super().__init__()
        self.config: dict[str, object] = {
            "model_type": "rlsd-fashion-classifier",
            "channels": list(channels),
            "classes": classes,
            "groups": groups,
        }
        if in_channels != 1:
            self.config["in_channels"] = in_channels
        layers: list[nn.Module] = []
        width = in_channels
        for c in channels:
            layers += [nn.Conv2d(width, c, 3, stride=2, padding=1), Block(c, groups)]
            width = c
        self.body = nn.Sequential(*layers, nn.GroupNorm(groups, width), nn.SiLU())
        self.head = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features [B, channels[-1]]: the spatial mean, so that the image size is free."""
        return self.body(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors in the precision that the weights have."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Classifier:
        """Read what save_pretrained wrote; fp32, eval mode."""
        from safetensors.torch import load_file

        config = json.loads((Path(folder) / "config.json").read_text())
        model = cls(tuple(config["channels"]), config["classes"], config["groups"], config.get("in_channels", 1))
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return model.eval().to(torch.float32)
