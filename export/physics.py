"""What a deepinv Physics becomes: how it sees images, how its measurements lie in memory, modules that compute them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

MOST_DIMENSIONS = 5  # of a measurement without its batch: the engine has 6

Measurement = Any  # a tensor [B, ...], real or complex, or deepinv's TensorList of them


@dataclass(frozen=True)
class View:
    """How an image [B, C, H, W] of the bundle, in [-1, 1], becomes one that the physics takes.

    border: pixels (left, top, right, bottom) that the physics does not see. unit: to [0, 1]. imaginary: a channel of
    zeros behind the first, the imaginary part of MRI's images. complex: as complex numbers without imaginary part.
    """

    border: tuple[int, int, int, int] = (0, 0, 0, 0)
    unit: bool = True
    imaginary: bool = False
    complex: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        left, top, right, bottom = self.border
        if any(self.border):
            x = x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]
        x = (x + 1) / 2 if self.unit else x
        if self.complex:
            return torch.complex(x, torch.zeros_like(x))
        return torch.cat([x, torch.zeros_like(x)], -3) if self.imaginary else x


@dataclass(frozen=True)
class Layout:
    """Measurements of a physics as one real tensor [B, ...], and back.

    A real tensor keeps its shape. A complex one gets a last axis of 2, real and imaginary part. Those of a TensorList
    are flattened, each as just said, and stand one after the other: [B, M]; so is one of too many dimensions.
    parts: shape of each without its batch, and whether it is complex. scale: what all values are multiplied by.
    """

    parts: tuple[tuple[tuple[int, ...], bool], ...]
    listed: bool
    scale: float = 1.0

    @staticmethod
    def of(y: Measurement) -> Layout:
        """The layout of this measurement. TypeError if it is none of the above."""
        tensors = y.x if hasattr(y, "x") else [y]
        if not all(isinstance(each, Tensor) and each.dim() >= 1 for each in tensors):
            raise TypeError(f"a measurement must be a tensor or a TensorList, not {type(y).__name__}")
        return Layout(tuple((tuple(each.shape[1:]), each.is_complex()) for each in tensors), hasattr(y, "x"))

    @property
    def flat(self) -> bool:
        """Whether the real tensor is [B, M]."""
        (shape, is_complex), *more = self.parts
        return self.listed or bool(more) or not 1 <= len(shape) + is_complex <= MOST_DIMENSIONS

    def pack(self, y: Measurement) -> Tensor:
        """y as the real tensor [B, ...]."""
        tensors = y.x if self.listed else [y]
        real = [torch.view_as_real(each) if each.is_complex() else each for each in tensors]
        packed = torch.cat([each.flatten(1) for each in real], 1) if self.flat else real[0]
        return packed if self.scale == 1 else packed * self.scale

    def unpack(self, values: Tensor) -> Measurement:
        """The real tensor [B, ...] as the physics' own y."""
        values = values if self.scale == 1 else values / self.scale
        counts = [math.prod(shape) * (1 + is_complex) for shape, is_complex in self.parts]
        tensors = []
        for (shape, is_complex), part in zip(self.parts, values.flatten(1).split(counts, 1)):
            full = part.reshape(len(values), *shape, *((2,) if is_complex else ()))
            tensors.append(torch.view_as_complex(full.contiguous()) if is_complex else full)
        if not self.listed:
            return tensors[0]
        from deepinv.utils import TensorList

        return TensorList(tensors)


class Noiseless(nn.Module):
    """A physics' f: its forward map and sensor, without its noise."""

    def __init__(self, physics: nn.Module):
        super().__init__()
        self.physics = physics
        parts = getattr(physics, "physics_list", None)
        if isinstance(parts, list):  # which hides them from torch: their buffers would not be found
            self.parts = nn.ModuleList(parts)

    def forward(self, image: Tensor) -> Measurement:
        return self.physics.sensor(self.physics.A(image))

    def __deepcopy__(self, memo: dict[int, object]) -> Noiseless:
        return Noiseless(copied(self.physics))


class PhysicsOperator(nn.Module):
    """The operator of a physics as it is: x [B, C, H, W] in [-1, 1] -> y [B, ...], real. `per_item`: its parameters."""

    def __init__(self, measure: Noiseless, view: View, layout: Layout, per_item: Sequence[str], affine: bool):
        super().__init__()
        self.measure, self.view, self.layout, self.affine = measure, view, layout, affine
        self.per_item = tuple(per_item)

    def parameters_of(self, image: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(getattr(self.measure.physics, name).shape[1:]) for name in self.per_item}

    def forward(self, x: Tensor, *values: Tensor, **given: Tensor) -> Tensor:
        named = {**dict(zip(self.per_item, values)), **given}
        replaced = {f"physics.{name}": value for name, value in named.items()}
        y = torch.func.functional_call(self.measure, replaced, (self.view(x),)) if named else self.measure(self.view(x))
        return self.layout.pack(y)

    def scaled_by(self, scale: float) -> PhysicsOperator:
        layout = replace(self.layout, scale=self.layout.scale * scale)
        return PhysicsOperator(self.measure, self.view, layout, self.per_item, self.affine)


class MatrixOperator(nn.Module):
    """y = M x + y_0, x being what the physics sees of the image, flattened. matrix_t: [n, m]."""

    affine = True

    def __init__(self, matrix_t: Tensor, offset: Tensor, border: tuple[int, int, int, int], layout: Layout):
        super().__init__()
        self.register_buffer("matrix_t", matrix_t)
        self.register_buffer("offset", offset.flatten())
        self.layout, self.shape, self.shifted = layout, tuple(offset.shape), bool(offset.any())
        self.view = View(border, unit=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.view(x).flatten(1) @ self.matrix_t
        if self.shifted:
            y = y + self.offset
        return y.reshape(len(x), *self.shape)

    def scaled_by(self, scale: float) -> MatrixOperator:
        layout = replace(self.layout, scale=self.layout.scale * scale)
        offset = (self.offset * scale).reshape(self.shape)
        return MatrixOperator(self.matrix_t * scale, offset, self.view.border, layout)


class IntensityOperator(nn.Module):
    """y = |B x|^2 of a complex linear B, which is given as its matrix: phase retrieval."""

    affine = False

    def __init__(self, inner: MatrixOperator, layout: Layout):
        super().__init__()
        self.inner, self.layout, self.view = inner, layout, inner.view

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).square().sum(-1)


FromPhysics = PhysicsOperator | MatrixOperator | IntensityOperator


def copied(physics: nn.Module) -> nn.Module:
    """A deep copy, also of one that holds random generators, which Python cannot copy."""
    try:
        return copy.deepcopy(physics)
    except (TypeError, RuntimeError):
        return physics.clone()  # type: ignore[operator]
