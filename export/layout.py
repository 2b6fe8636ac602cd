"""A checkpoint's folder: what lies where in the layouts of diffusers and transformers, safetensors only."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

NETWORKS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
SETTINGS = ("scheduler", "tokenizer", "tokenizer_2")
PARTS = (*NETWORKS, *SETTINGS)
NEEDED = ("unet", "vae", "scheduler")
TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


class CheckpointError(ValueError):
    """The folder is not a checkpoint that can be exported; the message says why."""


def read_json(path: Path) -> dict:
    """A JSON object from a file; CheckpointError when it cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return found


def is_number(value: Any) -> bool:
    """Whether a value of a configuration is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_index(checkpoint: Path) -> dict:
    """The checkpoint's model_index.json; empty where there is none."""
    path = checkpoint / "model_index.json"
    return read_json(path) if path.is_file() else {}


def named_parts(index: Mapping[str, Any]) -> list[str]:
    """Those parts that an export reads, of a model_index.json; one that is [null, null] there is none."""
    kinds = {part: index.get(part) for part in PARTS}
    return [part for part, kind in kinds.items() if isinstance(kind, list) and kind and kind[0]]


def has_vocabulary(names: set[str]) -> bool:
    """Whether files of these names make a tokenizer: without, transformers makes one of its special tokens alone."""
    return "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names


def variant_of(files: set[str], stem: str, halves: bool) -> str | None:
    """Which weights to read: "fp16" or None, the plain ones. CheckpointError when there are neither.

    files: the names in the folder of one network. halves: the weights will be rounded to halves anyway.
    """
    plain = {f"{stem}.safetensors", f"{stem}.safetensors.index.json"} & files
    half = {f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"} & files
    if half and (halves or not plain):
        return "fp16"
    if not plain:
        raise CheckpointError(
            f"no {stem}.safetensors and no {stem}.fp16.safetensors is there: only safetensors are read"
        )
    return None


def cannot_load(folder: Path, error: Exception) -> str:
    """That a folder cannot be loaded, and why in one line."""
    said = " ".join(str(error).split())[:300]
    if not isinstance(error, (OSError, RuntimeError, ValueError)):  # what these say is a sentence
        said = f"{type(error).__name__}: {said}"
    return f"{folder} cannot be loaded: {said}"


def load_network(kind: Any, folder: Path, halves: bool = False, **given: Any) -> Any:
    """kind.from_pretrained of the folder's safetensors, float32, eval. CheckpointError unless every weight is there.

    halves: prefer weights in halves, where there are both.
    """
    stem = "model" if kind.__module__.startswith("transformers.") else NETWORKS["unet"]
    precision = "dtype" if stem == "model" else "torch_dtype"  # transformers' default is what config.json says
    try:
        variant = variant_of({path.name for path in folder.iterdir()}, stem, halves)
        model, told = kind.from_pretrained(
            folder, use_safetensors=True, variant=variant, local_files_only=True, output_loading_info=True,
            **{precision: torch.float32}, **given,
        )  # fmt: skip
    except MemoryError:
        raise
    except Exception as error:  # a config.json's values of wrong types raise of every kind
        raise CheckpointError(cannot_load(folder, error)) from error
    more = () if stem == "model" else ("unexpected_keys",)  # transformers reads CLIP's text half of a whole CLIP
    for problem in ("missing_keys", "mismatched_keys", *more):
        if told.get(problem):
            raise CheckpointError(f"{folder}: its weights do not fit its config.json: {sorted(told[problem])[0]}")
    return model.eval()


def needed_files(files: list[str], halves: bool, parts: Sequence[str] = PARTS) -> list[str]:
    """Those of a repository's files that are read of its `parts`: settings, one set of weights of each network."""
    chosen = ["model_index.json"] if "model_index.json" in files else []
    for part in SETTINGS:
        if part in parts:
            chosen += [file for file in files if file.startswith(f"{part}/") and file.endswith((".json", ".txt"))]
    for part, stem in NETWORKS.items():
        names = {file[len(part) + 1 :] for file in files if file.startswith(f"{part}/")}
        if not names or part not in parts:
            continue
        try:
            half = variant_of(names, stem, halves) == "fp16"
        except CheckpointError as error:
            raise CheckpointError(f"{part}: {error}") from None
        chosen += sorted(f"{part}/{name}" for name in names if name == "config.json" or _fits(name, stem, half))
    return chosen


def _fits(name: str, stem: str, half: bool) -> bool:
    """Whether it is the network's weights, a shard of them or their index: others may begin with the same word."""
    fp16 = r"\.fp16" if half else ""
    shard = r"-\d+-of-\d+"
    kinds = rf"({fp16}|{fp16}{shard}|{shard}{fp16})\.safetensors|\.safetensors\.index{fp16}\.json"
    return bool(re.fullmatch(f"{re.escape(stem)}({kinds})", name))


def missing_parts(checkpoint: Path, parts: Sequence[str] = PARTS, plain: bool = False) -> list[str]:
    """Those of the folder's `parts` that are needed and not there, or only in part; plain: in halves is not there."""
    index = read_index(checkpoint)
    needed = NEEDED if set(NEEDED) <= set(parts) else ("text_encoder", "tokenizer")
    found = [part for part in dict.fromkeys([*needed, *named_parts(index)]) if part in parts]
    return [part for part in found if not _is_whole(checkpoint / part, plain)]


def _is_whole(folder: Path, plain: bool) -> bool:
    names = {path.name for path in folder.iterdir() if path.exists()} if folder.is_dir() else set()
    stem = NETWORKS.get(folder.name)
    if stem is None:
        return has_vocabulary(names) if folder.name.startswith("tokenizer") else bool(names)
    try:
        half = variant_of(names, stem, False) == "fp16"
    except CheckpointError:
        return False
    index = folder / f"{stem}.safetensors.index{'.fp16' if half else ''}.json"
    shards = set(read_json(index).get("weight_map", {}).values()) if index.is_file() else set()
    return "config.json" in names and shards <= names and not (half and plain)
