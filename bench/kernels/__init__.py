"""What each Triton kernel is timed on, with the bytes and operations that bound it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    make(device) -> arguments, seeded. ours(*arguments) and plain(*arguments) -> a tensor or a tuple of tensors; plain
    is the definition, which also runs in float64 (every floating-point argument doubled) as the reference.
    moved: the bytes that must cross memory (each input read and each output written once); operations: floating-point
    operations that the definition needs. halves: they are products of halves, with the peak of these.
    """

    name: str
    make: Callable[[torch.device], Sequence[Any]]
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    moved: int
    operations: int
    halves: bool = False
