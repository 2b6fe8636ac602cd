"""Arrays of other libraries on a GPU, without a copy: the pointer in a DLPack capsule (torch, CuPy, JAX).

Source of the layout: dlpack.h, version 0 ("dltensor"), which every producer still gives when it is not asked for more.
"""

from __future__ import annotations

import ctypes as c
from typing import Any

CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
FLOAT = 2  # kDLFloat
DEFAULT_STREAM = 1  # the legacy default stream: the engine waits for the whole device before it reads


class _Tensor(c.Structure):
    _fields_ = [
        ("data", c.c_void_p), ("device_type", c.c_int32), ("device_id", c.c_int32), ("ndim", c.c_int32),
        ("code", c.c_uint8), ("bits", c.c_uint8), ("lanes", c.c_uint16), ("shape", c.POINTER(c.c_int64)),
        ("strides", c.POINTER(c.c_int64)), ("byte_offset", c.c_uint64),
    ]  # fmt: skip


class DeviceArray:
    """A dense float32 array in a GPU's memory; keeps what it was made from alive.

    array: any object with `__dlpack__`. Raises ValueError naming `name` where it is not float32 or not contiguous.
    """

    def __init__(self, name: str, array: Any):
        self._capsule = array.__dlpack__(stream=DEFAULT_STREAM)
        self.source = array
        pointer = c.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = c.c_void_p, [c.py_object, c.c_char_p]
        tensor = _Tensor.from_address(pointer(self._capsule, b"dltensor"))
        self.shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
        self.size = 1
        for n in self.shape:
            self.size *= n
        if (tensor.code, tensor.bits, tensor.lanes) != (FLOAT, 32, 1):
            raise ValueError(f"{name} is a device array of type {tensor.code}, {tensor.bits} bits: float32 is needed")
        if tensor.strides and not self._dense([tensor.strides[i] for i in range(tensor.ndim)]):
            raise ValueError(f"{name} is a device array that is not contiguous")
        self.pointer = (tensor.data or 0) + tensor.byte_offset

    def _dense(self, strides: list[int]) -> bool:
        expected = 1
        for n, stride in reversed(list(zip(self.shape, strides))):
            if n != 1 and stride != expected:
                return False
            expected *= n
        return True


def on_device(array: Any) -> bool:
    """Whether it is an array in a GPU's memory."""
    kind = getattr(array, "__dlpack_device__", None)
    return kind is not None and kind()[0] in CUDA
