"""Forward operators of cameras and files: a blur in linear light, gray from colour, coarse levels, JPEG.

Those that round have `rounds` set. Their gradient is the straight-through one: that of the same map without the
rounding. What the map gives is really rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rlsd.export import ops
from rlsd.export.operators_base import Operator

BLOCK = 8  # pixels a side of JPEG's blocks
# Sums of whole numbers often lie half way between two. As in libjpeg, coefficients then go away from 0 and pixels up,
# whatever float32 makes of them.
NUDGE = 2.0**-10


class NonlinearBlur(Operator):
    """A motion blur as a camera sees it: light adds up, pixel values do not. kernel: [B, k, k], as of MotionBlur.

    Pixels are decoded to linear light by sRGB's transfer curve (IEC 61966-2-1), convolved (reflected at the border),
    and encoded again, so that highlights smear wider than shadows. x is clipped to [-1, 1]. The usual benchmark has a
    learned network for this (arXiv 2104.00317) instead.
    """

    linear = False

    def __init__(self, blur: Operator):
        super().__init__()
        self.blur = blur

    def parameters_of(self, image: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        return self.blur.parameters_of(image)

    def forward(self, x: Tensor, kernel: Tensor) -> Tensor:
        value = (x.clamp(-1, 1) + 1) / 2
        light = torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
        light = self.blur(light, kernel)
        dark = light <= 0.0031308
        base = light + dark.to(light.dtype)  # the root's slope at 0 has no bound, and must not be met
        seen = torch.where(dark, 12.92 * light, 1.055 * base ** (1 / 2.4) - 0.055)
        return 2 * seen - 1


class Luminance(Operator):
    """y [B, 1, H, W]: what a gray picture keeps of a colour one, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601)."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.299 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


class Quantisation(Operator):
    """x to the nearest of `levels` equal steps from -1 to 1, clipped there. levels: [B, 1], 2 and more; 2^bits."""

    linear, rounds = False, True

    def parameters_of(self, image: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        return {"levels": (1,)}

    def example(self, image: Sequence[int], batch: int) -> Mapping[str, Tensor]:
        return {"levels": 2.0 ** (1 + torch.arange(batch)[:, None] % 7)}

    def forward(self, x: Tensor, levels: Tensor) -> Tensor:
        top = levels[:, :, None, None] - 1
        return 2 * ops.round_through((x.clamp(-1, 1) + 1) / 2 * top) / top - 1


class Jpeg(Operator):
    """What is left of x after JPEG (ITU-T T.81, baseline), decoded again: [B, C, H, W] with sides of 8 n pixels.

    tables: [B, T, 8, 8], the quantisation tables in rows and columns of frequency, whole numbers from 1 to 255: T = 1
    for gray pictures; T = 2, luma and chroma, for colour ones, whose chroma is not subsampled (4:4:4).
    """

    linear, rounds = False, True

    def __init__(self, image: Sequence[int]):
        super().__init__()
        frequency, pixel = torch.arange(BLOCK, dtype=torch.float64)[:, None], torch.arange(BLOCK, dtype=torch.float64)
        dct = torch.cos((2 * pixel + 1) * frequency * math.pi / (2 * BLOCK)) / 2
        dct[0] /= math.sqrt(2)
        for name, size in (("rows", image[1]), ("columns", image[2])):
            self.register_buffer(name, torch.kron(torch.eye(size // BLOCK, dtype=torch.float64), dct).float())
        centre = [128.0] if image[0] == 1 else [128.0, 0, 0]  # Y is from 0 to 255, Cb and Cr from -128 to 127
        self.register_buffer("centre", torch.tensor(centre)[:, None, None])
        if image[0] == 3:
            to = torch.tensor(YCBCR, dtype=torch.float64)
            self.register_buffer("to_ycbcr", to.float())
            self.register_buffer("to_rgb", to.inverse().float())

    def parameters_of(self, image: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        return {"tables": (2 if image[0] == 3 else 1, BLOCK, BLOCK)}

    def example(self, image: Sequence[int], batch: int) -> Mapping[str, Tensor]:
        shape = (batch, *self.parameters_of(image)["tables"])
        return {"tables": torch.randint(5, 60, shape).float()}

    def forward(self, x: Tensor, tables: Tensor) -> Tensor:
        colour = x.shape[1] == 3
        v = ops.round_through((x.clamp(-1, 1) + 1) * 127.5)
        v = (ops.round_through(_mixed(v, self.to_ycbcr) + NUDGE) if colour else v) - self.centre
        steps = self._steps(tables, x.shape)
        kept = self.rows @ v @ self.columns.T / steps
        kept = ops.round_through(kept + NUDGE * kept.sign()) * steps
        v = ops.round_through(self.rows.T @ kept @ self.columns + NUDGE).clamp(-128, 127) + self.centre
        v = ops.round_through(_mixed(v, self.to_rgb)).clamp(0, 255) if colour else v
        return v / 127.5 - 1

    def _steps(self, tables: Tensor, shape: Sequence[int]) -> Tensor:
        """The table entry of each coefficient of an image of blocks: [B, C, H, W]."""
        batch, channels, height, width = shape
        each = torch.cat([tables[:, :1], tables[:, 1:2], tables[:, 1:2]], 1) if channels == 3 else tables[:, :1]
        each = each[:, :, None, :, None, :].expand(batch, channels, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
        return each.reshape(batch, channels, height, width)


YCBCR = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))  # JFIF


def _mixed(x: Tensor, matrix: Tensor) -> Tensor:
    """[B, 3, H, W] with its channels mixed by [3, 3]."""
    return nn.functional.conv2d(x, matrix[:, :, None, None])
