"""What every forward operator of ours has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn


class Operator(nn.Module):
    """Base of the operators: `parameters_of` gives the shapes of an item's parameters, by name.

    linear: whether it is. rounds: whether it rounds, so that a value at the edge may fall either way in float32.
    """

    linear: ClassVar[bool] = True
    rounds: ClassVar[bool] = False

    def parameters_of(self, image: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        return {}

    def example(self, image: Sequence[int], batch: int) -> Mapping[str, Tensor]:
        """Those parameters, for `batch` items, whose values mean something else than a mask or a kernel."""
        return {}
