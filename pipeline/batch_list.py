"""What a batch works on: a folder, a pattern, files, a manifest or zarr arrays, listed lazily in a stable order."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from rlsd.pipeline import zarr_arrays
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.manifest import Entry, columns_of, default_name, open_manifest

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy", ".dcm")


class Listing(Protocol):
    """Items in a stable order. digest: of all that decides which item is which. root: what a manifest's paths are
    relative to, None without one."""

    @property
    def root(self) -> Path | None: ...

    @property
    def digest(self) -> str: ...

    @property
    def count(self) -> int: ...

    def entries(self) -> Iterator[Entry]:
        """The items, made one at a time."""
        ...


@dataclass(frozen=True)
class Files:
    """Files in their order; all that is kept of them is their names. folder: put in front of each."""

    names: Sequence[str]
    folder: str = ""
    root: Path | None = None

    @property
    def count(self) -> int:
        return len(self.names)

    @property
    def digest(self) -> str:
        total = sha256()
        for name in self.names:
            total.update(os.fsencode(name) + b"\0")
        return total.hexdigest()

    def entries(self) -> Iterator[Entry]:
        for index, name in enumerate(self.names):
            yield Entry(index, default_name(index, name), os.path.join(self.folder, name))


@dataclass(frozen=True)
class Elements:
    """The elements of zarr arrays, array after array."""

    arrays: Sequence[tuple[Path, tuple[int, ...]]]
    root: Path | None = None

    @property
    def count(self) -> int:
        return sum(shape[0] for _, shape in self.arrays)

    @property
    def digest(self) -> str:
        return sha256(repr([(folder.name, shape) for folder, shape in self.arrays]).encode()).hexdigest()

    def entries(self) -> Iterator[Entry]:
        index = 0
        for folder, shape in self.arrays:
            for element in range(shape[0]):
                yield Entry(index, default_name(index, folder.stem), f"{folder}[{element}]")
                index += 1


def list_inputs(given: Sequence[str], root: Path | None, params: Collection[str], out: Path | None = None) -> Listing:
    """The items that --input names. root: that no path of a manifest may leave. out: the output folder, below which a
    pattern finds nothing. InputError when there are none."""
    if "" in given:
        raise InputError("input is empty, as an unset variable of a shell is; the name of a file or folder is wanted")
    if (manifest := manifest_in(given)) is not None:
        return open_manifest(manifest, root, params)
    if root is not None:
        raise InputError(f"root is {root}, which is for a manifest: --input FILE.csv")
    if len(given) != 1:
        for name in given:
            if os.path.isdir(name):
                raise InputError(f"input {name} is a folder among {len(given)} inputs; allowed are one folder or files")
        return Files(list(given))
    path = Path(given[0])
    if path.is_dir():
        return _zarr(path) if zarr_arrays.is_zarr(path) else _folder(path)
    if path.exists() or zarr_arrays.split_element(path):
        return Files([given[0]])
    if not glob.has_magic(given[0]):
        raise InputError(f"input {path} does not exist")
    matched = sorted(name for name in glob.iglob(given[0], recursive=True) if _is_item(name))
    found = matched if out is None else _outside(matched, os.path.realpath(out))
    if not found:
        raise InputError(f"input {path} matches no file{' outside of the output folder' if matched else ''}")
    return Files(found)


def manifest_in(given: Sequence[str]) -> Path | None:
    """The manifest that --input names, None where it names something else."""
    return Path(given[0]) if len(given) == 1 and given[0].lower().endswith(".csv") else None


def own_columns(given: Sequence[str]) -> list[str]:
    """What a manifest may give each item for itself, by its columns; nothing without a manifest. InputError."""
    manifest = manifest_in(given)
    return columns_of(manifest) if manifest is not None else []


def _is_item(name: str) -> bool:
    """Whether it is a file, or a link that leads nowhere: an item that fails, lest the others' numbers depend on it."""
    return os.path.isfile(name) or (os.path.islink(name) and not os.path.exists(name))


def _outside(names: Sequence[str], folder: str) -> list[str]:
    """The names that do not lie below `folder`, whose links are resolved."""
    folders = {os.path.dirname(name) for name in names}
    inside = {each for each in folders if Path(os.path.realpath(each)).is_relative_to(folder)}
    return [name for name in names if os.path.dirname(name) not in inside]


def _folder(path: Path) -> Files:
    """The folder's own files that have a name of an image, sorted; nothing of its subfolders."""
    try:
        with os.scandir(path) as entries:
            named = [e for e in entries if e.name[:1] != "." and e.name.lower().endswith(SUFFIXES)]
            names = [e.name for e in named if (_is_item(e.path) if e.is_symlink() else e.is_file())]
    except OSError as error:
        raise InputError(f"input {path} cannot be read: {error.strerror}") from None
    if not names:
        raise InputError(f"input {path} has no files named {' '.join(SUFFIXES)}; a pattern takes any: '{path}/*'")
    return Files(sorted(names), str(path))


def _zarr(path: Path) -> Elements:
    arrays = [(folder, zarr_arrays.shape_of(folder)) for folder in zarr_arrays.arrays_of(path)]
    found = Elements(arrays)
    if not found.count:
        raise InputError(f"input {path} holds no arrays with items")
    return found
