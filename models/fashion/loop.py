"""A resumable training loop: every batch and every noise is a function of (seed, step), never of history."""

from __future__ import annotations

import copy
import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

Module = TypeVar("Module", bound=nn.Module)


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step. torch keeps only 32 bits of a CPU seed: mix both numbers into those."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**32)


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed + 1_000, epoch))


def batch_indices(seed: int, step: int, batch: int, size: int) -> Tensor:
    """Indices int64 [batch] into `size` items: one pass visits each item once, the ragged rest is skipped."""
    per_epoch = size // batch
    start = (step % per_epoch) * batch
    return _permutation(seed, step // per_epoch, size)[start : start + batch]


@dataclass(frozen=True)
class Recipe:
    """How to train: `steps` updates of AdamW, linear warm-up, then cosine decay from `lr` to zero at `horizon`.

    A horizon beyond the last step is cut short: the rate falls linearly to zero over the last `cooldown` steps.
    """

    steps: int
    lr: float
    warmup: int = 200
    horizon: int | None = None
    cooldown: int = 1
    weight_decay: float = 0.01
    ema: float = 0.999
    clip: float = 1.0
    save_seconds: float = 120.0

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, (self.horizon or self.steps) - self.warmup)
        decay = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return self.lr * decay * min(1.0, (self.steps - step) / self.cooldown)


@dataclass(frozen=True)
class Run:
    """What a checkpoint holds: the model, its moving average and the optimizer's moments."""

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer

    def save(self, path: Path, step: int) -> None:
        """Write the state after `step` updates; a kill leaves the old file or the new one."""
        parts: dict[str, Any] = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer}
        temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
        torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, temporary)
        os.replace(temporary, path)

    def restore(self, path: Path) -> int:
        """Read the state back and return the number of updates done."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def update(self, loss: Tensor, rate: float, decay: float, clip: float) -> None:
        """One step of the optimizer, then of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1.0 - decay)


def train(
    name: str,
    model: Module,
    loss_of: Callable[[int], Tensor],
    recipe: Recipe,
    path: Path,
    on_save: Callable[[int, Module], None] | None = None,
    stop_at: int | None = None,
) -> Module:
    """Train `model` in place and return its moving average in eval mode.

    loss_of(step) must depend on the step and the model's weights alone. The state goes to `path` every
    recipe.save_seconds and at the end; if it is there already, training goes on from it, and gives the same
    bits as an uninterrupted run. on_save(step, average) follows each save. stop_at ends early, as a kill would.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    run = Run(model, ema, optimizer)
    step = run.restore(path) if path.exists() else 0
    last = recipe.steps if stop_at is None else min(stop_at, recipe.steps)
    saved = time.monotonic()
    shown = math.nan
    with tqdm(total=recipe.steps, initial=step, desc=name, mininterval=10.0) as bar:
        while step < last:
            loss = loss_of(step)
            # The average must forget the initial weights quickly, so its horizon grows with the step.
            run.update(loss, recipe.rate(step), min(recipe.ema, (1 + step) / (10 + step)), recipe.clip)
            step += 1
            shown = loss.item() if math.isnan(shown) else 0.98 * shown + 0.02 * loss.item()
            bar.update()
            bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
            if step == last or time.monotonic() - saved > recipe.save_seconds:
                run.save(path, step)
                saved = time.monotonic()
                if on_save is not None:
                    on_save(step, ema)
    return ema
