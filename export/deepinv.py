"""A deepinv `Physics` as a forward operator: noise left out, images in the bundle's range, measurements real.

What the exporter can trace stays as it is. A linear physics that it cannot carry (Fourier transforms, the sampling of a
Radon transform) becomes its exact matrix, built column by column in float64, for images of up to 4096 values. Either
way the operator is tested against the physics: values, <f(x), v> = <x, f*(v)>, and the physics' own adjoint.
"""

from __future__ import annotations

import copy
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rlsd.export.adjoint import SINGLE_LIMIT, check_adjoint, check_own
from rlsd.export.bundle import BundleWriter
from rlsd.export.check import CheckError
from rlsd.export.operator_graphs import OperatorGraphs
from rlsd.export.physics import (
    FromPhysics,
    IntensityOperator,
    Layout,
    MatrixOperator,
    Noiseless,
    PhysicsOperator,
    View,
    copied,
)
from rlsd.export.refusals import why
from rlsd.export.trace import REWRITES

LARGEST_MATRIX = 4096  # values of an image
COLUMNS = 256  # of the matrix at a time
ADJOINT_LIMIT = 1e-6  # relative, in float64


def is_physics(value: object) -> bool:
    """Whether it is a deepinv Physics; deepinv is not imported for that."""
    module = sys.modules.get("deepinv.physics")
    return module is not None and isinstance(value, module.Physics)


def from_physics(
    physics: nn.Module,
    image_shape: Sequence[int],
    *,
    unit: bool = True,
    border: tuple[int, int, int, int] = (0, 0, 0, 0),
    imaginary: bool | None = None,
    per_item: Sequence[str] = (),
    scaled: bool = False,
    adjoint_limit: float | None = ADJOINT_LIMIT,
) -> FromPhysics:
    """The forward operator of a deepinv physics for a bundle whose images are `image_shape` (C, H, W).

    unit: the physics takes images in [0, 1], as deepinv's do; otherwise it gets the bundle's own, in [-1, 1]. border:
    (left, top, right, bottom) pixels that it does not see. imaginary: it takes the imaginary part as a second channel,
    which is 0 here; default: if it is an MRI. per_item: buffers of the physics, [1, ...], that become parameters of
    the operator, one value an item; all others are constants. scaled: y is multiplied by a number that gives the
    operator the gain of a blur, ||f'|| sqrt(pixels / values of y) = 1, to which the settings of the tasks are tuned.
    The result's `layout.pack` and `layout.unpack` turn y into the operator's measurement and back, scale included.
    adjoint_limit: how far A_adjoint may be from the pull-back, relative; None if it need not be near.
    Raises ValueError for a physics that cannot be exported, CheckError where it contradicts itself.
    """
    operator = described(physics, image_shape, unit=unit, border=border, imaginary=imaginary, per_item=per_item)
    if scaled:
        operator = operator.scaled_by(scale_of(operator, image_shape))
    return exportable(operator, image_shape, adjoint_limit)


def described(
    physics: nn.Module,
    image_shape: Sequence[int],
    *,
    unit: bool = True,
    border: tuple[int, int, int, int] = (0, 0, 0, 0),
    imaginary: bool | None = None,
    per_item: Sequence[str] = (),
) -> PhysicsOperator:
    """The operator of a physics as from_physics takes it, before it is known how it can be exported. ValueError."""
    measure, name = without_noise(physics), type(physics).__name__
    if imaginary is None:
        imaginary = _is_a(physics, "MRIMixin")
    view = View(border, unit, imaginary, _is_a(physics, "PhaseRetrieval"))
    try:
        with torch.no_grad():
            y = measure(view(torch.zeros(1, *image_shape)))
            layout = Layout.of(y)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"physics {name} does not take images {list(image_shape)}: {why(error)}") from error
    if len(layout.pack(y)) != 1:
        raise ValueError(
            f"physics {name} is made for {len(layout.pack(y))} images: its parameters must be those of one"
        )
    for word in per_item:
        buffer = dict(measure.physics.named_buffers(recurse=False)).get(word)
        if buffer is None or buffer.dim() < 2 or len(buffer) != 1:
            raise ValueError(f"per_item {word!r} is not allowed: physics {name} has no buffer [1, ...] of that name")
    return PhysicsOperator(measure, view, layout, per_item, claims_linear(measure, image_shape, view))


def exportable(operator: PhysicsOperator, image: Sequence[int], adjoint_limit: float | None) -> FromPhysics:
    """The operator in a form that the exporter carries, tested. ValueError if there is none, CheckError."""
    found = carried(operator, image)
    physics = operator.measure.physics
    check_own(type(physics).__name__, found, image)
    if found.affine and adjoint_limit is not None and hasattr(physics, "A_adjoint"):
        check_adjoint(operator, found, image, adjoint_limit)
    return found


def carried(operator: PhysicsOperator, image: Sequence[int]) -> FromPhysics:
    """The operator itself where the exporter carries it, else in terms of a matrix. ValueError if neither will do."""
    reason = why_not_traced(operator, image)
    if reason is None:
        return operator
    physics = operator.measure.physics
    cannot = f"physics {type(physics).__name__} cannot be traced ({reason})"
    if operator.per_item:
        raise ValueError(f"{cannot}, so {', '.join(operator.per_item)} cannot be given per item")
    if operator.view.complex:
        linear = Noiseless(physics.B)  # type: ignore[arg-type]
        layout = Layout.of(linear(operator.view(torch.zeros(1, *image))))
        inner = matrix_of(PhysicsOperator(linear, operator.view, layout, (), True), image, cannot)
        scale = math.sqrt(operator.layout.scale)
        found: FromPhysics = IntensityOperator(inner.scaled_by(scale), operator.layout)
    else:
        found = matrix_of(operator, image, cannot)
    return checked(found.float(), operator, image, cannot)


def without_noise(physics: nn.Module) -> Noiseless:
    """The f of a copy of the physics on the CPU, every part of which is noiseless: noise models hold generators."""
    from deepinv.physics import Physics, ZeroNoise

    measure = Noiseless(copied(physics)).cpu()
    for part in [each for each in measure.modules() if isinstance(each, Physics)]:
        part.noise_model = ZeroNoise()
    return measure.requires_grad_(False).eval()


def claims_linear(measure: Noiseless, image: Sequence[int], view: View) -> bool:
    """Whether the physics says that it is linear and its sensor leaves the values as they are."""
    linear = isinstance(measure.physics, sys.modules["deepinv.physics"].LinearPhysics)
    with torch.no_grad():
        x = view(torch.rand(1, *image, generator=torch.Generator().manual_seed(1)) * 2 - 1)
        plain = measure.physics.A(x)
        layout = Layout.of(plain)
        return linear and torch.equal(layout.pack(plain), layout.pack(measure.physics.sensor(plain)))


def why_not_traced(operator: nn.Module, image: Sequence[int]) -> str | None:
    """What the exporter says against the operator, None if it carries it. The graphs are made and run once, apart."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        writer = BundleWriter(Path(folder) / "probe", "probe", "probe", "cpu", "fp32")
        try:
            OperatorGraphs(writer, torch.rand(2, *image) * 2 - 1, list(REWRITES)).operator("probe", operator)
        except (ValueError, CheckError) as error:
            return why(error)
    return None


def matrix_of(operator: PhysicsOperator, image: Sequence[int], cannot: str) -> MatrixOperator:
    """What the matrix of an operator would be if it were linear, float64. ValueError for images that are too large."""
    left, top, right, bottom = border = operator.view.border
    seen = View(border, unit=False)(torch.zeros(1, *image)).shape[1:]
    count = math.prod(seen)
    if count > LARGEST_MATRIX:
        raise ValueError(f"{cannot}, and images of {count} values are too large for a matrix: {LARGEST_MATRIX}")
    measured, _ = precisely(operator, image)

    def values(parts: Tensor) -> Tensor:
        with torch.no_grad():
            return measured(nn.functional.pad(parts.reshape(-1, *seen), (left, right, top, bottom))).double()

    offset = values(torch.zeros(1, count, dtype=torch.float64))
    unit = torch.eye(count, dtype=torch.float64)
    columns = [(values(unit[at : at + COLUMNS]) - offset).flatten(1) for at in range(0, count, COLUMNS)]
    return MatrixOperator(torch.cat(columns), offset[0], border, operator.layout)


def checked(found: FromPhysics, operator: PhysicsOperator, image: Sequence[int], cannot: str) -> FromPhysics:
    """`found`, if it is the operator on random images. ValueError otherwise."""
    x = torch.rand(3, *image, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    measured, limit = precisely(operator, image)
    with torch.no_grad():
        want = measured(x).double()
        gap = float((copy.deepcopy(found).double()(x) - want).norm() / want.norm())
    if not gap <= limit:
        raise ValueError(f"{cannot}, and it is not linear: a matrix differs from it by {gap:.1e}")
    return found


def precisely(operator: PhysicsOperator, image: Sequence[int]) -> tuple[Callable[[Tensor], Tensor], float]:
    """The operator for float64 images and how exact it is: in float64, or in float32 where its physics insists."""
    precise = copy.deepcopy(operator).double()
    try:
        if precise(torch.zeros(1, *image, dtype=torch.float64)).dtype == torch.float64:
            return precise, ADJOINT_LIMIT
    except (RuntimeError, TypeError):
        pass  # a constant of the physics stayed in float32
    return lambda x: operator(x.float()), SINGLE_LIMIT


def scale_of(operator: FromPhysics, image: Sequence[int]) -> float:
    """What gives the operator unit gain at a mid-gray image; its norm there by power iteration."""
    v = torch.randn(1, *image, generator=torch.Generator().manual_seed(3))
    for _ in range(30):
        v = v / v.norm()
        with torch.no_grad():
            pushed = (operator(v / 8) - operator(-v / 8)) * 4
        x = torch.zeros_like(v).requires_grad_(True)
        (v,) = torch.autograd.grad(operator(x), x, pushed)
        if not float(v.norm()) > 0:
            return 1.0  # flat at mid-gray: there is no gain to speak of
    pixels = View(operator.view.border)(v).numel()
    return 1 / (float(pushed.norm()) * math.sqrt(pixels / pushed.numel()))


def _is_a(physics: nn.Module, word: str) -> bool:
    return any(kind.__name__ == word for kind in type(physics).__mro__)
