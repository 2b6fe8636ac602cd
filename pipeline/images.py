"""Reads images: PNG, JPEG, TIFF (8 and 16 bit, float), NPY and DICOM, told apart by their first bytes, not their names.

An element of a zarr array counts as a file, called FOLDER[INDEX]. Integers are scaled to [-1, 1]; floating-point
numbers are taken as being there already.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageOps

from rlsd.pipeline import zarr_arrays
from rlsd.pipeline.dicom import read_dicom
from rlsd.pipeline.errors import InputError, about

MAX_PIXELS = 100_000_000
DARK = 4096  # of 16 bits: what a sensor of 12 bits has at most
_KINDS = (
    (b"\x93NUMPY", "NPY"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
RAW = ("NPY", "ZARR")  # kinds that are bare arrays of numbers
TURNED, _TURNED = "turned as its EXIF orientation says", range(2, 9)
FROM_ZERO = "floating-point values from 0 up: taken as being in [-1, 1], where 0 is mid-gray"
_DIRECT = (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE, tifffile.PHOTOMETRIC.RGB)


class _IncompleteError(InputError):
    """Parts are missing, which tifffile and Pillow would take for black."""


@dataclass(frozen=True)
class Picture:
    """values: [C, H, W] float32 in [-1, 1], C is 1 or 3. notes: what was done that the file's owner may not expect."""

    values: np.ndarray
    notes: tuple[str, ...] = ()


def read_image(path: Path) -> Picture:
    """Reads one image. InputError when the file is missing, empty, damaged, of another format or not an image."""
    notes: list[str] = []
    numbers = read_numbers(path, notes)
    if numbers.dtype == np.uint16 and 0 < (most := numbers.max()) < DARK:
        notes.append(f"values up to {most} of 65535: very dark; scale them if the sensor has fewer bits")
    try:
        return Picture(scaled(numbers), tuple(notes))
    except InputError as error:
        raise about(path, error) from None


def read_numbers(path: Path, notes: list[str]) -> np.ndarray:
    """An image's numbers as its file has them: [C, H, W], not scaled. InputError as read_image."""
    kind = kind_of(path)
    try:
        if kind in RAW:
            array = read_raw(path, kind)
        elif kind == "DICOM":
            array = read_dicom(path, notes, MAX_PIXELS)
        elif kind == "TIFF":
            array = _read_tiff(path, notes)
        else:
            array = _read_pillow(path, kind, notes)
            if kind == "PNG" and _start_of(path)[24:26] > b"\x10\0":  # bits and colour type; gray alone keeps them
                notes.append("16 bits cut to 8")
        if array.dtype.kind == "f" and kind != "DICOM" and array.size and array.min() >= 0:
            notes.append(FROM_ZERO)
        return channels_first(array, notes)
    except InputError as error:
        raise about(path, error) from None


def kind_of(path: Path) -> str:
    """NPY, ZARR, PNG, JPEG, TIFF or DICOM. InputError when the file cannot be read or is none of these."""
    if zarr_arrays.split_element(path):
        return "ZARR"
    start = _start_of(path)
    if not start:
        raise InputError(f"{path} is empty")
    for magic, kind in _KINDS:
        if start.startswith(magic):
            return kind
    if start[128:132] == b"DICM":
        return "DICOM"
    raise InputError(f"{path} is not a PNG, JPEG, TIFF, NPY or DICOM file")


def _start_of(path: Path) -> bytes:
    """The first bytes of a regular file; a pipe would never end. InputError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise InputError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}; a file is wanted")
        return os.read(descriptor, 132)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, or of the bytes of an element of an array."""
    if element := zarr_arrays.split_element(path):
        return zarr_arrays.digest(zarr_arrays.read_element(*element, MAX_PIXELS))
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_npy(path: Path) -> np.ndarray:
    """The array of an NPY file; never unpickles. InputError when it is damaged or not of numbers."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        raise InputError(f"cannot be read as NPY ({_reason(error)})") from None
    check_pixels(array.size)
    check_numbers(array)
    return np.array(array)


def read_raw(path: Path, kind: str) -> np.ndarray:
    """The numbers of an NPY file or of an element of a zarr array. InputError."""
    element = zarr_arrays.split_element(path) if kind == "ZARR" else None
    if element is None:
        return read_npy(path)
    array = zarr_arrays.read_element(*element, MAX_PIXELS)
    check_numbers(array)
    return array


def check_numbers(array: np.ndarray) -> None:
    """InputError for an array that holds none of the numbers that images are made of."""
    if array.dtype.kind not in "fub" or array.dtype == np.uint32 or array.dtype == np.uint64:
        raise InputError(f"has numbers of type {array.dtype}; allowed are bool, uint8, uint16 and floating point")


def check_pixels(count: int) -> None:
    """InputError for arrays that are empty or absurdly large."""
    if not 0 < count <= MAX_PIXELS:
        raise InputError(f"has {count} values; allowed are 1 to {MAX_PIXELS}")


def _read_pillow(path: Path, kind: str, notes: list[str]) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its limit is not ours
            # Pillow maps a file that it knows the name of, which goes wrong for a palette that is to be turned
            with open(path, "rb") as stream, Image.open(stream, formats=[kind]) as image:
                check_pixels(image.width * image.height)
                if image.getexif().get(ExifTags.Base.Orientation, 1) in _TURNED:  # of a TIFF it is gone after loading
                    notes.append(TURNED)
                image.load()
                return _pillow_array(image)
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"has more values than the {MAX_PIXELS} that are allowed") from None
    except Exception as error:
        raise InputError(f"cannot be read as {kind} ({_reason(error)})") from None


def _pillow_array(image: Image.Image) -> np.ndarray:
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):
        array = np.asarray(turned)
        if array.min() < 0 or array.max() > 0xFFFF:
            raise InputError(f"has values from {array.min()} to {array.max()}; allowed are 16 bits")
        bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (16,))[0]
        return _full_range(array.astype(np.uint16), bits)
    if turned.mode == "F":
        return np.asarray(turned)
    transparent = "A" in turned.mode or "transparency" in turned.info
    colour = turned.mode not in ("1", "L", "LA", "La")
    mode = ("RGBA" if colour else "LA") if transparent else ("RGB" if colour else "L")
    return np.asarray(turned.convert(mode))


def _read_tiff(path: Path, notes: list[str]) -> np.ndarray:
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            check_pixels(page.size)
            if len(page.dataoffsets) < math.prod(page.chunked):
                raise _IncompleteError(f"has {len(page.dataoffsets)} of its {math.prod(page.chunked)} strips or tiles")
            if len(file.pages) > 1:
                notes.append(f"first of {len(file.pages)} pages")
            photometric = tifffile.PHOTOMETRIC(page.photometric)
            if photometric not in _DIRECT:
                raise InputError(f"colours are stored as {photometric.name}")  # Pillow may know how to convert them
            array = _full_range(page.asarray(), page.bitspersample)
            check_pixels(array.size)  # of a damaged file it may be empty whatever the page promised
            tag = page.tags.get(int(ExifTags.Base.Orientation))
    except _IncompleteError:
        raise
    except Exception as error:  # a compression or colour that tifffile cannot do alone: Pillow has its own decoders
        try:
            return _read_pillow(path, "TIFF", notes)
        except InputError:
            raise InputError(f"cannot be read as TIFF ({_reason(error)})") from None
    if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and array.ndim == 3:
        array = np.moveaxis(array, 0, -1)
    if photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype.kind in "bu":
        array = ~array  # of unsigned numbers: the largest minus each
    if tag is not None and tag.value in _TURNED:
        notes.append(TURNED)
        array = _turned(array, tag.value)
    return array


def _full_range(array: np.ndarray, bits: int | tuple[int, ...]) -> np.ndarray:
    """Unsigned numbers that have fewer bits than their type (12 of 16, say) over all that the type can hold."""
    if array.dtype.kind != "u" or not isinstance(bits, int) or bits >= 8 * array.dtype.itemsize:
        return array
    stretched: np.ndarray = np.round(array * (np.iinfo(array.dtype).max / (2**bits - 1))).astype(array.dtype)
    return stretched


def _turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, ...] upright, by an orientation of EXIF."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array[::-1] if orientation in (3, 4, 7, 8) else array


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def channels_first(array: np.ndarray, notes: list[str] | None = None) -> np.ndarray:
    """H x W, H x W x C or C x H x W as [C, H, W], C being 1 or 3; a channel of transparency is laid on black."""
    if array.ndim == 2:
        return array[None]
    if array.ndim == 3 and array.shape[2] in (1, 2, 3, 4):
        array = np.moveaxis(array, 2, 0)
    elif array.ndim != 3 or array.shape[0] not in (1, 2, 3, 4):
        shape = " x ".join(map(str, array.shape))
        raise InputError(f"has the shape {shape}; allowed are H x W, H x W x C and C x H x W with C from 1 to 4")
    if len(array) in (1, 3):
        return array
    if array.dtype.kind != "u":
        raise InputError("has a channel of transparency in floating point; allowed there are 1 or 3 channels")
    if notes is not None:
        notes.append("transparency laid on black")
    laid = np.round(array[:-1] * (array[-1] / np.iinfo(array.dtype).max))
    return laid.astype(array.dtype)


def scaled(array: np.ndarray) -> np.ndarray:
    """Numbers of an image as float32 in [-1, 1]; floating-point ones must lie there (to 1e-3) and be finite."""
    if array.dtype == bool:
        return array.astype(np.float32) * 2 - 1
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        return (array / (np.iinfo(array.dtype).max / 2) - 1).astype(np.float32)
    if array.dtype.kind != "f":
        raise InputError(f"has numbers of type {array.dtype}; allowed are bool, uint8, uint16 and floating point")
    if not np.isfinite(array).all():
        raise InputError("has values that are NaN or infinite; an image must be finite")
    low, high = float(array.min()), float(array.max())
    if low < -1.001 or high > 1.001:
        raise InputError(f"has floating-point values from {low:.4g} to {high:.4g}; they must lie in [-1, 1]")
    return np.clip(array, -1, 1).astype(np.float32)
