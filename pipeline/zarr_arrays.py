"""Elements of zarr arrays [items, ...] as if they were files, called FOLDER[INDEX].

Needs zarr: pip install 'rlsd[batch]'.

What an array's metadata names is checked before zarr acts on it: some codecs would unpickle, and links could lead
anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from rlsd.engine.files import read_regular
from rlsd.pipeline.errors import InputError

LARGEST_CHUNK, LARGEST_METADATA = 1 << 30, 1 << 20  # bytes
CODECS = {
    "blosc", "zstd", "gzip", "zlib", "lz4", "lzma", "bz2", "shuffle", "delta", "bitround", "fixedscaleoffset",
    "bytes", "transpose", "crc32c", "sharding_indexed",
}  # fmt: skip
_ELEMENT = re.compile(r"(.+)\[(\d{1,12})\]")


def split_element(path: Path) -> tuple[Path, int] | None:
    """FOLDER[INDEX] as the array's folder and the index; None for any other path."""
    match = _ELEMENT.fullmatch(str(path))
    if match is None or path.exists() or not is_array(Path(match[1])):
        return None
    return Path(match[1]), int(match[2])


def is_array(folder: Path) -> bool:
    """Whether the folder holds a zarr array, of either format."""
    return (folder / ".zarray").is_file() or _node_type(folder) == "array"


def is_zarr(folder: Path) -> bool:
    """Whether the folder holds a zarr array or group."""
    return is_array(folder) or (folder / ".zgroup").is_file() or _node_type(folder) == "group"


def _node_type(folder: Path) -> Any:
    file = folder / "zarr.json"
    return _metadata(file).get("node_type") if file.is_file() else None


def arrays_of(folder: Path) -> list[Path]:
    """The array itself, or the arrays directly inside a group by name."""
    if is_array(folder):
        return [folder]
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and is_array(entry))


def shape_of(folder: Path) -> tuple[int, ...]:
    """An array's shape. InputError when it is not usable."""
    return tuple(map(int, _opened(folder).shape))


def read_element(folder: Path, index: int, largest: int) -> np.ndarray:
    """array[index] of at most `largest` values. InputError when it is damaged, absent or not of numbers."""
    array = _opened(folder)
    if not 0 <= index < array.shape[0]:
        raise InputError(f"has {array.shape[0]} items, and so no item {index}")
    if not 0 < prod(array.shape[1:]) <= largest:
        raise InputError(f"has items of {prod(array.shape[1:])} values; allowed are 1 to {largest}")
    try:
        return np.ascontiguousarray(array[index])
    except Exception as error:
        raise InputError(f"cannot be read as zarr ({' '.join(str(error).split())[:160]})") from None


def digest(values: np.ndarray) -> str:
    """Hexadecimal SHA-256 of an element's bytes, little-endian."""
    return hashlib.sha256(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()).hexdigest()


def _opened(folder: Path) -> Any:
    file = _description(folder)
    return _open(folder, os.path.realpath(folder), file.stat().st_mtime_ns if file.exists() else 0)


def _description(folder: Path) -> Path:
    file = folder / ".zarray"
    return file if file.is_file() else folder / "zarr.json"


@lru_cache(maxsize=64)
def _open(folder: Path, real: str, _changed: int) -> Any:
    """The array, opened once as long as it stays the same."""
    try:
        import zarr
    except ModuleNotFoundError:
        raise InputError(f"{folder} needs zarr, which is not installed: pip install 'rlsd[batch]'") from None
    facts = _metadata(_description(folder))
    for name in _codecs(facts):
        if name.removeprefix("numcodecs.") not in CODECS:
            raise InputError(f"{folder} is stored with the codec {name!r}; allowed are {', '.join(sorted(CODECS))}")
    _refuse_links(folder)
    try:
        array = zarr.open_array(real, mode="r")
        chunk = prod(array.chunks) * array.dtype.itemsize
    except Exception as error:
        raise InputError(f"{folder} cannot be read as zarr ({' '.join(str(error).split())[:160]})") from None
    if array.dtype.kind not in "fub":
        raise InputError(f"{folder} has numbers of type {array.dtype}; allowed are bool, uint and floating point")
    if len(array.shape) < 2:
        raise InputError(f"{folder} has the shape {array.shape}; an array [items, ...] is wanted")
    if chunk > LARGEST_CHUNK:
        raise InputError(f"{folder} has chunks of {chunk} bytes; allowed are {LARGEST_CHUNK}")
    return array


def _metadata(file: Path) -> Mapping[str, Any]:
    try:
        facts = json.loads(read_regular(file, LARGEST_METADATA))  # not through a link
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{file} cannot be read as JSON of at most {LARGEST_METADATA} bytes") from None
    if not isinstance(facts, dict):
        raise InputError(f"{file} is not a description of an array")
    return facts


def _codecs(facts: Mapping[str, Any]) -> Iterator[str]:
    """Names of everything that would be run on the array's chunks, those of shards included."""
    listed = [facts.get("compressor"), *_list(facts.get("filters")), *_list(facts.get("codecs"))]
    for each in filter(None, listed):
        if isinstance(each, str):
            yield each
            continue
        yield str(each.get("id", each.get("name"))) if isinstance(each, dict) else repr(each)
        inner = each.get("configuration") if isinstance(each, dict) else None
        if isinstance(inner, dict):
            yield from _codecs({"codecs": [*_list(inner.get("codecs")), *_list(inner.get("index_codecs"))]})


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _refuse_links(folder: Path) -> None:
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(where, name)):
                raise InputError(f"{folder} has a symbolic link inside ({name}); its chunks must be plain files")
