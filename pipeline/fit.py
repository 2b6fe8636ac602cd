"""Fits pictures, masks and measurements to a bundle's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rlsd.pipeline.errors import InputError, about
from rlsd.pipeline.images import RAW, Picture, channels_first, kind_of, read_image, read_numbers, read_raw, scaled

_WHOLE = {  # parameters that are whole numbers: the least, the greatest, both in words
    "levels": (2, np.inf, "whole numbers of 2 or more"),
    "tables": (1, 255, "whole numbers from 1 to 255"),
}
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


@dataclass(frozen=True)
class Frame:
    """The bundle's image shape and the black border (left, top, right, bottom) that its prior was trained with."""

    image: tuple[int, ...]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def content(self) -> tuple[int, int]:
        """Height and width inside of the border."""
        left, top, right, bottom = self.padding
        return self.image[1] - top - bottom, self.image[2] - left - right

    def crop(self, images: np.ndarray) -> np.ndarray:
        """What lies inside of the border: [..., H, W] -> [..., content height, content width]."""
        left, top, _, _ = self.padding
        height, width = self.content
        return images[..., top : top + height, left : left + width]

    def pad(self, image: np.ndarray, value: float = -1.0) -> np.ndarray:
        """The border added again, black unless said otherwise: [..., content] -> [..., H, W]."""
        left, top, right, bottom = self.padding
        edges = [(0, 0)] * (image.ndim - 2) + [(top, bottom), (left, right)]
        return np.pad(image, edges, constant_values=value)


def fit_image(picture: Picture, frame: Frame) -> Picture:
    """The picture with the bundle's channels and size.

    One of the bundle's own size stays as it is; one of the content's size gets its black border; any other is
    resized (Lanczos) to fill the content, what overhangs being cut off equally on both sides.
    """
    notes = list(picture.notes)
    image = to_channels(picture.values, frame.image[0], notes)
    size, content = image.shape[1:], frame.content
    if size == frame.image[1:]:
        return Picture(image, tuple(notes))
    if size != content:
        image = resize_to_fill(image, content)
        cut = " and cut" if size[0] * content[1] != size[1] * content[0] else ""
        notes.append(f"resized{cut} from {size[1]}x{size[0]} to {content[1]}x{content[0]}")
    if content != frame.image[1:]:
        image = frame.pad(image)
        notes.append(f"black border added to {frame.image[2]}x{frame.image[1]}")
    return Picture(image, tuple(notes))


def to_channels(image: np.ndarray, channels: int, notes: list[str]) -> np.ndarray:
    """[1 or 3, H, W] -> [channels, H, W]: colour to gray by its luma, gray to colour by repeating it."""
    if len(image) == channels:
        return image
    if channels == 1:
        notes.append("colour turned to gray")
        return np.tensordot(LUMA, image, 1)[None]
    if len(image) == 1:
        notes.append("gray repeated in each channel")
        return np.repeat(image, channels, 0)
    raise InputError(f"has {len(image)} channels; the bundle's images have {channels}")


def resize_to_fill(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[C, h, w] -> [C, *size] by Lanczos, of the largest centred part that has the wanted proportions."""
    box = centred_part((image.shape[1], image.shape[2]), size)
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in image]
    resized = [plane.resize(size[::-1], Image.Resampling.LANCZOS, box=box) for plane in planes]
    return np.clip(np.stack([np.asarray(plane) for plane in resized]), -1, 1)


def centred_part(given: tuple[int, int], wanted: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the largest centred part of `given` (height, width) in the proportions wanted."""
    scale = min(given[0] / wanted[0], given[1] / wanted[1])
    # 28 * (900 / 28) is a little more than 900, and Pillow takes no box that passes the edge
    top, left = (max(0.0, (side - aim * scale) / 2) for side, aim in zip(given, wanted))
    return left, top, given[1] - left, given[0] - top


def read_measurement(
    path: Path,
    shape: Sequence[int],
    frame: Frame,
    pictorial: bool = True,
    notes: list[str] | None = None,
    pointwise: bool = False,
) -> np.ndarray:
    """A measurement of `shape` from NPY or zarr (floating point: as it is) or, if it is `pictorial`, from an image.

    8 and 16 bit values are scaled to [-1, 1]. One of the content's size gets the black border if the operator is
    `pointwise`; any other mixes the border in, so that it must have been there. What was done to an image that its
    owner may not expect is appended to `notes`.
    """
    shape, notes = tuple(shape), [] if notes is None else notes
    is_raw = (file := kind_of(path)) in RAW
    if not is_raw and (not pictorial or len(shape) != 3):
        raise InputError(f"{path} is an image, which this measurement is not: give it as floating-point NPY")
    try:
        if is_raw:
            y = read_raw(path, file)
            y = y if y.dtype.kind == "f" else scaled(y)
        else:
            picture = read_image(path)
            notes += picture.notes
            y = to_channels(picture.values, shape[0], notes)
        y = _shaped(y.astype(np.float32), shape, frame, border=-1.0 if pointwise else None)
    except InputError as error:
        raise about(path, error) from None
    if not np.isfinite(y).all():
        raise InputError(f"{path} has values that are NaN or infinite; a measurement must be finite")
    return y


def read_parameter(path: Path, name: str, shape: Sequence[int], frame: Frame) -> np.ndarray:
    """An operator's parameter of `shape` from NPY, zarr or an image: white is 1, black is 0.

    A mask of nothing but 0 and 1 may be an image of any depth. An image of a kernel is made to sum to 1.
    """
    shape = tuple(shape)
    is_raw = (file := kind_of(path)) in RAW
    kind = name.removeprefix("first_").removeprefix("second_")  # as a chain of two operators calls them
    try:
        value: np.ndarray
        if is_raw:
            value = read_raw(path, file).astype(np.float32)
        else:
            value = _white_is_one(path, kind == "mask")
            value = value / max(float(value.sum()), 1e-9) if kind == "kernel" else value
        value = _shaped(value, shape, frame, border=1.0)
    except InputError as error:
        raise about(path, error) from None
    if not np.isfinite(value).all():
        raise InputError(f"{path} has values that are NaN or infinite; the parameter {name} must be finite")
    if kind == "mask" and is_raw and not np.isin(value, (0, 1)).all():
        raise InputError(f"{path} has values other than 0 and 1; a mask is 1 where a pixel is observed, else 0")
    if kind == "mask" and not (frame.crop(value) if value.shape[-2:] == frame.image[1:] else value).any():
        raise InputError(f"{path} hides every pixel; a mask is 1 or white where a pixel is observed")
    if kind == "kernel" and not (abs(value.sum() - 1) < 1e-3):
        raise InputError(f"{path} sums to {value.sum():.4g}; a blur kernel must sum to 1")
    if kind in _WHOLE:
        least, most, allowed = _WHOLE[kind]
        if not ((value == np.round(value)) & (value >= least) & (value <= most)).all():
            raise InputError(f"{path} has values that the parameter {name} cannot have; allowed are {allowed}")
    return value


def _white_is_one(path: Path, is_mask: bool) -> np.ndarray:
    """An image as [1, H, W] from 0 (black) to 1 (white); of a mask that holds nothing but 0 and 1, 1 is white."""
    numbers = read_numbers(path, [])
    if is_mask and np.isin(numbers, (0, 1)).all():
        gray = to_channels(numbers.astype(np.float32), 1, [])
    else:
        gray = (to_channels(scaled(numbers), 1, []) + 1) / 2
    return (gray >= 0.5).astype(np.float32) if is_mask else gray


def _shaped(values: np.ndarray, shape: tuple[int, ...], frame: Frame, border: float | None) -> np.ndarray:
    """`values` in `shape`: as they are, as an image with its axes in another order, or with the border added.

    border: its value; None refuses an image without.
    """
    if values.shape == shape:
        return values
    why = ""
    if len(shape) == 3 and values.ndim in (2, 3):
        image = channels_first(values)
        if image.shape == shape:
            return image
        if shape[1:] == frame.image[1:] and image.shape == (shape[0], *frame.content):
            if border is not None:
                return frame.pad(image, border)
            why = ", measured with the prior's black border in place: the operator is not known to leave it as it is"
    if values.ndim == len(shape) + 1 and values.shape[1:] == shape and len(values) == 1:
        return values[0]  # an image format gives a matrix one channel
    given, wanted = (" x ".join(map(str, s)) for s in (values.shape, shape))
    raise InputError(f"has the shape {given}; {wanted} is wanted{why}")
