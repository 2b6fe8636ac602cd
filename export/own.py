"""A user's own forward operator from a Python file, checked before it goes into a bundle."""

from __future__ import annotations

import importlib.util
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from rlsd.export.adjoint import check_own
from rlsd.export.check import CheckError
from rlsd.export.deepinv import from_physics, is_physics


def load_own(spec: str, image: Sequence[int]) -> tuple[str, nn.Module]:
    """The operator of `spec`, "FILE.py:NAME", and what a bundle calls it: NAME in lower_case.

    NAME is a torch module, or a function of the image shape (C, H, W) that makes one, such as its class; or a deepinv
    Physics for images in [0, 1], or a function that makes one (rlsd.export.deepinv.from_physics). A module's
    forward(x [B, C, H, W] in [-1, 1], **parameters) gives y [B, ...]; `parameters_of(image shape)` gives the shapes of
    an item's parameters by name, if it has any. `linear = True` claims that it is linear, which is then checked.
    Raises ValueError with the reason if there is no such operator, CheckError if it is not what it claims.
    """
    file, _, word = spec.rpartition(":")
    path = Path(file)
    if not path.is_file() or path.suffix != ".py" or not word.isidentifier():
        raise ValueError(f"operator {spec!r} is not allowed: FILE.py:NAME, with a file that is there")
    with _users(spec, path):
        found = getattr(_imported(path), word, None)
    if found is None:
        raise ValueError(f"operator {spec!r}: {path.name} defines no {word}")
    with _users(spec, path):
        operator = found if isinstance(found, nn.Module) else found(tuple(image))
    if is_physics(operator):
        operator = from_physics(operator, image)
    if not isinstance(operator, nn.Module):
        raise ValueError(f"operator {spec!r} is a {type(operator).__name__}, not a torch.nn.Module")
    operator = operator.float().eval().requires_grad_(False)
    with _users(spec, path):
        check_own(spec, operator, image)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", word).lower(), operator


@contextmanager
def _users(spec: str, path: Path) -> Iterator[None]:
    """What the user's code raises is said in one sentence, with the last of its lines that was reached."""
    try:
        yield
    except CheckError:
        raise
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
        where = f" ({path.name}, line {lines[-1]})" if lines else ""
        raise ValueError(f"operator {spec!r}: {type(error).__name__}: {error}{where}") from error


def _imported(path: Path) -> object:
    described = importlib.util.spec_from_file_location(f"rlsd_own_{path.stem}", path)
    assert described is not None and described.loader is not None
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module
