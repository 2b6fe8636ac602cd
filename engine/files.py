"""Files of a bundle as the core reads them: regular ones in its own folder, whose bytes are what the manifest says."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from rlsd.engine.native import RlsdError, Status

MANIFEST, LARGEST_MANIFEST = "manifest.txt", 1 << 20


def read_regular(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes, not through a symbolic link, never waiting for a pipe. OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > limit:
            raise OSError(0, f"it is not a regular file of at most {limit} bytes", str(path))
        return file.read(limit)


def read_manifest(bundle: Path) -> list[str]:
    """The lines of a bundle's manifest, which only the core checks. OSError."""
    return read_regular(bundle / MANIFEST, LARGEST_MANIFEST).decode(errors="replace").splitlines()


def is_for_cuda(bundle: Path) -> bool:
    """What the manifest says; the core reads it again, strictly."""
    try:
        return "target cuda" in read_manifest(bundle)[:10]
    except OSError:
        return False


def facts_in(lines: Iterable[str]) -> dict[str, list[str]]:
    """Lines "key value" of a manifest or of rlsd_engine_describe: key -> the values of each line with that key."""
    facts: dict[str, list[str]] = {}
    for line in lines:
        key, _, value = line.partition(" ")
        facts.setdefault(key, []).append(value)
    return facts


def read_verified(bundle: Path, name: str, files: Sequence[str]) -> bytes:
    """The bytes of the file `name`; files: the values "NAME SIZE SHA256" of the manifest's lines `file`.

    RlsdError where the manifest has no such file, or where it is no longer what it was when the core verified it.
    """
    known = {words[0]: words for words in map(str.split, files)}
    if name not in known:
        raise RlsdError(Status.BAD_BUNDLE, f"bundle file {name[:128]!r} is named but has no 'file' line")
    _, size, digest = known[name]
    try:
        data = read_regular(bundle / name, int(size))
    except OSError as error:
        raise RlsdError(Status.BAD_BUNDLE, f"bundle file {name}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise RlsdError(Status.BAD_BUNDLE, f"bundle file {name}: was altered: its SHA-256 is not the manifest's")
    return data
