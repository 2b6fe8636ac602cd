"""A user's own forward operator from a Python file, checked before it goes into a bundle."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rlsd.export.adjoint import check_own
from rlsd.export.check import CheckError
from rlsd.export.deepinv import from_physics, is_physics


def load_own(spec: str, image: Sequence[int]) -> tuple[str, nn.Module]:
    """The operator of `spec`, "FILE.py:NAME", and what a bundle calls it: NAME in lower_case.

    NAME is a torch module, or a function of the image shape (C, H, W) that makes one, such as its class; or a deepinv
    Physics for images in [0, 1], or a function that makes one (rlsd.export.deepinv.from_physics). A module's
    forward(x [B, C, H, W] in [-1, 1], **parameters) gives y [B, ...]; `parameters_of(image shape)` gives the shapes of
    an item's parameters by name, if it has any. `linear = True` claims that it is linear, which is then checked. The
    file may import what lies beside it. Tensors that are attributes of the module become its buffers.
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
    with _users(spec, path), _beside(path):
        operator = _made(found, image)
        if isinstance(operator, nn.Module) and not is_physics(operator):
            _keep_tensors(operator)
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
        mixed = re.search("double", str(error), re.I)
        hint = "; it is also run in float64: make constants with dtype=x.dtype" if mixed else ""
        raise ValueError(f"operator {spec!r}: {type(error).__name__}: {error}{where}{hint}") from error


def _made(found: Any, image: Sequence[int]) -> object:
    """The module itself, or what its class or a function makes, for the image shape where that is taken."""
    if isinstance(found, nn.Module):
        return found
    takes = inspect.signature(found)
    nothing = not takes.parameters or takes == inspect.signature(nn.Module)  # whose own seems to take anything
    return found() if nothing else found(tuple(image))


def _keep_tensors(module: nn.Module) -> None:
    """Makes buffers of tensors that are plain attributes: they follow the module to float64, and into a graph."""
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor) and not hasattr(type(part), name):  # which would hide a buffer
                delattr(part, name)
                part.register_buffer(name, value.detach())


def _imported(path: Path) -> object:
    described = importlib.util.spec_from_file_location(f"rlsd_own_{path.stem}", path)
    assert described is not None and described.loader is not None
    module = importlib.util.module_from_spec(described)
    sys.modules[described.name] = module  # where dataclasses look for what annotations name
    try:
        with _beside(path):
            described.loader.exec_module(module)
    except BaseException:
        del sys.modules[described.name]
        raise
    return module


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Modules that lie beside the file can be imported, and are forgotten: another file's may have the same names."""
    folder, before = path.resolve().parent, set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).resolve().is_relative_to(folder) and not name.startswith("rlsd_own_"):
                del sys.modules[name]
