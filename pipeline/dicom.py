"""Reads DICOM images: pixel data, modality and window of the file. Needs pydicom: pip install 'rlsd[dicom]'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rlsd.pipeline.errors import InputError

_GRAY, _COLOUR = ("MONOCHROME1", "MONOCHROME2"), ("RGB", "YBR_FULL", "YBR_FULL_422")


def read_dicom(path: Path, notes: list[str], largest: int) -> np.ndarray:
    """An image [H, W] or [H, W, 3] in [-1, 1]: black to white as a viewer would show it.

    Gray values go through rescale slope and intercept, then through the file's first window (centre and width; without
    one, from the least to the largest value of this image), and MONOCHROME1 is inverted. Of several frames the first is
    taken. InputError when it is damaged, has more than `largest` values, or is of another kind.
    """
    try:
        import pydicom
    except ModuleNotFoundError:
        raise InputError("is DICOM, for which pydicom is needed: pip install 'rlsd[dicom]'") from None
    try:
        data = pydicom.dcmread(path)
        kind = str(data.PhotometricInterpretation)
        if kind not in (*_GRAY, *_COLOUR):
            raise InputError(f"has the photometric interpretation {kind}; allowed are {', '.join((*_GRAY, *_COLOUR))}")
        frames = int(data.get("NumberOfFrames", 1) or 1)
        count = int(data.Rows) * int(data.Columns) * int(data.SamplesPerPixel) * frames
        if not 0 < count <= largest:
            raise InputError(f"has {count} values; allowed are 1 to {largest}")
        pixels = data.pixel_array  # in RGB where it was stored as YBR
        if frames > 1:
            pixels = pixels[0]
            notes.append(f"first of {frames} frames")
        return _gray(data, pixels, kind, notes) if kind in _GRAY else _colour(pixels, int(data.BitsStored))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot be read as DICOM ({' '.join(str(error).split())[:160]})") from None


def _gray(data: Any, pixels: np.ndarray, kind: str, notes: list[str]) -> np.ndarray:
    values = pixels.astype(np.float64) * float(data.get("RescaleSlope", 1)) + float(data.get("RescaleIntercept", 0))
    centre, width = _first(data.get("WindowCenter")), _first(data.get("WindowWidth"))
    if centre is not None and width is not None and width >= 1:
        low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2  # DICOM PS3.3 C.11.2.1.2
        notes.append(f"window {low:g} to {high:g}, the file's own")
    else:
        low, high = float(values.min()), float(values.max())
        notes.append(f"window {low:g} to {high:g}, all values of the image")
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * 2 - 1
    if kind == "MONOCHROME1":
        notes.append("inverted: MONOCHROME1")
        scaled = -scaled
    return scaled.astype(np.float32)


def _colour(pixels: np.ndarray, bits: int) -> np.ndarray:
    return (pixels / ((2**bits - 1) / 2) - 1).astype(np.float32)


def _first(value: Any) -> float | None:
    """A number of a file that may give several, None where it gives none."""
    if value is None or value == "":
        return None
    return float(value[0] if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue" else value)
