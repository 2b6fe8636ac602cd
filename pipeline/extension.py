"""Operators that a bundle lacks, added on the spot: an extended bundle in the user's cache, made once.

It is found again by what it depends on: the bundle's manifest, the operator's name, and the text of a user's file (not
of what that file imports).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsd.engine.files import read_manifest
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.model import MANIFEST
from rlsd.pipeline.tasks import TASKS, Task, named_task

Operators = Mapping[str, Any]  # name -> torch module


def cache() -> Path:
    """The folder of extended bundles."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlsd" / "bundles"


def manifest_of(bundle: Path) -> list[str]:
    """The lines of the bundle's manifest. InputError."""
    try:
        return read_manifest(bundle)
    except OSError as error:
        raise InputError(f"model {bundle}: its manifest cannot be read: {error.strerror}") from error


def has_operator(bundle: Path, name: str) -> bool:
    """Whether the bundle's manifest names the operator."""
    return any(line.split()[:2] == ["operator", name] for line in manifest_of(bundle))


def image_of(bundle: Path) -> tuple[int, ...]:
    """The shape of the bundle's images [C, H, W], as its manifest says."""
    for line in manifest_of(bundle):
        key, _, values = line.partition(" ")
        if key == "image" and re.fullmatch(r"[0-9]{1,10}( [0-9]{1,10}){2}", values):
            return tuple(map(int, values.split()))
    raise InputError(f"model {bundle}: its manifest does not say how large its images are")


def for_task(bundle: Path, name: str) -> Path:
    """The bundle itself, or for a chain such as sr4+jpeg that it lacks one that has it. InputError."""
    if "+" not in name or has_operator(bundle, (task := named_task(name)).operator):
        return bundle

    def make(image: Sequence[int]) -> Operators:
        from rlsd.export.operators import chain

        found, operator = chain("+".join(TASKS[part].operator for part in name.split("+")), image)
        return {found: operator}

    return extended(bundle, task.operator, b"", make)


def for_operator(bundle: Path, spec: str) -> tuple[Path, Task]:
    """A bundle with the user's operator FILE.py:NAME, and its task. InputError."""
    file = Path(spec.rpartition(":")[0])
    if not file.is_file():
        raise InputError(f"operator {spec!r} is not understood: FILE.py:NAME is wanted, with a file that is there")

    def make(image: Sequence[int]) -> Operators:
        from rlsd.export.own import load_own

        return {name: load_own(spec, image)[1]}

    name = own_name(spec)
    if has_operator(bundle, name):
        raise InputError(f"operator {spec!r} would be called {name}, as one of the bundle's own: rename it")
    return extended(bundle, name, file.read_bytes(), make), Task(name, f"{file.name}'s own operator", name)


def own_name(spec: str) -> str:
    """What a bundle calls the operator FILE.py:NAME: NAME in lower_case."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", spec.rpartition(":")[2]).lower()


def extended(bundle: Path, name: str, content: bytes, make: Callable[[Sequence[int]], Operators]) -> Path:
    """The bundle with one more operator, from the cache or made now; make: image shape -> the operator by its name."""
    parts = ["\n".join(manifest_of(bundle)).encode(), name.encode(), content]
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    out = cache() / f"{name[:40]}-{digest[:16]}"
    if (out / MANIFEST).is_file():
        return out
    try:
        from rlsd.export.check import CheckError
        from rlsd.export.extend import extend
    except ModuleNotFoundError as error:
        raise InputError(
            f"operator {name} is not in the bundle, and adding it needs {error.name}: pip install 'rlsd[export]'"
        ) from None
    try:
        return extend(bundle, out, make(image_of(bundle)))
    except FileExistsError:  # another process was as quick
        return out
    except (ValueError, CheckError, NotImplementedError) as error:
        raise InputError(" ".join(str(error).split())) from error
