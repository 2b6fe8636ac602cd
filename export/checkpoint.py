"""Loads a checkpoint in diffusers layout (safetensors only) as the networks of a bundle.

Stable Diffusion 1.x, 2.x and XL, and anything else made of a UNet2DConditionModel, an AutoencoderKL and a scheduler
configuration with a table of betas. No code and no pickle is read from the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsd.export.contexts import load_contexts
from rlsd.export.cuda import package_cuda
from rlsd.export.diffusers_unet import Denoiser, PooledText, load_schedule, load_unet, pooled_rows, pooled_width
from rlsd.export.diffusers_vae import Decoder, load_vae
from rlsd.export.extractors import class_head, load_features
from rlsd.export.hub import locate
from rlsd.export.layout import NEEDED, CheckpointError, named_parts, read_index
from rlsd.export.operator_graphs import check_operator
from rlsd.export.operators import chain
from rlsd.export.operators import operators as all_operators
from rlsd.export.own import load_own
from rlsd.export.package import Networks, package


def export_checkpoint(
    checkpoint: Path | str,
    out: Path | str,
    *,
    revision: str | None = None,
    target: str = "cpu",
    precision: str | None = None,
    architectures: Sequence[int] = (80, 90, 100),
    size: str | tuple[int, int] | None = None,
    operators: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    features: Path | str | None = None,
    prompts: Mapping[str, str] | None = None,
    name: str | None = None,
    without: Sequence[str] = (),
    overwrite: bool = False,
    cache: Path | None = None,
) -> Path:
    """Exports a checkpoint to a bundle at `out` and returns it.

    checkpoint: a folder, or owner/name on the Hugging Face hub at the commit `revision` (40 hexadecimal digits), from
    its cache where that has it (cache: another folder for it). target: "cpu" (precision fp32, the default, or fp16) or
    "cuda" (fp16; architectures: compute capabilities times 10). size: "H" or "HxW" in pixels, or (H, W); default: the
    UNet's own. operators: names, "all" or your own as "FILE.py:NAME" (rlsd.export.own); default all of ours that fit
    the size. batches: the numbers of samples that each graph is made for, default 2, 8, 16 for CPUs and 1, 4 for GPUs.
    features: folder of a feature extractor, default the checkpoint's own `features`, if any. prompts: texts whose
    contexts the bundle keeps under their names. without: names of rlsd.export.trace.SAVINGS or CUDA_SAVINGS to leave
    out. Raises CheckpointError, FileExistsError, or check.CheckError.
    """
    if (target, precision) not in (("cpu", None), ("cpu", "fp32"), ("cpu", "fp16"), ("cuda", None), ("cuda", "fp16")):
        raise CheckpointError(
            f"target {target!r} with precision {precision!r} is not allowed: cpu with fp32 or fp16, cuda with fp16"
        )
    halves = target == "cuda" or precision == "fp16"
    found = locate(checkpoint, revision, halves, cache)
    extractor = Path(features) if features else None
    networks = load(found.folder, parse_size(size), operators, extractor, prompts or {}, halves, found.origin)
    given: dict[str, Any] = {
        "name": name or re.sub(r"[^A-Za-z0-9_.-]", "-", found.name),
        "batches": batches or ((1, 4) if target == "cuda" else (2, 8, 16)),
        "without": without,
        "overwrite": overwrite,
    }
    if target == "cuda":
        return package_cuda(networks, out, architectures=architectures, **given)
    return package(networks, out, precision=precision or "fp32", **given)


def load(
    checkpoint: Path,
    size: tuple[int, int] | None,
    operators: Sequence[str] | None,
    features: Path | None,
    prompts: Mapping[str, str] | None = None,
    halves: bool = False,
    origin: str | None = None,
) -> Networks:
    """Reads all parts of the checkpoint folder for images of `size` (height, width); see export_checkpoint.

    halves: prefer weights in halves. origin: the words that find the checkpoint again, for prompts at run time.
    """
    index = read_index(checkpoint)
    for part in dict.fromkeys([*NEEDED, *named_parts(index)]):
        if not (checkpoint / part).is_dir():
            why = "it must be in diffusers layout" if part in NEEDED else "but its model_index.json names it"
            raise CheckpointError(f"checkpoint {checkpoint} has no folder {part!r}: {why}")
    if index.get("requires_aesthetics_score"):
        raise CheckpointError(f"checkpoint {checkpoint} is a refiner, which takes an aesthetics score: export its base")
    unet, vae = load_unet(checkpoint / "unet", halves), load_vae(checkpoint / "vae", halves)
    scheduler = load_schedule(checkpoint / "scheduler")
    latent, image = shapes(unet.config, vae.config, size)
    extractor = features or (checkpoint / "features" if (checkpoint / "features").is_dir() else None)
    rows = pooled_rows(unet.config)
    pooled = pooled_width(unet.config)
    null, contexts = load_contexts(checkpoint, unet.config.cross_attention_dim, pooled, prompts or {}, halves)
    phi = load_features(extractor, image) if extractor else None
    head, classes = class_head(phi, list(contexts))
    noise = PooledText(unet, image[1:], pooled, rows) if rows else unet
    return Networks(
        denoiser=Denoiser(noise, scheduler.alphas_cumprod, scheduler.config.prediction_type),
        decoder=Decoder(vae),
        features=phi,
        operators=choose(all_operators(image), operators, image),
        alphas_cumprod=scheduler.alphas_cumprod,
        latent=latent,
        image=image,
        null_context=null,
        contexts=contexts,
        steps_offset=scheduler.config.steps_offset,
        info=load_info(index, origin if (checkpoint / "text_encoder").is_dir() else None),
        class_head=head,
        classes=classes,
    )


def shapes(unet: Any, vae: Any, size: tuple[int, int] | None) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes (C, H, W) of latent and image, from the networks' configurations and the size asked for."""
    if unet.in_channels != vae.latent_channels:
        raise CheckpointError(
            f"the UNet takes {unet.in_channels} channels, the VAE's latents have {vae.latent_channels}"
        )
    factor = 2 ** (len(vae.block_out_channels) - 1)
    if size is None and unet.sample_size is None:
        raise CheckpointError("the UNet's config.json names no sample_size: give --size")
    own = unet.sample_size if isinstance(unet.sample_size, (list, tuple)) else (unet.sample_size,) * 2
    if not size and (len(own) != 2 or not all(isinstance(side, int) and side > 0 for side in own)):
        raise CheckpointError(f"the UNet's sample_size {unet.sample_size!r} is not allowed: a whole number or two")
    height, width = size or (own[0] * factor, own[1] * factor)
    unit = factor * 2 ** (len(unet.block_out_channels) - 1)
    if height % unit or width % unit or not height or not width:
        raise CheckpointError(f"size {height}x{width} is not allowed: both must be multiples of {unit}")
    return (vae.latent_channels, height // factor, width // factor), (vae.out_channels, height, width)


def load_info(index: Mapping[str, Any], text_encoder: str | None) -> list[str]:
    """Facts for people and for the pipeline.

    `image_padding L T R B` where the prior was trained on padded images; `text_encoder WHERE`, the checkpoint whose
    text encoder makes contexts for this bundle, unless a manifest cannot hold those words.
    """
    padding = index.get("image_padding")
    facts = [f"image_padding {' '.join(map(str, padding))}"] if padding else []
    if text_encoder and text_encoder.isprintable() and " ".join(text_encoder.split()) == text_encoder:
        facts.append(f"text_encoder {text_encoder}")
    return facts


def choose(available: dict, names: Sequence[str] | None, image: Sequence[int]) -> dict:
    """The operators asked for: names, first+second, FILE.py:NAME, `all`; all of ours where none is named."""
    chosen: dict = {}
    for name in names or ["all"]:
        if ":" in name:
            word, operator = load_own(name, image)
            if word in available:
                raise CheckpointError(f"operator {name!r} would be called {word}, as one of ours: rename it")
            if word in chosen:
                raise CheckpointError(f"operator {name!r} would be called {word}, as one before it: rename one of them")
            check_operator(word, operator, image)
            chosen[word] = operator
        elif name == "all":
            chosen |= available
        elif "+" in name:
            word, operator = chain(name, image)
            chosen[word] = operator
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
