"""A stand-in for triton_python_backend_utils, the module that NVIDIA's server gives to models of its Python backend.

Only what its README documents (23.10 and newer).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


class TritonModelException(Exception):
    pass


@dataclass(frozen=True)
class TritonError:
    text: str
    kind: int = 1

    INTERNAL = 1
    INVALID_ARG = 3
    CANCELLED = 7

    def message(self) -> str:
        return self.text

    def code(self) -> int:
        return self.kind


class Tensor:
    def __init__(self, name: str, array: np.ndarray):
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufO":
            raise TritonModelException(f"tensor {name} is no array that the server can take")
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None):
        assert isinstance(output_tensors, list) and all(isinstance(each, Tensor) for each in output_tensors)
        self._tensors, self._error = output_tensors, error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


@dataclass
class InferenceRequest:
    """tensors: the inputs. cancelled_at: from which question on `is_cancelled` says yes, None for never."""

    tensors: list[Tensor]
    cancelled_at: int | None = None
    asked: int = field(default=0, init=False)

    def inputs(self) -> list[Tensor]:
        return self.tensors

    def is_cancelled(self) -> bool:
        self.asked += 1
        return self.cancelled_at is not None and self.asked >= self.cancelled_at


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)
