"""A user's own forward operator from a Python file, checked before it goes into a bundle."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rlsd.export.check import CheckError
from rlsd.export.operators import default_parameters

ADJOINT_LIMIT = 1e-8  # in float64, relative to the product of the norms


def load_own(spec: str, image: Sequence[int]) -> tuple[str, nn.Module]:
    """The operator of `spec`, "FILE.py:NAME", and what a bundle calls it: NAME in lower_case.

    NAME is a torch module, or a function of the image shape (C, H, W) that makes one, such as its class. Its
    forward(x [B, C, H, W] in [-1, 1], **parameters) gives y [B, ...]; `parameters_of(image shape)` gives the shapes of
    an item's parameters by name, if it has any. `linear = True` claims that it is linear, which is then checked.
    Raises ValueError with the reason if there is no such operator, CheckError if it is not what it claims.
    """
    file, _, word = spec.rpartition(":")
    path = Path(file)
    if not path.is_file() or path.suffix != ".py" or not word.isidentifier():
        raise ValueError(f"operator {spec!r} is not allowed: FILE.py:NAME, with a file that is there")
    found = getattr(_imported(path), word, None)
    if found is None:
        raise ValueError(f"operator {spec!r}: {path.name} defines no {word}")
    operator = found if isinstance(found, nn.Module) else found(tuple(image))
    if not isinstance(operator, nn.Module):
        raise ValueError(f"operator {spec!r} is a {type(operator).__name__}, not a torch.nn.Module")
    operator = operator.float().eval().requires_grad_(False)
    check_own(spec, operator, image)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", word).lower(), operator


def check_own(spec: str, operator: nn.Module, image: Sequence[int]) -> None:
    """One measurement per image, a gradient that reaches it, and an adjoint if the operator claims to be linear."""
    precise = copy.deepcopy(operator).double()
    given = {name: value.double() for name, value in default_parameters(operator, image, 2).items()}
    x = (torch.rand(2, *image, dtype=torch.float64) * 2 - 1).requires_grad_(True)
    y = precise(x, **given)
    if not isinstance(y, Tensor) or y.dim() < 2 or y.shape[0] != 2 or not y.is_floating_point():
        raise CheckError(f"operator {spec!r} must give a real tensor [B, ...] for images [B, ...]: {_said(y)}")
    if not y.requires_grad:
        raise CheckError(f"operator {spec!r} gives no gradient in x")
    if not getattr(operator, "linear", False):
        return
    v = torch.randn_like(y)
    (pulled,) = torch.autograd.grad(y, x, v)
    y, x = y.detach(), x.detach()
    gap = abs(float((y * v).sum() - (x * pulled).sum())) / float(y.norm() * v.norm())
    if not gap <= ADJOINT_LIMIT:
        raise CheckError(f"operator {spec!r} says it is linear, but <f(x), v> and <x, f*(v)> differ by {gap:.1e}")


def _imported(path: Path) -> object:
    described = importlib.util.spec_from_file_location(f"rlsd_own_{path.stem}", path)
    assert described is not None and described.loader is not None
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


def _said(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
