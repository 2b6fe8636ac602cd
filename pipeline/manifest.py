"""A CSV with one item a row: strict about what it says, and about where its paths lead.

Columns: `input`, and any of `name`, `item`, `sigma`, `particles`, `class`, and the names of the operator's parameters
(paths of files). An empty cell means the run's own setting. What is wrong with the file as a whole (encoding, columns,
a name or item number given twice) is an InputError; what is wrong with one row becomes that entry's error.
"""

from __future__ import annotations

import csv
import os
import re
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TextIO

import numpy as np

from rlsd.pipeline.errors import InputError
from rlsd.pipeline.images import sha256
from rlsd.pipeline.settings import MAX_PARTICLES

OWN = ("input", "name", "item", "sigma", "particles", "class")
LONGEST_ROW, MOST_ITEMS = 1 << 16, 1 << 32
NAME = re.compile(r"\w[\w.-]{0,199}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)  # float() takes 1_0 and others
_ELEMENT = re.compile(r"(.+?)(\[\d{1,12}\])?", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """An item that is not read yet. index: addresses its random numbers. name: its folder in the output.

    given: the operator's parameters that it has for itself. sigma, particles, label: None for the run's own. error: why
    it cannot be done.
    """

    index: int
    name: str
    path: str
    given: Mapping[str, str] = field(default_factory=dict)
    sigma: float | None = None
    particles: int | None = None
    label: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Manifest:
    """A manifest's rows, read anew each time. root: resolved; no path may lead out of it. params: known parameters."""

    path: Path
    root: Path
    params: Collection[str]
    digest: str
    count: int

    def entries(self) -> Iterator[Entry]:
        """The rows in their order, one at a time. InputError when the file is no longer what it was."""
        seen = None
        for entry in _entries(self.path, self.root, self.params):
            if (now := _stamp(self.path)) != seen:
                if now is None or sha256(self.path) != self.digest:
                    raise InputError(f"{self.path} has changed since the batch began; bring it back to go on")
                seen = now
            yield entry


def open_manifest(path: Path, root: Path | None, params: Collection[str]) -> Manifest:
    """Reads the whole file once, keeping 16 bytes a row, to see that it is sound. InputError."""
    top = Path(os.path.realpath(root or path.parent))
    names, numbers, count = array("Q"), array("Q"), 0
    for entry in _entries(path, top, params):
        count += 1
        if _is_named(entry):
            names.append(int.from_bytes(blake2b(entry.name.lower().encode(), digest_size=8).digest(), "little"))
            numbers.append(entry.index)
    if not count:
        raise InputError(f"{path} has no rows below its header")
    for what, values in (("item", numbers), ("name", names)):  # equal numbers may make equal names
        if _twice(values):
            raise InputError(f"{path}: {_which(path, top, params, what)}")
    return Manifest(path, top, frozenset(params), sha256(path), count)


def columns_of(path: Path) -> list[str]:
    """The first line of a manifest, not checked. InputError when it cannot be read."""
    with _opened(path) as stream:
        return next(_rows(path, stream), [])


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when somebody writes to the file; None where it is gone."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _twice(values: array) -> bool:
    ordered = np.sort(np.frombuffer(values, np.uint64))
    return bool((ordered[1:] == ordered[:-1]).any())


def _which(path: Path, root: Path, params: Collection[str], what: str) -> str:
    """Says which name or item number is there twice."""
    seen: set[str | int] = set()
    for entry in filter(_is_named, _entries(path, root, params)):
        value = entry.name.lower() if what == "name" else entry.index
        if value in seen:
            hint = " (without one it is the row's)" if what == "item" else ""
            return f"{what} {value} is given twice; each item needs its own{hint}"
        seen.add(value)
    raise InputError(f"{path} changed while it was read")


def _entries(path: Path, root: Path, params: Collection[str]) -> Iterator[Entry]:
    with _opened(path) as stream:
        rows = _rows(path, stream)
        header = next(rows, [])
        _check_header(path, header, params)
        for number, cells in enumerate(rows):
            if number >= MOST_ITEMS:
                raise InputError(f"{path} has more than {MOST_ITEMS} rows")
            if len(cells) != len(header):
                raise InputError(f"{path}: row {number} has {len(cells)} cells; the header has {len(header)}")
            yield _entry(number, dict(zip(header, (cell.strip() for cell in cells))), root)


def _opened(path: Path) -> TextIO:
    try:
        if not path.is_file():
            raise InputError(f"{path} {'is no regular file' if path.exists() else 'does not exist'}")
        return open(path, encoding="utf-8-sig", newline="")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _rows(path: Path, stream: TextIO) -> Iterator[list[str]]:
    """The cells of each row that is not blank, of bounded length."""
    used = 0

    def lines() -> Iterator[str]:
        nonlocal used
        while line := stream.readline(LONGEST_ROW + 1):
            used += len(line)
            if used > LONGEST_ROW:
                raise InputError(f"{path} has a row of more than {LONGEST_ROW} characters")
            if "\0" in line:
                raise InputError(f"{path} has a NUL character, which text does not have")
            yield line

    try:
        for cells in csv.reader(lines(), strict=True):
            used = 0
            if cells:
                yield cells
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.object[error.start]:#x})") from None
    except csv.Error as error:
        raise InputError(f"{path} is not understood as CSV: {error}") from None


def _check_header(path: Path, header: Sequence[str], params: Collection[str]) -> None:
    known = [*OWN, *params]
    for column in header:
        if column not in known:
            raise InputError(f"{path} has the column {column[:100]!r}; allowed are {', '.join(known)}")
        if header.count(column) > 1:
            raise InputError(f"{path} has the column {column!r} twice")
    if "input" not in header:
        raise InputError(f"{path} has no column `input` in its first line")


def _entry(number: int, row: Mapping[str, str], root: Path) -> Entry:
    """The entry of a row; one that is not usable says why, and is called after its row if it has no usable name."""
    index, name = number, f"row {number}"  # which is no name of an item
    try:
        own = _whole("item", row.get("item"), 0, MOST_ITEMS - 1)
        index = number if own is None else own
        name = row.get("name") or default_name(index, row["input"])
        if not NAME.fullmatch(name):
            shown, name = name[:100], f"row {number}"
            raise InputError(f"name {shown!r} is not allowed: 1 to 200 of A-Z a-z 0-9 _ . -, not a dot or hyphen first")
        given = {key: str(inside(value, root)) for key, value in row.items() if key not in OWN and value}
        return Entry(
            index, name, str(inside(row["input"], root)), given, _sigma(row.get("sigma")),
            _whole("particles", row.get("particles"), 1, MAX_PARTICLES), row.get("class") or None,
        )  # fmt: skip
    except InputError as error:
        return Entry(index, name, row["input"][:1000], error=f"row {number}: {error}")


def _is_named(entry: Entry) -> bool:
    """Whether it has a number and a name, which no other may have."""
    return NAME.fullmatch(entry.name) is not None


def default_name(index: int, path: str) -> str:
    """The number of six digits and the file's stem, in characters that any file system takes."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(path).stem).strip(".-")[:80]
    return f"{index:06d}-{stem}" if stem else f"{index:06d}"


def inside(given: str, root: Path) -> Path:
    """The file that a cell names, links resolved. InputError unless it lies in the folder `root`, itself resolved."""
    if not given:
        raise InputError("input is empty; the path of a file is wanted")
    if os.path.isabs(given) or ".." in Path(given).parts:
        raise InputError(f"path {given[:200]!r} is not allowed: it must be relative to the folder, without `..`")
    match = _ELEMENT.fullmatch(given)
    file, element = (given, "") if match is None or os.path.lexists(root / given) else (match[1], match[2] or "")
    try:
        real = Path(os.path.realpath(root / file))
    except (OSError, ValueError) as error:
        raise InputError(f"path {given[:200]!r} cannot be resolved: {error}") from None
    if not real.is_relative_to(root):
        raise InputError(f"path {given[:200]!r} leads out of the folder, through a symbolic link")
    return real.with_name(real.name + element) if element else real


def _whole(field_name: str, given: str | None, least: int, most: int) -> int | None:
    if not given:
        return None
    if not re.fullmatch(r"[0-9]{1,10}", given) or not least <= int(given) <= most:
        raise InputError(f"{field_name} is {given[:40]!r}; allowed are {least} to {most}")
    return int(given)


def _sigma(given: str | None) -> float | None:
    if not given:
        return None
    value = float(given) if _NUMBER.fullmatch(given) else -1.0
    if not 0 <= value < float("inf"):
        raise InputError(f"sigma is {given[:40]!r}; it must be a number of 0 or more")
    return value
