"""Reads DICOM images: pixel data, modality and window of the file. Needs pydicom: pip install 'rlsd[dicom]'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rlsd.pipeline.errors import InputError

_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
_GRAY, _COLOUR = ("MONOCHROME1", "MONOCHROME2"), ("RGB", "YBR_FULL", "YBR_FULL_422")


def read_dicom(path: Path, notes: list[str], largest: int) -> np.ndarray:
    """An image [H, W] or [H, W, 3] in [-1, 1]: black to white as a viewer would show it.

    Gray values go through rescale slope and intercept, then through the file's first window (centre, width and
    function; without one, from the least to the largest value of this image, padding left out), and MONOCHROME1 is
    inverted. Of several frames the first is taken. InputError when it is damaged, has more than `largest` values, or is
    of another kind.
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
    slope, intercept = _first(data.get("RescaleSlope")), _first(data.get("RescaleIntercept"))
    values = pixels.astype(np.float64) * (1 if slope is None else slope) + (intercept or 0)
    scaled = _windowed(data, values, notes)
    if scaled is None:
        shown = values[~_padding(data, pixels)]
        shown, but = (shown, " but its padding") if 0 < shown.size < values.size else (values, "")
        low, high = float(shown.min()), float(shown.max())
        notes.append(f"window {low:g} to {high:g}, all values of the image{but}")
        scaled = _ramp(values, low, high)
    if kind == "MONOCHROME1":
        notes.append("inverted: MONOCHROME1")
        scaled = -scaled
    return scaled.astype(np.float32)


def _windowed(data: Any, values: np.ndarray, notes: list[str]) -> np.ndarray | None:
    """Values in [-1, 1] through the file's first window, as DICOM PS3.3 C.11.2.1 has it; None without one."""
    centre, width = _first(data.get("WindowCenter")), _first(data.get("WindowWidth"))
    function = str(data.get("VOILUTFunction") or "LINEAR").strip()
    if centre is None or width is None:
        return None
    if function not in _FUNCTIONS:
        raise InputError(f"has the window function {function[:40]}; allowed are {', '.join(_FUNCTIONS)}")
    if not (width >= 1 if function == "LINEAR" else width > 0):
        return None
    if function == "SIGMOID":
        notes.append(f"window {centre:g} +- {width / 2:g}, sigmoid, the file's own")
        return np.tanh(2 * (values - centre) / width)  # 2 / (1 + exp(-4 u)) - 1
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    low, high = centre - width / 2, centre + width / 2
    notes.append(f"window {low:g} to {high:g}, the file's own")
    return _ramp(values, low, high)


def _ramp(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """-1 up to `low`, 1 from `high` on."""
    ramp: np.ndarray = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * 2 - 1
    return ramp


def _padding(data: Any, pixels: np.ndarray) -> np.ndarray:
    """Where stored values only fill the rectangle: those from Pixel Padding Value to Pixel Padding Range Limit."""
    value, limit = _first(data.get("PixelPaddingValue")), _first(data.get("PixelPaddingRangeLimit"))
    if value is None:
        return np.zeros(pixels.shape, bool)
    ends = value, value if limit is None else limit
    return (pixels >= min(ends)) & (pixels <= max(ends))


def _colour(pixels: np.ndarray, bits: int) -> np.ndarray:
    return (pixels / ((2**bits - 1) / 2) - 1).astype(np.float32)


def _first(value: Any) -> float | None:
    """A number of a file that may give several, None where it gives none."""
    if value is None or value == "":
        return None
    return float(value[0] if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue" else value)
