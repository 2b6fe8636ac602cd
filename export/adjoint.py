"""What every operator that is not ours must show before it is exported."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlsd.export.check import CheckError, relative_error
from rlsd.export.operators import default_parameters
from rlsd.export.physics import FromPhysics, Measurement, PhysicsOperator

MIXED_LIMIT = 1e-4  # relative, where a part is computed in float32; what mixes is far above
ADJOINT_LIMIT = 1e-8  # in float64, relative to the product of the norms
SINGLE_LIMIT = 1e-4  # relative, where a physics computes in float32 only


def check_own(spec: str, operator: nn.Module, image: Sequence[int]) -> None:
    """One measurement per image, a gradient that reaches it, an adjoint if it claims to be linear or `affine`.

    Runs the module in float64, and once in float32. CheckError for one that is not what a bundle needs.
    """
    precise = copy.deepcopy(operator).double()
    given = {name: value.double() for name, value in default_parameters(operator, image, 2).items()}
    x = torch.rand(2, *image, dtype=torch.float64) * 2 - 1
    x[1] = 0.5 * x[1] + 0.3  # whatever is taken over the batch is another than over one image
    x.requires_grad_(True)
    y = precise(x, **given)
    if not isinstance(y, Tensor) or y.dim() < 2 or y.shape[0] != 2 or not y.is_floating_point():
        raise CheckError(f"operator {spec!r} must give a real tensor [B, ...] for images [B, ...]: {_said(y)}")
    if y.numel() == 0:
        raise CheckError(f"operator {spec!r} measures nothing: {_said(y)}")
    if not y.requires_grad:
        raise CheckError(f"operator {spec!r} gives no gradient in x")
    if not bool(y.isfinite().all()):
        raise CheckError(f"operator {spec!r} gives numbers that are not finite for images in [-1, 1]")
    _check_alone(spec, precise, operator, x.detach(), y.detach(), given)
    linear, affine = (getattr(operator, word, False) for word in ("linear", "affine"))
    if not (linear or affine):
        return
    if not linear:  # linear but for a constant, as of images in [0, 1]
        y = y - precise(torch.zeros_like(x), **given).detach()
    v = torch.randn_like(y)
    (pulled,) = torch.autograd.grad(y, x, v)
    y, x = y.detach(), x.detach()
    gap = abs(float((y * v).sum() - (x * pulled).sum())) / float(y.norm() * v.norm())
    if not gap <= ADJOINT_LIMIT:
        claim = "linear" if linear else "affine"
        raise CheckError(f"operator {spec!r} says it is {claim}, but <f(x), v> and <x, f*(v)> differ by {gap:.1e}")


def _check_alone(
    spec: str, precise: nn.Module, operator: nn.Module, x: Tensor, y: Tensor, given: dict[str, Tensor]
) -> None:
    """Each image's measurement is the same without the others, and float32 where the image is."""
    rounds = bool(getattr(operator, "rounds", False))
    with torch.no_grad():
        alone = [precise(x[i : i + 1], **{name: value[i : i + 1] for name, value in given.items()}) for i in range(2)]
        single = operator(x.float(), **{name: value.float() for name, value in given.items()})
    fits = all(each.shape == y[:1].shape for each in alone)
    gaps = [relative_error(each, want[None], rounds) for each, want in zip(alone, y)] if fits else [math.inf]
    gap = float(torch.tensor(gaps).max())  # NaN if one is
    if not gap <= MIXED_LIMIT:
        raise CheckError(
            f"operator {spec!r} measures an image alone and beside another differently, by {gap:.1e}: "
            "samples must not mix, and nothing may be drawn at random"
        )
    if single.dtype != torch.float32:
        raise CheckError(f"operator {spec!r} gives {single.dtype} for images in float32: {_said(single)}")


def check_adjoint(operator: PhysicsOperator, found: FromPhysics, image: Sequence[int], limit: float) -> float:
    """The relative gap between a physics' own A_adjoint and the pull-back of `found`. CheckError above `limit`."""
    generator = torch.Generator().manual_seed(4)
    precise, measure = copy.deepcopy(found).double(), operator.measure
    doubled = copy.deepcopy(measure).double()
    x = torch.zeros(1, *image, dtype=torch.float64, requires_grad=True)
    y = precise(x)
    v = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    (pulled,) = torch.autograd.grad(y, x, v)
    own = operator.layout.unpack(v * operator.layout.scale**2)  # unpack divides by the scale, the adjoint multiplies
    try:
        back = doubled.physics.A_adjoint(own)
    except (RuntimeError, TypeError):
        back, limit = (
            measure.physics.A_adjoint(own.to(torch.complex64 if _complex(own) else torch.float32)),
            SINGLE_LIMIT,
        )
    back = (back.real if back.is_complex() else back).double()
    (want,) = torch.autograd.grad(operator.view(x), x, back)
    gap = float((pulled - want).norm() / pulled.norm())
    if not gap <= limit:
        raise CheckError(
            f"physics {type(measure.physics).__name__}: its A_adjoint is not the adjoint of its A: they differ by "
            f"{gap:.1e}, allowed {limit:.0e}; adjoint_limit=None exports it all the same, with the adjoint of A"
        )
    return gap


def _complex(y: Measurement) -> bool:
    return any(each.is_complex() for each in (y.x if hasattr(y, "x") else [y]))


def _said(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
