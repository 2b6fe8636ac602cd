"""A diffusers UNet as the denoiser of a bundle: (z_t, t, context) -> eps, for every kind of prediction.

SDXL's UNet takes two more conditions. The pooled embedding of the prompt travels in extra rows behind those of the
context; the sizes that its `time_ids` state are those of the bundle's images.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from rlsd.export.layout import CheckpointError, cannot_load, is_number, load_network, read_json

PREDICTIONS = ("epsilon", "v_prediction", "sample")
# The least abar: where a schedule ends at no signal at all, its last value. diffusers' samplers take the same.
LEAST = 2.0**-24
# Their tables, where they have any, are not of DDPM's betas alone.
OTHER_SCHEDULES = ("EDM", "FlowMatch", "CogVideoX", "IPNDM")
BY_COSINE = ("squaredcos_cap_v2", "laplace")  # beta_start and beta_end play no part in these
LARGEST_OFFSET = 1_000_000  # that the engine takes
SIZES = 6  # of time_ids: original height and width, crop's top and left, target's height and width


class Denoiser(nn.Module):
    """A UNet whose prediction (epsilon, v_prediction or sample) is turned into the noise epsilon."""

    def __init__(self, unet: nn.Module, alphas_cumprod: Tensor, prediction: str):
        super().__init__()
        if prediction not in PREDICTIONS:
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


class PooledText(nn.Module):
    """SDXL's UNet for images of `size` (height, width), its pooled text embedding taken from the context.

    context [B, L + R, C]: L rows of the text's tokens, then the pooled embedding [pooled] in R rows of C, padded.
    """

    def __init__(self, unet: nn.Module, size: tuple[int, int], pooled: int, rows: int):
        super().__init__()
        self.unet, self.pooled, self.rows = unet, pooled, rows
        self.register_buffer("time_ids", torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32))

    def forward(self, z_t: Tensor, t: Tensor, context: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        text = context[:, : -self.rows]
        pooled = context[:, -self.rows :].flatten(1)[:, : self.pooled]
        added = {"text_embeds": pooled, "time_ids": self.time_ids.expand(len(z_t), SIZES)}
        return self.unet(z_t, t, text, added_cond_kwargs=added, return_dict=return_dict)


def load_unet(folder: Path, halves: bool = False) -> Any:
    """The UNet of a folder, float32, eval. CheckpointError for one that takes what a bundle cannot give it."""
    config = read_json(folder / "config.json")
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise CheckpointError(f"{folder} holds a {config['_class_name']}; only a UNet2DConditionModel can be exported")
    for field, allowed in (
        ("addition_embed_type", (None, "text_time")),
        ("encoder_hid_dim_type", (None,)),
        ("encoder_hid_dim", (None,)),
        ("class_embed_type", (None,)),
        ("num_class_embeds", (None,)),
        ("time_cond_proj_dim", (None,)),  # distilled for few steps, with guidance as an input: LCM
        ("dual_cross_attention", (None, False)),
    ):
        if config.get(field) not in allowed:
            known = " or ".join(str(value) for value in allowed)
            raise CheckpointError(f"{folder}: {field} {config[field]!r} is not supported, only {known}")
    width = config.get("cross_attention_dim", 1280)
    if not isinstance(width, int):
        raise CheckpointError(f"{folder}: cross_attention_dim {width!r} is not supported, only one whole number")
    into, out = (config.get(field, 4) for field in ("in_channels", "out_channels"))
    if into != out:
        raise CheckpointError(
            f"{folder}: the UNet maps {into} channels to {out}; "
            "one made for inpainting or editing cannot be exported, its text-to-image original can"
        )
    for field in ("conv_in_kernel", "conv_out_kernel"):
        side = config.get(field, 3)
        if not isinstance(side, int) or side % 2 != 1:
            raise CheckpointError(f"{folder}: {field} {side!r} is not supported, only an odd number: it keeps the size")
    return load_network(UNet2DConditionModel, folder, halves, low_cpu_mem_usage=False)


def pooled_width(config: Any) -> int:
    """Length of the pooled text embedding that a UNet takes beside the context; 0 for none. CheckpointError."""
    if config.addition_embed_type is None:
        return 0
    width = config.projection_class_embeddings_input_dim - SIZES * config.addition_time_embed_dim
    if width < 1:
        raise CheckpointError(
            f"projection_class_embeddings_input_dim {config.projection_class_embeddings_input_dim} leaves no room for "
            f"a pooled embedding beside {SIZES} sizes of {config.addition_time_embed_dim} values"
        )
    return width


def pooled_rows(config: Any) -> int:
    """How many rows of the context its pooled text embedding fills."""
    return -(-pooled_width(config) // config.cross_attention_dim)


def _check_schedule(folder: Path, config: Mapping[str, Any]) -> None:
    """CheckpointError for a scheduler's configuration whose table is not of DDPM's betas, or that does not say it."""
    name = str(config.get("_class_name", ""))
    trained = config.get("trained_betas") is not None
    if name.startswith(OTHER_SCHEDULES) or not ("beta_schedule" in config or trained):
        raise CheckpointError(f"{folder}: {name or 'it'} has no table of betas, which the method needs")
    for field, plain in (("timestep_type", "discrete"), ("use_flow_sigmas", False)):
        if (config.get(field) or plain) != plain:
            raise CheckpointError(f"{folder}: {field} {config[field]!r} is not supported, only {plain}")
    for field in ("beta_start", "beta_end"):  # whose defaults differ from class to class
        if not (trained or config.get("beta_schedule") in BY_COSINE or is_number(config.get(field))):
            raise CheckpointError(f"{folder}: {field} {config.get(field)!r} is not allowed: a number is wanted")
    count = config.get("num_train_timesteps", 1000)
    if not isinstance(count, int) or count < 2:
        raise CheckpointError(f"{folder}: num_train_timesteps {count!r} is not allowed: a whole number from 2 on")
    offset = config.get("steps_offset", 1)
    if not isinstance(offset, int) or isinstance(offset, bool) or not 0 <= offset <= LARGEST_OFFSET:
        raise CheckpointError(
            f"{folder}: steps_offset {offset!r} is not allowed: a whole number from 0 to {LARGEST_OFFSET}"
        )


def _is_falling(table: Tensor, betas: Tensor) -> bool:
    """Whether abar falls at each step from below 1 to 0 at most. Below LEAST, where it is clamped, it may stay."""
    if table.ndim != 1 or len(table) < 2 or not bool(table.isfinite().all()):
        return False
    falls = (table.diff() < 0) | (table[:-1] < LEAST)
    return bool(LEAST < table[0] < 1 and (betas > 0).all() and (betas <= 1).all() and falls.all())


def load_schedule(folder: Path) -> Any:
    """The noise schedule as a DDPMScheduler, whose table alphas_cumprod is above 0 everywhere. CheckpointError.

    A schedule rescaled to end at abar = 0 has its last value raised to LEAST. An epsilon-prediction says nothing about
    the image there, so that such a schedule is refused for one. Where a configuration names no steps_offset it is 1, as
    Stable Diffusion's pipelines have it, and not the scheduler's own 0.
    """
    config = read_json(folder / "scheduler_config.json")
    _check_schedule(folder, config)
    try:
        scheduler = DDPMScheduler.from_pretrained(folder)
    except NotImplementedError as error:
        raise CheckpointError(f"{folder}: beta_schedule {config.get('beta_schedule')!r} is not known") from error
    except Exception as error:  # of a field's type: they raise of every kind
        raise CheckpointError(cannot_load(folder, error)) from error
    if config.get("rescale_betas_zero_snr") and scheduler.config.prediction_type == "epsilon":
        raise CheckpointError(f"{folder}: rescale_betas_zero_snr is not allowed with prediction_type 'epsilon'")
    scheduler.register_to_config(steps_offset=config.get("steps_offset", 1))
    table = scheduler.alphas_cumprod.double()
    if not _is_falling(table, scheduler.betas):
        raise CheckpointError(f"{folder}: its betas are not allowed: abar must fall at each step, from below 1 to 0")
    scheduler.alphas_cumprod = table.clamp(min=LEAST)
    return scheduler
