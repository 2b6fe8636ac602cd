"""Loads a checkpoint in diffusers layout (safetensors only) as the networks of a bundle.

Stable Diffusion 1.x and 2.x, and anything else made of a UNet2DConditionModel, an AutoencoderKL and a scheduler
configuration. No code and no pickle is read from the checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from rlsd.export.cuda import package_cuda
from rlsd.export.operators import operators as all_operators
from rlsd.export.own import load_own
from rlsd.export.package import Networks, package


class CheckpointError(ValueError):
    """The folder is not a checkpoint that can be exported; the message says why."""


def export_checkpoint(
    checkpoint: Path | str,
    out: Path | str,
    *,
    target: str = "cpu",
    precision: str | None = None,
    architectures: Sequence[int] = (80, 90, 100),
    size: str | tuple[int, int] | None = None,
    operators: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    features: Path | str | None = None,
    name: str | None = None,
    without: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Exports the checkpoint folder to a bundle at `out` and returns it.

    target: "cpu" (precision fp32, the default, or fp16) or "cuda" (fp16; architectures: compute capabilities times 10).
    size: "H" or "HxW" in pixels, or (H, W); default: the UNet's own. operators: names, "all" or your own as
    "FILE.py:NAME" (rlsd.export.own); default all of ours that fit the size. batches: the numbers of samples that each
    graph is made for, default 2, 8, 16 for CPUs and 1, 4 for GPUs. features: folder of a feature extractor, default
    the checkpoint's own `features`, if any. without: names of rlsd.export.trace.SAVINGS or CUDA_SAVINGS to leave out.
    Raises CheckpointError, FileExistsError, or check.CheckError.
    """
    if (target, precision) not in (("cpu", None), ("cpu", "fp32"), ("cpu", "fp16"), ("cuda", None), ("cuda", "fp16")):
        raise CheckpointError(
            f"target {target!r} with precision {precision!r} is not allowed: cpu with fp32 or fp16, cuda with fp16"
        )
    networks = load(Path(checkpoint), parse_size(size), operators, Path(features) if features else None)
    name = name or re.sub(r"[^A-Za-z0-9_.-]", "-", Path(checkpoint).resolve().name)
    if target == "cuda":
        return package_cuda(
            networks,
            out,
            name=name,
            architectures=architectures,
            batches=batches or (1, 4),
            without=without,
            overwrite=overwrite,
        )
    return package(
        networks,
        out,
        name=name,
        batches=batches or (2, 8, 16),
        precision=precision or "fp32",
        without=without,
        overwrite=overwrite,
    )


def load(
    checkpoint: Path, size: tuple[int, int] | None, operators: Sequence[str] | None, features: Path | None
) -> Networks:
    """Reads all parts of the checkpoint for images of `size` (height, width)."""
    for part in ("unet", "vae", "scheduler"):
        if not (checkpoint / part).is_dir():
            raise CheckpointError(f"checkpoint {checkpoint} has no folder {part!r}: it must be in diffusers layout")
    unet = UNet2DConditionModel.from_pretrained(
        checkpoint / "unet", use_safetensors=True, low_cpu_mem_usage=False
    ).eval()
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae", use_safetensors=True, low_cpu_mem_usage=False).eval()
    scheduler = DDPMScheduler.from_pretrained(checkpoint / "scheduler")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = size or (unet.config.sample_size * factor,) * 2
    unit = factor * 2 ** (len(unet.config.block_out_channels) - 1)
    if height % unit or width % unit:
        raise CheckpointError(f"size {height}x{width} is not allowed: both must be multiples of {unit}")
    image = (vae.config.out_channels, height, width)
    extractor = features or (checkpoint / "features" if (checkpoint / "features").is_dir() else None)
    null, contexts = load_contexts(checkpoint, unet.config.cross_attention_dim)
    phi = load_features(extractor, image) if extractor else None
    head, classes = class_head(phi, list(contexts))
    return Networks(
        denoiser=Denoiser(unet, scheduler.alphas_cumprod, scheduler.config.prediction_type),
        decoder=Decoder(vae),
        features=phi,
        operators=choose(all_operators(image), operators, image),
        alphas_cumprod=scheduler.alphas_cumprod,
        latent=(vae.config.latent_channels, height // factor, width // factor),
        image=image,
        null_context=null,
        contexts=contexts,
        steps_offset=scheduler.config.get("steps_offset", 1),
        info=load_info(checkpoint),
        class_head=head,
        classes=classes,
    )


class Denoiser(nn.Module):
    """A UNet whose prediction (epsilon, v_prediction or sample) is turned into the noise epsilon."""

    def __init__(self, unet: nn.Module, alphas_cumprod: Tensor, prediction: str):
        super().__init__()
        if prediction not in ("epsilon", "v_prediction", "sample"):
            raise CheckpointError(f"prediction_type {prediction!r} is not known: epsilon, v_prediction or sample")
        self.unet, self.prediction = unet, prediction
        self.register_buffer("signal", alphas_cumprod.double().sqrt().float())
        self.register_buffer("noise", (1 - alphas_cumprod.double()).sqrt().float())

    def forward(self, z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        predicted = self.unet(z_t, t, context, return_dict=False)[0]
        if self.prediction == "epsilon":
            return predicted
        signal, noise = self.signal[t][:, None, None, None], self.noise[t][:, None, None, None]
        if self.prediction == "v_prediction":
            return signal * predicted + noise * z_t
        return (z_t - signal * predicted) / noise


class Decoder(nn.Module):
    """z -> image in [-1, 1], the latent's scaling undone first."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv or nn.Identity()
        self.scale, self.shift = 1 / vae.config.scaling_factor, vae.config.shift_factor or 0.0

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z * self.scale + self.shift))


class ClassToken(nn.Module):
    """A vision transformer's class token (DINO, DINOv2) of an image in [-1, 1], resized and normalised."""

    def __init__(self, model: nn.Module, image: Sequence[int], side: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = model
        self.register_buffer("rows", bilinear_matrix(image[1], side))
        self.register_buffer("columns_t", bilinear_matrix(image[2], side).T.contiguous())
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, image: Tensor) -> Tensor:
        resized = self.rows @ ((image + 1) / 2) @ self.columns_t
        return self.model(pixel_values=(resized - self.mean) / self.std, return_dict=True).last_hidden_state[:, 0]


def bilinear_matrix(size: int, side: int) -> Tensor:
    """[side, size]: bilinear resizing as a matrix, whose pull-back is its transpose."""
    return nn.functional.interpolate(torch.eye(size)[None, None], (side, size), mode="bilinear")[0, 0]


def load_features(folder: Path, image: Sequence[int]) -> nn.Module:
    """The extractor phi of a folder for images (C, H, W): our fashion classifier, or a ViT in transformers layout."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind == "rlsd-fashion-classifier":
        from rlsd.models.fashion import load_classifier

        return Penultimate(load_classifier(folder))
    if kind not in ("vit", "dinov2"):
        raise CheckpointError(f"features {folder} has model_type {kind!r}: known are vit and dinov2")
    from transformers import AutoModel

    transformers_logging.disable_progress_bar()
    extra = {"add_pooling_layer": False} if kind == "vit" else {}
    model = AutoModel.from_pretrained(folder, use_safetensors=True, attn_implementation="sdpa", **extra).eval()
    settings = folder / "preprocessor_config.json"
    known = read_json(settings) if settings.is_file() else {}
    mean, std = known.get("image_mean", [0.485, 0.456, 0.406]), known.get("image_std", [0.229, 0.224, 0.225])
    return ClassToken(model, image, model.config.image_size, mean, std)


class Penultimate(nn.Module):
    """The features before a classifier's last layer."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier.features(image)


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


def load_contexts(checkpoint: Path, width: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The null context [L, C] and named ones: from a table of class embeddings, or the text encoder's empty prompt."""
    table = checkpoint / "context"
    if table.is_dir():
        rows, described = load_file(table / "context.safetensors")["context"].float(), read_json(table / "config.json")
        named = dict(zip(described["names"], rows))
        return named.pop(described["names"][described["null"]]), named
    if (checkpoint / "text_encoder").is_dir():
        from transformers import CLIPTextModel, CLIPTokenizer

        transformers_logging.disable_progress_bar()
        tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder", use_safetensors=True).eval()
        tokens = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
        with torch.no_grad():
            return encoder(tokens.input_ids)[0][0].float(), {}
    return torch.zeros(77, width), {}


def load_info(checkpoint: Path) -> list[str]:
    """Facts for people and for the pipeline: `image_padding L T R B` where the prior was trained on padded images."""
    index = read_json(checkpoint / "model_index.json") if (checkpoint / "model_index.json").is_file() else {}
    padding = index.get("image_padding")
    return [f"image_padding {' '.join(map(str, padding))}"] if padding else []


def choose(available: dict, names: Sequence[str] | None, image: Sequence[int]) -> dict:
    """The operators asked for, `all` and FILE.py:NAME among their names; all of ours where none is named."""
    chosen: dict = {}
    for name in names or ["all"]:
        if ":" in name:
            word, operator = load_own(name, image)
            if word in available:
                raise CheckpointError(f"operator {name!r} would be called {word}, as one of ours: rename it")
            chosen[word] = operator
        elif name == "all":
            chosen |= available
        elif name not in available:
            raise CheckpointError(f"operator {name!r} is not known here: {', '.join(sorted(available))}")
        else:
            chosen[name] = available[name]
    return chosen


def parse_size(size: str | tuple[int, int] | None) -> tuple[int, int] | None:
    """ "512" or "512x768" (height first) as (height, width)."""
    if size is None or isinstance(size, tuple):
        return size
    if not re.fullmatch(r"[0-9]{1,5}(x[0-9]{1,5})?", size):
        raise CheckpointError(f"size {size!r} is not allowed: H or HxW in pixels, as 512 or 512x768")
    height, _, width = size.partition("x")
    return int(height), int(width or height)


def read_json(path: Path) -> dict:
    """A JSON object from a file; CheckpointError when it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
