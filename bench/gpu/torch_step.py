"""The full step as PyTorch would do it, in the ways that the engine is measured against.

published   eager, halves, the structure of the authors' code
shared      eager, halves, our algebra: one decoder evaluation and one pull-back a step
compiled    `shared` with its networks through torch.compile (max-autotune), channels last
xformers    `shared` with xFormers' attention in denoiser and decoder
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rlsd.bench.baselines import TorchLoop
from rlsd.bench.gpu import LeftOut, first_line
from rlsd.bench.problem import PARAMS, frozen, moved, torch_loop
from rlsd.engine import Params
from rlsd.export.package import Networks

METHODS = ("published", "shared", "compiled", "xformers")


@dataclass(frozen=True)
class Method:
    """Networks made ready for one of METHODS, and how the loop uses them."""

    name: str
    networks: Networks
    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format
    mode: str = ""  # torch.compile's

    def loop(self, particles: int, params: Params = PARAMS) -> TorchLoop:
        """N particles of the benchmark's problem."""
        return torch_loop(
            self.networks, particles, params,
            published=self.name == "published", device=self.device, dtype=self.dtype, layout=self.layout,
        )  # fmt: skip

    def stepping(self, particles: int, steps: int) -> Callable[[], None]:
        """A call that takes so many steps."""
        loop = self.loop(particles)

        def run() -> None:
            for _ in range(steps):
                torch.compiler.cudagraph_mark_step_begin()
                loop.step()

        return run


def exact_loop(networks: Networks, device: torch.device, particles: int, params: Params) -> TorchLoop:
    """Our algebra in float32, one particle at a time through the decoder: what every method is checked against."""
    return torch_loop(networks, particles, params, device=device, chunk=1)


def make(name: str, exact: Networks, device: torch.device, mode: str = "max-autotune") -> Method:
    """The method on `device`, from networks in float32 there. Raises LeftOut where this machine has no such thing.

    In halves on a GPU, in float32 on a CPU (the rehearsal), where torch.compile is content to trace.
    """
    if name == "compiled" and device.type == "cpu":
        mode = "only traced"
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    layout = torch.channels_last if name == "compiled" else torch.contiguous_format
    networks = moved(_copied(exact), device, dtype)
    if name == "xformers":
        use_xformers(networks, device, dtype)
    if name == "compiled":
        networks = compiled(networks, {"backend": "aot_eager"} if device.type == "cpu" else {"mode": mode})
    return Method(name, networks, device, dtype, layout, mode if name == "compiled" else "")


def _copied(networks: Networks) -> Networks:
    copied = {name: copy.deepcopy(getattr(networks, name)) for name in ("denoiser", "decoder", "features")}
    return frozen(replace(networks, **copied))


def compiled(networks: Networks, options: dict[str, Any]) -> Networks:
    """Convolutions' weights channels last; each network compiled by itself, its pull-back with it."""

    def one(module: nn.Module | None) -> Any:
        if module is None:
            return None
        return torch.compile(module.to(memory_format=torch.channels_last), dynamic=False, **options)

    return replace(
        networks, denoiser=one(networks.denoiser), decoder=one(networks.decoder), features=one(networks.features)
    )


def use_xformers(networks: Networks, device: torch.device, dtype: torch.dtype) -> None:
    """Changes the attention of diffusers' modules in place; LeftOut where xFormers' does not work here."""
    try:
        from xformers.ops import memory_efficient_attention

        probe = torch.ones(1, 16, 1, 64, device=device, dtype=dtype, requires_grad=True)
        memory_efficient_attention(probe, probe, probe).sum().backward()
    except Exception as error:  # no wheel, no kernel for this GPU, another torch: its own words say which
        raise LeftOut(f"xFormers does not work here: {first_line(error)}") from error
    for network in (networks.denoiser, networks.decoder):
        for module in network.modules():
            if hasattr(module, "set_use_memory_efficient_attention_xformers"):
                module.set_use_memory_efficient_attention_xformers(True)
