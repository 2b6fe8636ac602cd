"""The roofline of this machine, measured: what no program can beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsd.bench.gpu.timing import Clock, seconds


@dataclass(frozen=True)
class Roof:
    """matrix: FLOP/s of a large product in the networks' precision. single: FLOP/s of one in float32.
    copy: bytes/s of a large copy, read and written."""

    matrix: float
    single: float
    copy: float

    def seconds(self, operations: float, moved: float, *, halves: bool = True) -> float:
        """The least time for so much work and so many bytes through memory."""
        return max(operations / (self.matrix if halves else self.single), moved / self.copy)


def measured(device: torch.device, toy: bool = False) -> Roof:
    """Peaks by an 8192 x 8192 product in halves and in float32 (no TF32) and a copy of 1 GiB; toy: tiny, float32."""
    side, size = (512, 1 << 20) if toy else (8192, 1 << 28)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    single = torch.randn(side, side, device=device)
    half = single if toy else single.half()
    source = torch.empty(size, device=device)
    target = torch.empty_like(source)
    runs = {
        "matrix": lambda: half @ half,
        "single": lambda: single @ single,
        "copy": lambda: target.copy_(source),
    }
    times = {name: sorted(values) for name, values in seconds(runs, Clock(device), 20).items()}
    least = {name: values[len(values) // 4] for name, values in times.items()}
    product = 2.0 * side**3
    return Roof(product / least["matrix"], product / least["single"], 2 * 4 * size / least["copy"])
