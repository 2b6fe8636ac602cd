"""Kernels in Triton's interpreter under the eyes of what a GPU would do: it runs a kernel's programs in any order.

The interpreter runs one program after the other, and each as if it had one thread, so that a kernel whose programs or
threads get in each other's way passes its tests there. While `watched()` is open each launch raises Hazard where

- two programs write one byte, unless they write the same there, or one program reads what another writes;
- a program reads what it has written, or writes something else there, without a barrier between: it has many threads;
- one store has an address twice;
- an address lies outside of the tensors that the kernel was given.

Atomics are not known here: a kernel that has some needs rules for them first.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from triton.runtime import interpreter

Array = np.ndarray


class Hazard(AssertionError):
    """What a launch does that a GPU may do otherwise."""


@dataclass(frozen=True)
class Access:
    """Bytes [n] that one program reads, or, with what it puts there, writes; and the line that does it."""

    program: int
    line: str
    at: Array
    value: Any = None


@dataclass
class Launch:
    """What the programs of one launch have done so far."""

    name: str
    tensors: Sequence[Any] | None
    reads: list[Access] = field(default_factory=list)
    writes: list[Access] = field(default_factory=list)
    programs: dict[tuple[int, ...], int] = field(default_factory=dict)
    fresh: dict[int, list[Access]] = field(default_factory=dict)  # by program: writes since its last barrier

    def number(self, index: tuple[int, ...]) -> int:
        return self.programs.setdefault(index, len(self.programs))

    def read(self, access: Access) -> None:
        self.reads.append(access)
        self._apart(access, "reads", self.fresh.get(access.program, ()))

    def write(self, access: Access) -> None:
        if len(np.unique(access.at)) != len(access.at):
            self._fail(f"{access.line} stores twice to one address")
        fresh = self.fresh.setdefault(access.program, [])
        self._apart(access, "writes", fresh)
        self.writes.append(access)
        fresh.append(access)

    def barrier(self, index: tuple[int, ...]) -> None:
        self.fresh.pop(self.number(index), None)

    def end(self) -> None:
        if self.tensors is not None:
            for access in (*self.reads, *self.writes):
                self._inside(access)
        nothing = Access(0, "", np.zeros(0, np.uint64), np.zeros(0, np.uint8))  # for a kernel that writes none
        columns = zip(*(self._columns(write, i) for i, write in enumerate([*self.writes, nothing])))
        at, program, value, line = map(np.concatenate, columns)
        order = np.lexsort((program, at))
        at, program, value, line = (part[order] for part in (at, program, value, line))
        if len(at) == 0:
            return
        clash = (at[1:] == at[:-1]) & (program[1:] != program[:-1]) & (value[1:] != value[:-1])
        if clash.any():
            first = int(np.argmax(clash))
            lines = sorted({self.writes[line[i]].line for i in (first, first + 1)})
            self._fail(f"two programs write other values to one address: {' and '.join(lines)}")
        for access in self.reads:
            # at: ascending, and for one address the programs too, of which the first or the last is another one
            first, last = np.searchsorted(at, access.at), np.searchsorted(at, access.at, side="right") - 1
            written = first <= last
            others = [(program[np.where(written, i, 0)] != access.program) & written for i in (first, last)]
            if (others[0] | others[1]).any():
                self._fail(f"{access.line} reads what another program writes")

    def _columns(self, write: Access, number: int) -> tuple[Array, ...]:
        assert write.value is not None
        return write.at, np.full(len(write.at), write.program), write.value, np.full(len(write.at), number)

    def _apart(self, access: Access, does: str, written: Sequence[Access]) -> None:
        for before in written:
            both, here, there = np.intersect1d(access.at, before.at, return_indices=True)
            if len(both) == 0:
                continue
            if access.value is None or not np.array_equal(access.value[here], before.value[there]):
                self._fail(f"{access.line} {does} what {before.line} wrote, without a barrier between")

    def _inside(self, access: Access) -> None:
        inside = np.zeros(len(access.at), bool)
        for tensor in self.tensors or ():
            span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
            start = tensor.data_ptr()
            inside |= (access.at >= start) & (access.at < start + span * tensor.element_size())
        if not inside.all():
            self._fail(f"{access.line} is outside of the kernel's tensors")

    def _fail(self, words: str) -> None:
        raise Hazard(f"kernel {self.name}: {words}")


@contextlib.contextmanager
def watched(bounds: bool = True) -> Iterator[list[str]]:
    """Yields the names of the kernels that were launched. bounds: whether addresses are looked at; not where a kernel
    gets anchors for memory that the engine owns."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    known = {name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store", "create_barrier")}
    run, seen, now = executor.__call__, list[str](), list[Launch]()

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        value = known["create_masked_load"](self, pointers, mask, *rest)
        at, _ = _bytes(pointers, mask, value.data)
        now[-1].read(Access(now[-1].number(self.grid_idx), _line(), at))
        return value

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        at, written = _bytes(pointers, mask, value.data)
        now[-1].write(Access(now[-1].number(self.grid_idx), _line(), at, written))
        return known["create_masked_store"](self, pointers, value, mask, *rest)

    def barrier(self: Any) -> Any:
        now[-1].barrier(self.grid_idx)
        return known["create_barrier"](self)

    @functools.wraps(run)
    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [each for each in (*args, *kwargs.values()) if hasattr(each, "data_ptr") and each.numel() > 0]
        now.append(Launch(self.fn.__name__, given if bounds else None))
        try:
            result = run(self, *args, **kwargs)
            now[-1].end()
            seen.append(self.fn.__name__)
            return result
        finally:
            now.pop()

    made: dict[str, Callable] = {"create_masked_load": load, "create_masked_store": store, "create_barrier": barrier}
    for name, function in made.items():
        setattr(builder, name, function)
    executor.__call__ = launch  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        for name, function in known.items():
            setattr(builder, name, function)
        executor.__call__ = run  # type: ignore[method-assign]


def _bytes(pointers: Any, mask: Any, value: Array) -> tuple[Array, Array]:
    """The addresses of all bytes that are accessed, and what stands in `value` for them."""
    start = np.asarray(pointers.data).astype(np.uint64)
    held = np.broadcast_to(np.asarray(mask.data), start.shape).ravel()
    values = np.ascontiguousarray(np.broadcast_to(np.asarray(value), start.shape)).reshape(-1, 1)
    width = values.dtype.itemsize
    at = start.ravel()[held, None] + np.arange(width, dtype=np.uint64)
    return at.ravel(), values.view(np.uint8).reshape(-1, width)[held].ravel()


def _line() -> str:
    """The kernel's line that is run: the innermost outside of Triton and of this file."""
    frame = sys._getframe(1)
    inside = str(Path(interpreter.__file__).parents[1])
    while frame.f_code.co_filename.startswith((inside, __file__)):
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
