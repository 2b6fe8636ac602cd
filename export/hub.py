"""Finds a checkpoint: a local folder, or a pinned commit of a repository on the Hugging Face hub or in its cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsd.export.layout import PARTS, CheckpointError, missing_parts, needed_files

REPOSITORY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*/[A-Za-z0-9_-][A-Za-z0-9_.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Found:
    """folder: where the checkpoint lies. name: for a bundle. origin: the words that find it again."""

    folder: Path
    name: str
    origin: str


def locate(
    checkpoint: Path | str,
    revision: str | None = None,
    halves: bool = False,
    cache: Path | None = None,
    parts: Sequence[str] = PARTS,
) -> Found:
    """The checkpoint of a folder, or of `owner/name` at a commit; `owner/name@COMMIT` says both at once.

    revision: the full hash of a commit (40 hexadecimal digits), so that the same words always mean the same weights.
    halves: prefer weights in halves, where the repository has both. cache: the hub's cache, default its own. What the
    cache holds is not asked for on the network, unless it holds halves only and others are wanted. parts: the folders
    that are wanted. Raises CheckpointError.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"revision {revision!r} is given, but checkpoint {checkpoint} is a local folder")
        return Found(folder, folder.resolve().name, str(folder.resolve()))
    if folder.suffix in (".safetensors", ".ckpt"):
        raise CheckpointError(
            f"checkpoint {checkpoint} is a single-file checkpoint; a folder in diffusers layout is wanted: "
            f"StableDiffusionPipeline.from_single_file({str(checkpoint)!r}).save_pretrained(FOLDER)"
        )
    name, at, commit = str(checkpoint).partition("@")
    if not REPOSITORY.fullmatch(name):
        raise CheckpointError(f"checkpoint {checkpoint} is neither a folder nor owner/name of a repository on the hub")
    if at and revision is not None:
        raise CheckpointError(f"revision {revision!r} is given, but checkpoint {checkpoint} names one already")
    commit = commit if at else revision or ""
    if not COMMIT.fullmatch(commit):
        raise CheckpointError(
            f"revision {commit or None!r} is not allowed for checkpoint {name}: "
            "the full hash of a commit, 40 hexadecimal digits, is wanted (or a folder that exists)"
        )
    return Found(fetch(name, commit, halves, cache, parts), name.replace("/", "-"), f"{name}@{commit}")


def fetch(repository: str, commit: str, halves: bool, cache: Path | None, parts: Sequence[str]) -> Path:
    """The folder of a commit's files in the cache, downloaded if they are not all there. CheckpointError."""
    try:
        from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    except ModuleNotFoundError as error:
        raise CheckpointError("a checkpoint on the hub needs huggingface_hub: pip install 'rlsd[export]'") from error
    lacks = "is not in the cache"
    for file in ("model_index.json", "unet/config.json", "text_encoder/config.json"):
        found = try_to_load_from_cache(repository, file, cache_dir=cache, revision=commit)
        folder = Path(found).parents[file.count("/")] if isinstance(found, str) else None
        if folder is None or missing_parts(folder, parts):
            continue
        if halves or not missing_parts(folder, parts, plain=True):
            return folder
        lacks = f"is in the cache in halves alone (to take them, give the folder {folder})"
    try:
        wanted = needed_files(HfApi().list_repo_files(repository, revision=commit), halves, parts)
        folder = Path(snapshot_download(repository, revision=commit, cache_dir=cache, allow_patterns=wanted))
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {repository}: {error}") from None
    except Exception as error:  # the classes of the hub's and its connection's errors change between versions
        said = str(error).strip().splitlines()
        raise CheckpointError(
            f"checkpoint {repository} at {commit} {lacks} and cannot be had from the hub: "
            f"{said[0] if said else type(error).__name__}"
        ) from error
    missing = missing_parts(folder, parts)
    if missing:
        raise CheckpointError(f"checkpoint {repository} at {commit} has no {', '.join(missing)} in safetensors")
    return folder
