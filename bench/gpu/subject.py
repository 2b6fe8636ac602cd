"""What is measured: networks with their bundle opened in the engine, the methods beside it, and the check of both."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlsd.bench.gpu import torch_step, work
from rlsd.bench.gpu.roof import Roof
from rlsd.bench.problem import PARAMS, flops, frozen, job, moved
from rlsd.engine import Engine, Params
from rlsd.export.package import Networks

CROWD = 8  # up to so many particles the check has repulsion on; more are checked without, by the first CROWD of them
CHECKED_STEPS = 2
PLAIN_LIMIT = 5e-2  # what plain halves may err over these steps; others twice what plain halves did
FLOOR = 1e-3


class Wrong(AssertionError):
    """A method does not arrive at the same particles; it gets no figure."""


@dataclass
class Bench:
    """Where and how it is measured."""

    device: torch.device
    roof: Roof
    rounds: int = 5
    limit: float = 8.0  # seconds of one case after which no round is begun

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def open(self, bundle: Path) -> Engine:
        """The engine on this device; one thread in the rehearsal."""
        options: dict[str, Any] = {"device": f"cuda:{self.device.index or 0}"} if self.cuda else {"threads": 1}
        return Engine(bundle, **options)


@dataclass
class Subject:
    """One checkpoint and its bundle. networks: in float32 on the CPU, moved to the device here."""

    name: str
    networks: Networks
    bundle: Path
    bench: Bench
    references: dict[tuple[int, float], np.ndarray] = field(default_factory=dict)
    errors: dict[tuple[str, int], float] = field(default_factory=dict)
    made: dict[str, torch_step.Method] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.work = work.of_bundle(self.bundle, flops(self.networks) if not self.bench.cuda else {})
        self.exact = moved(frozen(self.networks), self.bench.device, torch.float32)

    @functools.cached_property
    def engine(self) -> Engine:
        """Opened on first use, for all cases."""
        return self.bench.open(self.bundle)

    @contextlib.contextmanager
    def in_flight(self, particles: int) -> Iterator[None]:
        """The problem's job, of which one step is done: the engine has the memory that it needs. Raises RlsdError.

        Dropped at the end, whatever happens: it would tick along with all that is timed after.
        """
        handle = self.engine.submit(job(self.engine.image_shape, particles))
        try:
            self.engine.tick()
            yield
        finally:
            handle.release()

    def close(self) -> None:
        """Gives back the engine's and the methods' memory."""
        if "engine" in self.__dict__:
            self.engine.close()
        if "compiled" in self.made:
            torch.compiler.reset()  # its CUDA graphs hold memory that belongs to no tensor
        self.made.clear()
        free()

    def method(self, name: str) -> torch_step.Method:
        """One of torch_step.METHODS, made once. LeftOut where this machine has no such thing."""
        if name not in self.made:
            self.made[name] = torch_step.make(name, self.exact, self.bench.device)
        return self.made[name]

    def check(self, name: str, particles: int) -> float:
        """Relative error of a method (or "engine") against float32 over a few full steps. Raises Wrong, LeftOut."""
        if (name, particles) in self.errors:
            return self.errors[name, particles]
        free()  # a recording of CUDA graphs cannot take what the methods before have left in PyTorch's cache
        params = replace(PARAMS, steps=CHECKED_STEPS + 1, gamma=PARAMS.gamma if particles <= CROWD else 0.0)
        count = min(particles, CROWD)
        want = self._reference(count, params)
        got = self._particles(name, particles, params)[:count]
        error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        allowed = PLAIN_LIMIT if name == "shared" else self.allowed(particles)
        if not error <= allowed:
            raise Wrong(f"{name}: relative error {error:.1e} of the particles, allowed {allowed:.1e}")
        self.errors[name, particles] = error
        return error

    def allowed(self, particles: int) -> float:
        """The relative error that a method may have."""
        return max(2 * self._plain_error(particles), FLOOR)

    def _plain_error(self, particles: int) -> float:
        """What plain halves err: with fewer particles where so many do not fit in memory."""
        while particles > 1:
            try:
                return self.check("shared", particles)
            except torch.OutOfMemoryError:
                free()
                particles //= 2
        return self.check("shared", particles)

    def _reference(self, count: int, params: Params) -> np.ndarray:
        if (count, params.gamma) not in self.references:
            with untimed():
                loop = torch_step.exact_loop(self.exact, self.bench.device, count, params)
                self.references[count, params.gamma] = _finished(loop)
        return self.references[count, params.gamma]

    def _particles(self, name: str, particles: int, params: Params) -> np.ndarray:
        if name == "engine":
            return self.engine.reconstruct([job(self.engine.image_shape, particles, params)])[0].particles
        try:
            return _finished(self.method(name).loop(particles, params))
        except torch.OutOfMemoryError:
            raise
        except Exception:
            if name != "compiled" or not self.bench.cuda:
                raise
            mode = "max-autotune-no-cudagraphs"  # where its own CUDA graphs do not bear two pull-backs in one step
            self.made[name] = torch_step.make(name, self.exact, self.bench.device, mode)
            return _finished(self.made[name].loop(particles, params))


def _finished(loop: Any) -> np.ndarray:
    for _ in range(loop.params.steps - 1):
        torch.compiler.cudagraph_mark_step_begin()
        loop.step()
    loop.finish()
    return loop.x.cpu().numpy()


def untimed() -> contextlib.AbstractContextManager[None]:
    """For what is computed once: cuDNN takes the convolution it thinks best, where it would try them all."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False)


def free() -> None:
    """Gives PyTorch's unused memory back to the device, where the engine may need it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
