"""Prompts as contexts, through the text encoder of the checkpoint that a bundle was made from. Needs torch."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from rlsd.engine import Engine
from rlsd.pipeline.errors import InputError

TOLERANCE = 2e-2  # between null contexts, relative: the same weights in halves and in float32 differ by less


def prompt_context(engine: Engine, prompt: str, text_encoder: str | None = None) -> np.ndarray:
    """The context [L, C] of a prompt for the engine's bundle.

    text_encoder: a checkpoint's folder in diffusers layout, or owner/name@COMMIT; default the one that the bundle's
    manifest names. Raises InputError when there is none, when it does not fit the bundle, and without transformers.
    """
    if engine.context_shape is None:
        raise InputError(f"prompt {prompt!r} is given, but the prior {engine.name} takes no context")
    where = text_encoder or recorded(engine)
    if where is None:
        raise InputError(
            f"the prior {engine.name} names no text encoder: give --text-encoder, or --class for its classes"
        )
    halves = engine.describe()["precision"][0] == "fp16"
    context = _encode(where, prompt, halves)
    if context.shape != engine.context_shape:
        raise InputError(
            f"text encoder {where} makes contexts {list(context.shape)}; "
            f"the prior {engine.name} takes {list(engine.context_shape)}"
        )
    _check_null(engine, where, halves)
    return context


def recorded(engine: Engine) -> str | None:
    """Where the bundle says that its text encoder is: its fact `info text_encoder WHERE`."""
    for line in engine.describe().get("info", []):
        key, _, where = line.partition(" ")
        if key == "text_encoder":
            return where
    return None


def _check_null(engine: Engine, where: str, halves: bool) -> None:
    """The bundle's null context shows whether it is the same text encoder, unless it is zeros as SDXL's is."""
    data = engine.file(engine.describe()["null_context"][0])
    null = np.frombuffer(data, np.float32).reshape(engine.context_shape or ())
    if null.any() and np.linalg.norm(_encode(where, "", halves) - null) > TOLERANCE * np.linalg.norm(null):
        raise InputError(f"text encoder {where} is not the one that the prior {engine.name} was exported with")


@functools.lru_cache(maxsize=64)
def _encode(where: str, prompt: str, halves: bool) -> np.ndarray:
    encoder = _encoder(where, halves)
    try:
        context: np.ndarray = encoder.encode(prompt).numpy()
    except ValueError as error:
        raise InputError(str(error)) from error
    context.flags.writeable = False
    return context


@functools.lru_cache(maxsize=1)
def _encoder(where: str, halves: bool) -> Any:
    try:
        from rlsd.export.contexts import TextEncoder
        from rlsd.export.hub import locate
        from rlsd.export.layout import TEXT
    except ModuleNotFoundError as error:
        raise InputError(f"a prompt needs {error.name}, which is not installed: pip install 'rlsd[export]'") from None
    try:
        return TextEncoder(locate(where, halves=halves, parts=TEXT).folder, halves)
    except (ValueError, OSError) as error:
        raise InputError(f"text encoder {where}: {' '.join(str(error).split())}") from error
