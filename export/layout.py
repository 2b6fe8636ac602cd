"""A checkpoint's folder: what lies where in the layouts of diffusers and transformers, safetensors only."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

NETWORKS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
SETTINGS = ("scheduler", "tokenizer", "tokenizer_2")
NEEDED = ("unet", "vae", "scheduler")


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


def read_index(checkpoint: Path) -> dict:
    """The checkpoint's model_index.json; empty where there is none."""
    path = checkpoint / "model_index.json"
    return read_json(path) if path.is_file() else {}


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
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"{folder} cannot be loaded: {said[:300]}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if told.get(problem):
            raise CheckpointError(f"{folder}: its weights do not fit its config.json: {sorted(told[problem])[0]}")
    return model.eval()


def needed_files(files: list[str], halves: bool) -> list[str]:
    """Those of a repository's files that an export reads: settings, and one set of weights of each network."""
    chosen = ["model_index.json"] if "model_index.json" in files else []
    for part in SETTINGS:
        chosen += [file for file in files if file.startswith(f"{part}/") and file.endswith((".json", ".txt"))]
    for part, stem in NETWORKS.items():
        names = {file[len(part) + 1 :] for file in files if file.startswith(f"{part}/")}
        if not names:
            continue
        try:
            half = variant_of(names, stem, halves) == "fp16"
        except CheckpointError as error:
            raise CheckpointError(f"{part}: {error}") from None
        weights = [name for name in names if name.startswith(stem) and ".safetensors" in name]
        chosen += sorted(f"{part}/{name}" for name in ["config.json", *weights] if _fits(name, half))
    return chosen


def _fits(name: str, half: bool) -> bool:
    return name == "config.json" or bool(re.search(r"\.fp16[.-]", name)) == half  # a shard: STEM.fp16-00001-of-00002


def missing_parts(checkpoint: Path) -> list[str]:
    """Parts that an export of the folder would need and that are not there, or are there only in part."""
    index = read_index(checkpoint)
    parts = dict.fromkeys([*NEEDED, *(part for part in (*NETWORKS, *SETTINGS) if (index.get(part) or [None])[0])])
    return [part for part in parts if not _is_whole(checkpoint / part, NETWORKS.get(part))]


def _is_whole(folder: Path, stem: str | None) -> bool:
    names = {path.name for path in folder.iterdir() if path.exists()} if folder.is_dir() else set()
    if stem is None:
        return bool(names)
    try:
        half = variant_of(names, stem, False) == "fp16"
    except CheckpointError:
        return False
    index = folder / f"{stem}.safetensors.index{'.fp16' if half else ''}.json"
    shards = set(read_json(index).get("weight_map", {}).values()) if index.is_file() else set()
    return "config.json" in names and shards <= names
