"""The watch over kernels in the interpreter sees what a GPU may do otherwise, and nothing else."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter, which a GPU switches off", allow_module_level=True)

import triton.language as tl  # noqa: E402
from kernel_watch import Hazard, watched  # noqa: E402


@triton.jit
def shift_kernel(x, y, n, by, BLOCK: tl.constexpr):
    """y[i] = x[i + by] + 1 for the n elements."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at + by, mask=at < n, other=0.0) + 1, mask=at < n)


@triton.jit
def look_kernel(x, y):
    """Reads, and writes only what is positive."""
    value = tl.load(x)
    tl.store(y, value, mask=value > 0)


@triton.jit
def put_kernel(x, values, BLOCK: tl.constexpr):
    """Each program writes its value to the first element."""
    tl.store(x, tl.load(values + tl.program_id(0)))


@triton.jit
def twice_kernel(x, BARRIER: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr):
    """Writes, and then reads in another order, or writes again."""
    at = tl.arange(0, BLOCK)
    tl.store(x + at, at.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    if AGAIN:
        tl.store(x + at, 0.0 * at)
    else:
        tl.store(x + BLOCK + at, tl.load(x + BLOCK - 1 - at))


@triton.jit
def fold_kernel(x, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at // 2, at.to(tl.float32))


def shifted(by: int, n: int = 12, in_place: bool = False) -> None:
    x = torch.zeros(16)
    shift_kernel[(4,)](x, x if in_place else torch.empty(16), n, by, BLOCK=4)


def put(*values: float) -> None:
    put_kernel[(len(values),)](torch.zeros(1), torch.tensor(values), BLOCK=1)


SOUND = {
    "neighbours": lambda: shifted(1),
    "in place": lambda: shifted(0, in_place=True),
    "nothing": lambda: shifted(0, n=0),
    "nothing written": lambda: look_kernel[(2,)](torch.zeros(1), torch.zeros(1)),
    "the same value": lambda: put(1.0, 1.0),
    "behind a barrier": lambda: twice_kernel[(1,)](torch.zeros(16), True, False, BLOCK=8),
    "again behind a barrier": lambda: twice_kernel[(1,)](torch.zeros(16), True, True, BLOCK=8),
}
UNSOUND = {
    "another program's": (lambda: shifted(4, in_place=True), "reads what another program writes"),
    "beyond the end": (lambda: shifted(5), "is outside of the kernel's tensors"),
    "before the start": (lambda: shifted(-1), "is outside of the kernel's tensors"),
    "other values": (lambda: put(1.0, 2.0), "two programs write other values"),
    "no barrier": (lambda: twice_kernel[(1,)](torch.zeros(16), False, False, BLOCK=8), "without a barrier between"),
    "again": (lambda: twice_kernel[(1,)](torch.zeros(16), False, True, BLOCK=8), "without a barrier between"),
    "one store": (lambda: fold_kernel[(1,)](torch.zeros(8), BLOCK=8), "stores twice to one address"),
}


@pytest.mark.parametrize("launch", SOUND.values(), ids=SOUND)
def test_what_is_sound_passes(launch):
    with watched() as seen:
        launch()
    assert len(seen) == 1


@pytest.mark.parametrize("launch, words", UNSOUND.values(), ids=UNSOUND)
def test_what_a_gpu_may_do_otherwise_is_seen(launch, words):
    with watched(), pytest.raises(Exception, match=words) as raised:
        launch()
    causes = [raised.value, raised.value.__cause__]  # the interpreter wraps what is raised inside of a kernel
    assert any(isinstance(cause, Hazard) for cause in causes)
    launch()  # the watch is gone
