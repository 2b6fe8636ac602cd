"""A prior of one's own images: the folder read, and the embedded prior's networks trained on it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rlsd.models.fashion.loop import Recipe
from rlsd.models.fashion.networks import write_checkpoint
from rlsd.models.fashion.recipe import average_of
from rlsd.models.fashion.train_classifier import new_classifier, train_classifier
from rlsd.models.fashion.train_prior import new_prior, train_unet
from rlsd.models.fashion.train_vae import encode_all, scaling_of, train_decoder, train_vae, vae_for

SIZES = (32, 64)
KINDS = (".png", ".jpg", ".jpeg")
FEWEST = 2


@dataclass(frozen=True)
class Pictures:
    """images uint8 [N, C, side, side], labels int64 [N]; names of the classes, none where there are no sub-folders."""

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def digest(self) -> str:
        """SHA-256 of all of it."""
        whole = hashlib.sha256(repr((tuple(self.images.shape), self.names)).encode())
        whole.update(self.images.numpy().tobytes())
        whole.update(self.labels.numpy().tobytes())
        return whole.hexdigest()


def load_images(folder: Path, side: int, gray: bool = False) -> Pictures:
    """The PNG and JPEG files of a folder, or of its sub-folders, whose names are then the classes.

    Each is cut to its middle square and resized to `side`. They have three channels if any of them has colours, else
    one; gray: one always. Raises ValueError.
    """
    if not folder.is_dir():
        raise ValueError(f"--images {folder} is not a folder")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and _pictures(path))
    files = [(path, 0) for path in _pictures(folder)]
    if classes and files:
        raise ValueError(f"--images {folder} holds images beside sub-folders of images; only one of both is allowed")
    if len(classes) == 1:
        raise ValueError(
            f"--images {folder} has one class, {classes[0].name}: at least two, or no sub-folders, are wanted"
        )
    names = tuple(re.sub(r"[^A-Za-z0-9_-]+", "-", path.name).strip("-") for path in classes)
    if len(set(names)) != len(names) or not all(names) or "null" in names:
        raise ValueError(
            f"--images {folder}: sub-folders {', '.join(p.name for p in classes)} make no good class names"
        )
    files += [(path, label) for label, each in enumerate(classes) for path in _pictures(each)]
    if len(files) < FEWEST:
        raise ValueError(f"--images {folder} holds {len(files)} PNG or JPEG files; at least {FEWEST} are wanted")
    read = [_read(path, side) for path, _ in files]
    colour = not gray and any(image.mode == "RGB" for image in read)
    pixels = [np.asarray(image.convert("RGB" if colour else "L")).reshape(side, side, -1) for image in read]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Pictures(images, torch.tensor([label for _, label in files]), names)


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.suffix.lower() in KINDS and not p.name.startswith(".") and p.is_file()
    )


def _read(path: Path, side: int) -> Image.Image:
    """The middle square at `side` pixels, as RGB or, without colours, as L."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits
                image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
            image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
            return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def train_own(pictures: Pictures, phases: Sequence[str], work: Path, out: Path, recipes: Mapping[str, Recipe]) -> None:
    """Runs the phases (of recipe.OWN_PHASES, and export-weights) on the pictures; the checkpoint goes to `out`.

    Without classes there is no classifier: the phase is passed over, and repulsion acts among latents. A work folder
    belongs to the images that it was begun with: ValueError for others.
    """
    work.mkdir(parents=True, exist_ok=True)
    mark, digest = work / "images.sha256", pictures.digest()
    if mark.exists() and mark.read_text() != digest:
        raise ValueError(f"--work {work} was begun with other images or another size: name a new folder")
    mark.write_text(digest)
    images, labels, classes = pictures.images, pictures.labels, len(pictures.names)
    for phase in phases:
        if phase == "vae":
            train_vae(images, work, recipes[phase])
        elif phase == "vae-decoder":
            train_decoder(images, work, recipes[phase])
        elif phase == "classifier" and classes:
            train_classifier(phase, images, labels, work, recipes[phase], classes=classes)
        elif phase == "own-unet":
            train_unet(phase, images, labels, work, recipes[phase], classes=classes)
        elif phase == "export-weights":
            export_own(pictures, work, out)


def export_own(pictures: Pictures, work: Path, out: Path) -> None:
    """Write the averaged weights as a checkpoint in the layout of diffusers, fp16 safetensors."""
    images, classes = pictures.images, len(pictures.names)
    vae = average_of(vae_for(images), work / "vae-decoder.pt")
    vae.register_to_config(scaling_factor=scaling_of(*encode_all(images, work)))
    classifier = average_of(new_classifier(images, classes), work / "classifier.pt") if classes else None
    prior = average_of(new_prior(images, classes), work / "own-unet.pt")
    write_checkpoint(out, vae, prior, classifier, pictures.names, padding=0)
