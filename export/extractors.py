"""Feature extractors phi for the repulsion: DINO and DINOv2 in transformers' layout, and our fashion classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlsd.export.layout import CheckpointError, load_network, read_json

TRANSFORMERS = ("vit", "dinov2", "dinov2_with_registers")
FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as preprocessor_config.json has them


@dataclass(frozen=True)
class Preprocessing:
    """What a transformer wants done to images: resize to (height, width), cut out the middle, normalise.

    crop: side of the square that the transformer sees. filter: of the resizing, whose support grows when it shrinks.
    """

    resized: tuple[int, int]
    crop: int
    filter: str
    mean: Sequence[float]
    std: Sequence[float]


class ClassToken(nn.Module):
    """A vision transformer's class token (DINO, DINOv2) of an image in [-1, 1], resized, cropped and normalised."""

    def __init__(self, model: nn.Module, image: Sequence[int], steps: Preprocessing):
        super().__init__()
        self.model = fixed_positions(model, steps.crop)
        rows, columns = (resizing(size, to, steps) for size, to in zip(image[1:], steps.resized))
        self.register_buffer("rows", rows)
        self.register_buffer("columns_t", columns.T.contiguous())
        self.register_buffer("mean", torch.tensor(steps.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(steps.std)[:, None, None])

    def forward(self, image: Tensor) -> Tensor:
        resized = self.rows @ ((image + 1) / 2) @ self.columns_t
        return self.model(pixel_values=(resized - self.mean) / self.std, return_dict=True).last_hidden_state[:, 0]


class Penultimate(nn.Module):
    """The features before a classifier's last layer."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier.features(image)


def resizing(size: int, to: int, steps: Preprocessing) -> Tensor:
    """[crop, size]: one axis resized and cropped as one matrix, whose pull-back is its transpose."""
    whole = nn.functional.interpolate(torch.eye(size)[None, None], (to, size), mode=steps.filter, antialias=True)[0, 0]
    top = (to - steps.crop) // 2
    return whole[top : top + steps.crop].contiguous()


def fixed_positions(model: Any, side: int) -> Any:
    """The model with its position embeddings resampled for images of `side` pixels, once and for all; in place."""
    embeddings = model.embeddings
    patches = embeddings.patch_embeddings
    with torch.no_grad():
        # Looked at for their number and width only, as many as the image has patches and the class token.
        tokens = torch.zeros(1, (side // model.config.patch_size) ** 2 + 1, model.config.hidden_size)
        table = embeddings.interpolate_pos_encoding(tokens, side, side).clone()
    embeddings.position_embeddings = nn.Parameter(table, requires_grad=False)
    embeddings.image_size = patches.image_size = (side, side)
    return model


def load_features(folder: Path, image: Sequence[int]) -> nn.Module:
    """The extractor phi of a folder for images (C, H, W): our fashion classifier, or a ViT in transformers layout."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"features {folder} has no config.json: a folder in transformers' layout is wanted, such as a download of "
            "a repository on the hub (not its name)"
        )
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind == "rlsd-fashion-classifier":
        from rlsd.models.fashion import load_classifier

        return Penultimate(load_classifier(folder))
    if kind not in TRANSFORMERS:
        raise CheckpointError(f"features {folder} has model_type {kind!r}: known are {', '.join(TRANSFORMERS)}")
    if image[0] not in (1, 3):
        raise CheckpointError(f"features {folder} takes images of 1 or 3 channels, not {image[0]}")
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    config = AutoConfig.for_model(kind).to_dict() | config
    for field in ("image_size", "patch_size"):
        if not isinstance(config[field], int) or config[field] < 1:
            raise CheckpointError(f"features {folder}: {field} {config[field]!r} is not supported: one whole number")
    steps = preprocessing(folder, read_settings(folder, kind), image, config)
    logging.disable_progress_bar()
    extra = {"add_pooling_layer": False} if kind == "vit" else {}
    model = load_network(AutoModel, folder, attn_implementation="sdpa", **extra)
    return ClassToken(model, image, steps)


def read_settings(folder: Path, kind: str) -> dict[str, Any]:
    """What preprocessor_config.json says; empty without one. CheckpointError if it leaves out what it makes use of.

    The defaults are those of a processor's class and differ from one to the other; Bit's takes a size that is a number
    for the shortest edge.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    known = read_json(path)
    name = (
        known.get("image_processor_type") or known.get("feature_extractor_type") or ("ViT" if kind == "vit" else "Bit")
    )
    bit = str(name).startswith("Bit")
    needed = ["size", "resample"] if known.get("do_resize", True) else []
    needed += ["image_mean", "image_std"] if known.get("do_normalize", True) else []
    needed += ["do_center_crop"] if bit else []
    for field in needed:
        if field not in known:
            raise CheckpointError(f"features {folder}: preprocessor_config.json does not say {field}")
    if bit and isinstance(known.get("size"), int):
        known["size"] = {"shortest_edge": known["size"]}
    return known


def preprocessing(
    folder: Path, known: Mapping[str, Any], image: Sequence[int], config: Mapping[str, Any]
) -> Preprocessing:
    """What preprocessor_config.json says for images (C, H, W); without one, resizing to the transformer's own size.

    CheckpointError for what is not supported.
    """
    factor = known.get("rescale_factor", 1 / 255)
    if not known.get("do_rescale", True) or not isinstance(factor, float) or abs(255 * factor - 1) > 1e-4:
        raise CheckpointError(f"features {folder}: only images rescaled to [0, 1] are supported (rescale_factor 1/255)")
    height, width = image[1:]
    resized = (height, width)
    if known.get("do_resize", True):
        resized = _resized(folder, known.get("size", config.get("image_size", 224)), height, width)
    crop = _square(folder, "crop_size", known.get("crop_size")) if known.get("do_center_crop") else resized[0]
    if not known.get("do_center_crop") and resized[0] != resized[1]:
        raise CheckpointError(f"features {folder} would see {resized[0]}x{resized[1]} pixels: a square is wanted")
    if crop > min(resized) or crop % config["patch_size"]:
        raise CheckpointError(
            f"features {folder}: a crop of {crop} of {resized[0]}x{resized[1]} pixels is not possible in patches of "
            f"{config['patch_size']}"
        )
    resample = known.get("resample", 2)
    if resample not in FILTERS:
        raise CheckpointError(f"features {folder}: resample {resample} is not supported: 2 (bilinear) or 3 (bicubic)")
    plain = not known.get("do_normalize", True)
    mean = [0.0] * 3 if plain else known.get("image_mean", [0.485, 0.456, 0.406])
    std = [1.0] * 3 if plain else known.get("image_std", [0.229, 0.224, 0.225])
    for field, values in (("image_mean", mean), ("image_std", std)):
        numbers = isinstance(values, list) and all(isinstance(each, (int, float)) for each in values)
        if not numbers or len(values) != 3 or (field == "image_std" and min(values) <= 0):
            raise CheckpointError(f"features {folder}: {field} {values!r} is not supported: three numbers are wanted")
    return Preprocessing(resized, crop, FILTERS[resample], mean, std)


def _resized(folder: Path, size: Any, height: int, width: int) -> tuple[int, int]:
    if isinstance(size, dict) and "shortest_edge" in size:
        short = int(size["shortest_edge"])
        return (short, short * width // height) if height <= width else (short * height // width, short)
    side = _square(folder, "size", size)
    return side, side


def _square(folder: Path, field: str, size: Any) -> int:
    sides = [size.get("height"), size.get("width")] if isinstance(size, dict) else [size, size]
    if not isinstance(sides[0], int) or sides[0] != sides[1] or not 1 <= sides[0] <= 4096:
        raise CheckpointError(
            f"features {folder}: {field} {size!r} is not supported: one side, or height and width alike"
        )
    return sides[0]


def class_head(features: nn.Module | None, names: Sequence[str]) -> tuple[Tensor | None, list[str]]:
    """Weight and bias [K, D + 1] of the classifier that the features are taken from, and its K classes.

    names: of the checkpoint's contexts, which are the classes where there are as many; else class-0 and so on.
    """
    if not isinstance(features, Penultimate):
        return None, []
    last = features.classifier.head
    count = last.out_features
    chosen = list(names) if len(names) == count else [f"class-{i}" for i in range(count)]
    return torch.cat([last.weight, last.bias[:, None]], 1).detach(), chosen
