"""Fashion-MNIST from its gzipped IDX files: uint8 images, padded to 32 x 32 when they become floats."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

IMAGE_MAGIC, LABEL_MAGIC = 0x00000803, 0x00000801
PAD = 2  # 28 + 2 * 2 = 32: three levels of the VAE halve it without a remainder
ANY = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)  # the shape of its images, where only that counts


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file of unsigned bytes; raises ValueError if it is anything else."""
    with gzip.open(path, "rb") as file:
        raw = file.read()
    magic = int.from_bytes(raw[:4], "big")
    if magic not in (IMAGE_MAGIC, LABEL_MAGIC):
        raise ValueError(f"{path}: magic number {magic:#x} is not that of an IDX file of unsigned bytes")
    rank = magic & 0xFF
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank))
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 1, 28, 28] and labels int64 [N]; split is "train" (60,000) or "t10k" (10,000)."""
    images, labels = (folder / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    for path in (images, labels):
        if not path.is_file():
            raise FileNotFoundError(
                f"--data: {path} is missing. On Debian and Ubuntu the files come with the package "
                "dataset-fashion-mnist (apt-get install dataset-fashion-mnist), which puts them in "
                "/usr/share/datasets/fashion-mnist."
            )
    return torch.tensor(read_idx(images))[:, None], torch.tensor(read_idx(labels)).long()


def padding_of(images: Tensor) -> int:
    """Black pixels that images [..., H, W] get on each side, so that every level can halve them: 2 for 28 x 28."""
    return -images.shape[-1] % 8 // 2


def side_of(images: Tensor) -> int:
    """The side of square images [..., H, W] once they are padded."""
    return images.shape[-1] + 2 * padding_of(images)


def to_model(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] -> float32 in [-1, 1], padded with black: 28 x 28 becomes 32 x 32, 32 x 32 stays."""
    return F.pad(images, (padding_of(images),) * 4).float() / 127.5 - 1.0
