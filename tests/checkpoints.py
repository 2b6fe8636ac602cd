"""Small random checkpoints in exactly the layout of the real ones, saved through the real library classes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

WIDTH = 32


WIDE_END = (64, 16, 32, 32)  # channels of a VAE whose last convolution has as many to one as Stable Diffusion's


def stable_diffusion(folder: Path, prediction: str = "epsilon", text: bool = True, **vae: object) -> Path:
    """Stable Diffusion's parts at toy width: factor 8 VAE, cross-attention UNet, PNDM scheduler, CLIP text encoder.

    vae: as for small_vae.
    """
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=8,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(folder / "unet")  # fmt: skip
    small_vae(**vae).save_pretrained(folder / "vae")
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        prediction_type=prediction,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    if text:
        text_encoder(folder)
    return folder


def text_encoder(folder: Path) -> None:
    """A CLIP text encoder and its tokenizer, with a vocabulary of single letters."""
    tokenizer(folder).save_pretrained(folder / "tokenizer")
    CLIPTextModel(text_config()).save_pretrained(folder / "text_encoder")


def tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer whose words are letters; its files go through the folder."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    raw = folder / "vocabulary"
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (raw / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(raw / "vocab.json"), str(raw / "merges.txt"), model_max_length=77)


def text_config(**changes: object) -> CLIPTextConfig:
    """Of a text encoder for the vocabulary of `tokenizer`."""
    settings = dict(
        vocab_size=54, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return CLIPTextConfig(**{**settings, **changes})


def small_vae(**changes: object) -> AutoencoderKL:
    """A VAE of factor 8, as that of every Stable Diffusion."""
    settings = dict(
        block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=8, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return AutoencoderKL(**{**settings, **changes})


def diffusion_1_or_2(folder: Path, kind: str) -> StableDiffusionPipeline:
    """sd15, sd21-base (epsilon) or sd21 (v-prediction, 1.5 times the size), saved as its pipeline saves it."""
    torch.manual_seed(2)
    second = kind != "sd15"
    unet = UNet2DConditionModel(
        sample_size=12 if kind == "sd21" else 8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=WIDTH, attention_head_dim=(2, 4) if second else 8, use_linear_projection=second,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        upcast_attention=kind == "sd21",
    )  # fmt: skip
    schedule = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    kinds = {"sd15": PNDMScheduler, "sd21-base": PNDMScheduler, "sd21": DDIMScheduler}
    extra = {"clip_sample": False, "set_alpha_to_one": False} if kind == "sd21" else {"skip_prk_steps": True}
    prediction = "v_prediction" if kind == "sd21" else "epsilon"
    pipeline = StableDiffusionPipeline(
        vae=small_vae(scaling_factor=0.18215), unet=unet, tokenizer=tokenizer(folder.with_name("words")),
        text_encoder=CLIPTextModel(text_config(hidden_act="gelu" if second else "quick_gelu")),
        scheduler=kinds[kind](prediction_type=prediction, **schedule, **extra),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return pipeline


def diffusion_xl(folder: Path, variant: str | None = None, **vae: object) -> StableDiffusionXLPipeline:
    """SDXL's parts: two text encoders, a UNet with added conditions, a VAE that wants float32; 40 pooled values."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=(2, 4),
        cross_attention_dim=2 * WIDTH, use_linear_projection=True, transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 40,
    )  # fmt: skip
    words = tokenizer(folder.with_name("words"))
    pipeline = StableDiffusionXLPipeline(
        vae=small_vae(scaling_factor=0.13025, force_upcast=True, **vae), unet=unet, tokenizer=words, tokenizer_2=words,
        text_encoder=CLIPTextModel(text_config(num_hidden_layers=3)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(num_hidden_layers=3, projection_dim=40)),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            timestep_spacing="leading",
        ),
    )  # fmt: skip
    pipeline.save_pretrained(folder, variant=variant)
    return pipeline


def in_hub_cache(cache: Path, repository: str, commit: str, folder: Path) -> None:
    """Lays the folder's files out in a cache as huggingface_hub does: blobs by hash, a snapshot of links, a ref."""
    root = cache / f"models--{repository.replace('/', '--')}"
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = file.read_bytes()
        blob = root / "blobs" / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link = root / "snapshots" / commit / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)


def vision_transformer(folder: Path) -> Path:
    """DINO's architecture (ViT, class token) at toy width."""
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def dino(folder: Path, kind: str) -> torch.nn.Module:
    """dino-vits16, dinov2-small or dinov2-with-registers-small in their own sizes of image and patch, 2 thin layers."""
    torch.manual_seed(4)
    small = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    if kind == "vit":
        model = ViTModel(ViTConfig(intermediate_size=48, image_size=224, patch_size=16, **small), False)
        settings: dict = {
            "do_normalize": True, "do_resize": True, "image_mean": [0.485, 0.456, 0.406], "resample": 2, "size": 224,
            "image_std": [0.229, 0.224, 0.225],
        }  # fmt: skip
    else:
        configs = {"dinov2": Dinov2Config, "dinov2_with_registers": Dinov2WithRegistersConfig}
        models = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}
        model = models[kind](configs[kind](image_size=518, patch_size=14, mlp_ratio=2, layerscale_value=1.0, **small))
        settings = {
            "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_normalize": True, "do_resize": True,
            "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3,
            "size": {"shortest_edge": 256},
        }  # fmt: skip
    for parameter in model.parameters():  # an untrained one hardly looks at the image: positions and patches alike
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model
