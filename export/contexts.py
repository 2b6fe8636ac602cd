"""What a prior is conditioned on: text through a checkpoint's own encoders, or a table of class embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rlsd.export.bundle import check_name
from rlsd.export.layout import CheckpointError, has_vocabulary, load_network, read_index, read_json

TOKENS = 77  # of CLIP's text encoders, for a checkpoint that comes without one


class TextEncoder:
    """The text encoder of Stable Diffusion 1.x and 2.x, or both of SDXL, from a folder in diffusers layout.

    `shape` is that of a context [L, C]. For SDXL the pooled embedding fills the rows behind those of the tokens, padded
    with zeros to whole rows of C; rlsd.export.diffusers_unet.PooledText takes them apart again.
    """

    def __init__(self, checkpoint: Path, halves: bool = False):
        self.pooled = (checkpoint / "text_encoder_2").is_dir()
        for suffix in ("", "_2") if self.pooled else ("",):
            for part in (f"text_encoder{suffix}", f"tokenizer{suffix}"):
                if not (checkpoint / part).is_dir():
                    raise CheckpointError(f"text encoder {checkpoint} has no folder {part}")
        from transformers import CLIPTextModel, CLIPTextModelWithProjection
        from transformers.utils import logging

        logging.disable_progress_bar()
        kinds = {"": CLIPTextModel}
        if self.pooled:
            kinds["_2"] = CLIPTextModelWithProjection
        self.parts: list[tuple[Any, Any]] = []
        for suffix, kind in kinds.items():
            folder = checkpoint / f"text_encoder{suffix}"
            tokenizer, encoder = _tokenizer(checkpoint / f"tokenizer{suffix}"), load_network(kind, folder, halves)
            last, count = max(tokenizer.get_vocab().values()), encoder.config.vocab_size
            if last >= count:
                raise CheckpointError(f"tokenizer{suffix} of {checkpoint} has token {last}, its encoder only {count}")
            self.parts.append((tokenizer, encoder))
        lengths = [_length(*part) for part in self.parts]
        if len(set(lengths)) > 1:
            raise CheckpointError(f"the text encoders of {checkpoint} take {lengths[0]} and {lengths[1]} tokens")
        self.zeros = self.pooled and read_index(checkpoint).get("force_zeros_for_empty_prompt", True)

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """The context [L, C] of a prompt. CheckpointError for one that is too long."""
        encoded = [self._encoded(tokenizer, encoder, prompt) for tokenizer, encoder in self.parts]
        if not self.pooled:
            return encoded[0].last_hidden_state[0].float()
        text = torch.cat([each.hidden_states[-2][0] for each in encoded], -1).float()
        return with_pooled(text, encoded[-1].text_embeds[0].float())

    def null(self) -> Tensor:
        """The context of no prompt: zeros for an SDXL that was trained so, else that of the empty prompt."""
        empty = self.encode("")
        return torch.zeros_like(empty) if self.zeros else empty

    def _encoded(self, tokenizer: Any, encoder: Any, prompt: str) -> Any:
        length = _length(tokenizer, encoder)
        count = len(tokenizer(prompt).input_ids)
        if count > length:
            raise CheckpointError(f"prompt {prompt!r} has {count - 2} tokens; the text encoder takes {length - 2}")
        tokens = tokenizer(prompt, padding="max_length", max_length=length, return_tensors="pt")
        masked = not self.pooled and getattr(encoder.config, "use_attention_mask", False)
        given = {"attention_mask": tokens.attention_mask} if masked else {}
        return encoder(tokens.input_ids, output_hidden_states=True, **given)


def _length(tokenizer: Any, encoder: Any) -> int:
    """How many tokens a text encoder takes, those of begin and end among them."""
    return min(tokenizer.model_max_length, encoder.config.max_position_embeddings)


def _tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer of a folder. CheckpointError without a vocabulary: transformers would make up ids."""
    from transformers import CLIPTokenizer

    if not has_vocabulary({path.name for path in folder.iterdir()}):
        raise CheckpointError(f"{folder} has neither tokenizer.json nor both vocab.json and merges.txt")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of the tokenizers' own library, which has no class for them
        said = " ".join(str(error).split())
        raise CheckpointError(f"{folder} cannot be loaded: {said[:300]}") from error


def with_pooled(text: Tensor, pooled: Tensor) -> Tensor:
    """[L, C] and [P] as [L + R, C], R the rows that P values fill."""
    width = text.shape[1]
    padded = torch.nn.functional.pad(pooled, (0, -len(pooled) % width))
    return torch.cat([text, padded.view(-1, width)])


def load_contexts(
    checkpoint: Path, width: int, pooled: int, prompts: Mapping[str, str], halves: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The null context [L + R, width] and named ones: a table of class embeddings, or prompts that are encoded.

    pooled: how many values of a pooled embedding, in R rows, the UNet takes.
    A checkpoint that brings neither a table nor a text encoder has zeros for a null context, and no prompts.
    """
    for name in prompts:
        check_name("prompt", name)
    table = checkpoint / "context"
    has_text = any((checkpoint / part).is_dir() for part in ("text_encoder", "text_encoder_2"))
    if prompts and (table.is_dir() or not has_text):
        raise CheckpointError(f"prompt {next(iter(prompts))!r}: checkpoint {checkpoint} has no text encoder")
    if table.is_dir():
        rows_of, described = (
            load_file(table / "context.safetensors")["context"].float(),
            read_json(table / "config.json"),
        )
        named = dict(zip(described["names"], rows_of))
        return named.pop(described["names"][described["null"]]), named
    if not has_text:
        return with_pooled(torch.zeros(TOKENS, width), torch.zeros(pooled)), {}
    encoder = TextEncoder(checkpoint, halves)
    null = encoder.null()
    given = encoder.parts[-1][1].config.projection_dim if encoder.pooled else 0
    if null.shape[1] != width or given != pooled:
        raise CheckpointError(
            f"checkpoint {checkpoint}: its text encoders give contexts of width {null.shape[1]} and {given} pooled "
            f"values, its UNet takes a width of {width} and {pooled} pooled values"
        )
    return null, {name: encoder.encode(prompt) for name, prompt in prompts.items()}
