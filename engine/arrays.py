"""Callers' arrays as the core sees them: a pointer and a number of elements, on the host or on a GPU."""

from __future__ import annotations

import ctypes as c
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlsd.engine import native
from rlsd.engine.dlpack import DeviceArray, on_device


@dataclass(frozen=True)
class HostArray:
    """A NumPy array as the core sees it."""

    source: np.ndarray

    @property
    def pointer(self) -> int:
        return self.source.ctypes.data

    @property
    def size(self) -> int:
        return self.source.size


def given_array(name: str, array: Any, whole: bool = False) -> HostArray | DeviceArray:
    """An input, float32 and contiguous; with `whole`, whole numbers are int64."""
    if on_device(array):
        return DeviceArray(name, array)
    integers = whole and np.issubdtype(np.asarray(array).dtype, np.integer)
    return HostArray(np.ascontiguousarray(array, np.int64 if integers else np.float32))


def filled_array(name: str, array: Any, shape: tuple[int, ...]) -> HostArray | DeviceArray:
    """An output of this shape: a new array, or the caller's."""
    if array is None:
        return HostArray(np.zeros(shape, np.float32))
    if tuple(array.shape) != shape:
        raise ValueError(f"{name} has shape {list(array.shape)}, {list(shape)} is needed")
    if on_device(array):
        return DeviceArray(name, array)
    writable = isinstance(array, np.ndarray) and array.flags.c_contiguous and array.flags.writeable
    if not (writable and array.dtype == np.float32):
        raise ValueError(f"{name} is no writable, contiguous float32 array of NumPy or of a GPU")
    return HostArray(array)


def tensor_structs(arrays: Mapping[str, Any], whole: bool = True) -> tuple[c.Array, list[HostArray | DeviceArray]]:
    """The arrays as rlsd_tensor structs, and what has to stay alive with them. whole: as in given_array."""
    keep = [given_array(name, array, whole) for name, array in arrays.items()]
    structs = [
        native.TensorStruct(name.encode(), a.pointer, a.size, 2 if getattr(a.source, "dtype", None) == np.int64 else 1)
        for name, a in zip(arrays, keep)
    ]
    return (native.TensorStruct * max(len(structs), 1))(*structs), keep


@dataclass(frozen=True)
class DeviceRows:
    """Memory of a GPU, as torch.as_tensor and CuPy take it."""

    __cuda_array_interface__: dict[str, Any]


def gathered_rows(address: int, shape: tuple[int, int], on_gpu: bool) -> Any:
    """The core's float32 array at this address, valid during its callback: of NumPy, or of the GPU."""
    if on_gpu:
        return DeviceRows({"shape": shape, "typestr": "<f4", "data": (address, False), "strides": None, "version": 3})
    return np.ctypeslib.as_array(c.cast(address, c.POINTER(c.c_float)), shape)
