"""The numbers of each lane: two small tables, so that particles of many jobs at many timesteps share one launch.

`whole` int32 [B, len(WHOLE)], 32-bit unsigned values by their bits:

    slot            row of the particle in the state, -1 for an empty lane: its state is not touched, its outputs are 0
    seed_low, seed_high, item, particle, step
                    address of the noise in this step; that of the next step has step + 1
    repulsion_row   row of R that pushes this latent (repulsion in the latents), -1 for none
    feature_row     row of this lane's features among those of all jobs, and of their R, -1 for none
    mode            sum of AUGMENTED, MOVE_Z, GRADIENT and PULLED

`real` float32 [B, len(REAL)], each computed in float64 and rounded once:

    signal, noise   sqrt(abar), sqrt(1 - abar) of this step; next_signal, next_noise: of the next one
    score           lambda omega / M, with omega = sqrt((1 - abar) / abar)
    repulsion       score gamma sqrt(1 - abar)
    guidance        s of eps(null) + s (eps - eps(null)), 1 for none
    unscale         1 / loss_scale: undoes the scale of z's cotangent, which a 16-bit decoder would lose to underflow
    rho             rho / P
    cotangent       the weight of D(z)'s cotangent: loss_scale / P if augmented, loss_scale otherwise
    beta1, beta2, epsilon
                    Adam's constants
    rate_z, correction1_z, correction2_z, rate_x, correction1_x, correction2_x
                    Adam's rates, and 1 / (1 - beta^n) where this step is the variable's n-th
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WHOLE = ("slot", "seed_low", "seed_high", "item", "particle", "step", "repulsion_row", "feature_row", "mode")
REAL = (
    *("signal", "noise", "next_signal", "next_noise", "score", "repulsion", "guidance", "unscale", "rho", "cotangent"),
    *("beta1", "beta2", "epsilon"),
    *("rate_z", "correction1_z", "correction2_z", "rate_x", "correction1_x", "correction2_x"),
)

AUGMENTED = 1  # the job has x: D(z)'s cotangent is the coupling; else it is the operator's gradient
MOVE_Z = 2  # z takes a step; unset where the job only wants D(z) of its last latents
GRADIENT = 4  # the operator's gradient counts: x takes a step, or it is D(z)'s cotangent; unset in a job's first step
PULLED = 8  # the features' cotangent of D(z) is added


@dataclass(frozen=True)
class Lanes:
    """Both tables of a batch of B lanes. A `real` of float64 is for the plain definitions alone."""

    whole: Tensor
    real: Tensor

    @classmethod
    def pack(
        cls,
        rows: Sequence[Mapping[str, float]],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Lanes:
        """Tables from one mapping per lane, column -> value; "seed" stands for both its halves, what is left out is 0.

        An empty mapping is an empty lane. Raises ValueError for a column that does not exist.
        """
        whole = torch.zeros(len(rows), len(WHOLE), dtype=torch.int64)
        real = torch.zeros(len(rows), len(REAL), dtype=torch.float64)
        for lane, row in enumerate(rows):
            named = dict(row) if row else {"slot": -1, "repulsion_row": -1, "feature_row": -1}
            if "seed" in named:
                seed = int(named.pop("seed"))
                named |= {"seed_low": seed & 0xFFFFFFFF, "seed_high": seed >> 32 & 0xFFFFFFFF}
            for name, value in named.items():
                if name in WHOLE:
                    whole[lane, WHOLE.index(name)] = int(value)
                elif name in REAL:
                    real[lane, REAL.index(name)] = value
                else:
                    raise ValueError(f"column {name!r} does not exist: {', '.join(WHOLE + REAL)}")
        return cls(whole.to(torch.int32).to(device), real.to(dtype).to(device))

    def __getitem__(self, name: str) -> Tensor:
        """The column [B, 1], whole numbers as int64 by their 32 unsigned bits, slot and rows signed."""
        if name in REAL:
            return self.real[:, REAL.index(name), None]
        column = self.whole[:, WHOLE.index(name), None].long()
        return column if name in ("slot", "repulsion_row", "feature_row") else column & 0xFFFFFFFF

    def has(self, bit: int) -> Tensor:
        """Which lanes are not empty and have this bit in their mode: bool [B, 1]."""
        return (self["slot"] >= 0) & (self["mode"] & bit != 0)
