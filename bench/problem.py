"""The problem that all full-step benchmarks solve: the right half of an image is missing, N particles that repel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlsd.bench.baselines import TorchLoop
from rlsd.engine import Job, Params
from rlsd.export.package import Networks
from rlsd.export.trace import to_aten

OPERATOR = "inpainting"
PARAMS = Params(steps=900, gamma=20.0, lr_z=0.05, lr_x=0.1)


def frozen(networks: Networks) -> Networks:
    """No gradients for weights: the baselines must not pay for them."""
    for module in (networks.denoiser, networks.decoder, networks.features):
        if module is not None:
            module.requires_grad_(False).eval()
    return networks


def moved(networks: Networks, device: torch.device, dtype: torch.dtype) -> Networks:
    """The networks on a device, their weights there in `dtype`; the operators in float32. In place on one device."""
    features = networks.features.to(device, dtype) if networks.features is not None else None
    null = networks.null_context.to(device, dtype) if networks.null_context is not None else None
    return replace(
        networks,
        denoiser=networks.denoiser.to(device, dtype),
        decoder=networks.decoder.to(device, dtype),
        features=features,
        null_context=null,
        operators={name: operator.to(device) for name, operator in networks.operators.items()},
    )


def problem(image: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A measurement and its mask for images (C, H, W)."""
    mask = np.zeros((1, *image[1:]), np.float32)
    mask[..., : image[2] // 2] = 1
    row = np.linspace(-1, 1, image[2], dtype=np.float32)
    return np.broadcast_to(row, image).astype(np.float32) * mask, mask


def torch_loop(networks: Networks, particles: int, params: Params = PARAMS, **options: Any) -> TorchLoop:
    """A PyTorch loop on the problem; options: fields of TorchLoop."""
    device = options.get("device", torch.device("cpu"))
    y, mask = (torch.from_numpy(each).to(device) for each in problem(tuple(networks.image)))
    operator, given = networks.operators[OPERATOR], mask.expand(particles, *mask.shape)
    return TorchLoop(networks, lambda x: operator(x, given), y, particles, params, **options)


def job(image: tuple[int, ...], particles: int, params: Params = PARAMS) -> Job:
    """The problem as a job of the engine, for images (C, H, W)."""
    y, mask = problem(image)
    return Job(y=y, operator=OPERATOR, operator_params={"mask": mask}, particles=particles, params=params)


def flops(networks: Networks) -> dict[str, float]:
    """Floating-point operations of one particle-step in our algebra, by graph, without any rewriting of ours."""
    z = torch.zeros(1, *networks.latent)
    args = [z, torch.zeros(1, dtype=torch.long)]
    if networks.null_context is not None:
        args.append(networks.null_context[None].float())
    denoiser = to_aten(networks.denoiser, args)
    with FlopCounterMode(display=False) as counter:
        denoiser(*args)
    counted = {"denoiser": float(counter.get_total_flops())}
    counted |= _both_ways("decoder", networks.decoder, z)
    if networks.features is not None:
        counted |= _both_ways("features", networks.features, torch.zeros(1, *networks.image))
    return counted


def _both_ways(name: str, module: torch.nn.Module, x: torch.Tensor) -> Mapping[str, float]:
    graph = to_aten(module, [x])
    with FlopCounterMode(display=False) as counter:
        y = graph(x.requires_grad_(True))
        forward = counter.get_total_flops()
        y.sum().backward()
    return {name: float(forward), f"{name}_pull": float(counter.get_total_flops() - forward)}
