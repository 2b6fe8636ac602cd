"""The step between the networks at Stable Diffusion's 512 x 512: float16 networks, float32 state and operators.

The kernels update the state in place, as the engine has it: `ours` twice on the same arguments takes two steps, and a
comparison with `plain`, which changes nothing, must take the arguments as `make` gave them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlsd.bench.kernels import Case
from rlsd.kernels.naive import normal
from rlsd.kernels.step import Lanes, launch, naive, philox_normal
from rlsd.kernels.step.lanes import AUGMENTED, GRADIENT, MOVE_Z

M, P = 4 * 64 * 64, 3 * 512 * 512
BATCHES = (1, 4, 16)
LAYOUTS = {"nchw": (1, 1), "nhwc": (4, 3)}  # channels of latents and images that alternate
NORMAL = 35  # float64 instructions of one normal number, counted in the PTX (logarithm, root, cosine and sine)
MIX, ADAM = 3, 14  # signal z + noise eps; one element's step


def lanes(batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The tables of a batch at one timestep in the middle, particles in scattered slots, and the lanes' flags."""
    row = {"seed": 1, "step": 500, "repulsion_row": -1, "mode": AUGMENTED | MOVE_Z | GRADIENT, "guidance": 1.0}
    row |= {"signal": 0.53, "noise": 0.85, "next_signal": 0.54, "next_noise": 0.84, "score": 0.24 / M, "rho": 0.07 / P}
    row |= {"unscale": 1 / 4096, "cotangent": 4096 / P, "beta1": 0.9, "beta2": 0.99, "epsilon": 4e-8}
    row |= {"rate_z": 0.8, "rate_x": 0.4}
    row |= dict.fromkeys(("correction1_z", "correction1_x", "correction2_z", "correction2_x"), 1.01)
    made = Lanes.pack([{**row, "slot": batch - 1 - lane, "particle": lane} for lane in range(batch)], device)
    return made.whole, made.real, torch.zeros(batch, dtype=torch.int32, device=device)


def rows(batch: int, size: int, device: torch.device, *kinds: str) -> list[Tensor]:
    """Tensors [batch, size]: "s" float32, "m" and "v" such moments that a step is about the rate, "h" float16."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = [torch.randn(batch, size, generator=generator, device=device) for _ in kinds]
    turned = {"s": lambda t: t, "m": lambda t: 1e-3 * t, "v": lambda t: 1e-6 * (t.square() + 0.1), "h": Tensor.half}
    return [turned[kind](each) for kind, each in zip(kinds, drawn)]


def noise_zt(batch: int, layout: str) -> Case:
    channels = LAYOUTS[layout][0]

    def ours(whole: Tensor, real: Tensor, flag: Tensor, z: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        eps, z_t, z_network = outputs
        launch.noise_zt(Lanes(whole, real), z, eps, z_t, z_network, channels)
        return outputs

    def plain(whole: Tensor, real: Tensor, flag: Tensor, z: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        return naive.noise_zt(Lanes(whole, real), z, outputs[-1].dtype, channels)

    make = _maker(batch, M, "sshh")
    return Case(f"noise_zt {layout} B={batch}", make, ours, plain, 12 * batch * M, (NORMAL + MIX) * batch * M)


def step_z(batch: int, layout: str) -> Case:
    channels = LAYOUTS[layout][0]

    def ours(whole: Tensor, real: Tensor, flag: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        z, m, v, eps, eps_theta, cotangent, z_t, z_network = given
        launch.step_z(Lanes(whole, real), (z, m, v), eps, eps_theta, cotangent, z_t, z_network, flag, channels=channels)
        return z, m, v, eps, z_t, z_network

    def plain(whole: Tensor, real: Tensor, flag: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        z, m, v, eps, eps_theta, cotangent, _, _ = given
        return naive.step_z(Lanes(whole, real), z, m, v, eps, eps_theta, cotangent, channels=channels)[:-1]

    make = _maker(batch, M, "smvshhhh")
    return Case(f"step_z {layout} B={batch}", make, ours, plain, 40 * batch * M, (NORMAL + MIX + ADAM + 4) * batch * M)


def step_x(batch: int, layout: str) -> Case:
    channels = LAYOUTS[layout][1]

    def ours(whole: Tensor, real: Tensor, flag: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        x, m, v, gradient, image, x_operator, cotangent = given
        launch.step_x(Lanes(whole, real), (x, m, v), gradient, image, x_operator, cotangent, flag, channels=channels)
        return x, m, v, x_operator, cotangent

    def plain(whole: Tensor, real: Tensor, flag: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        x, m, v, gradient, image, _, _ = given
        return naive.step_x(Lanes(whole, real), x, m, v, gradient, image, channels=channels)[:-1]

    make = _maker(batch, P, "smvshsh")
    return Case(f"step_x {layout} B={batch}", make, ours, plain, 36 * batch * P, (ADAM + 5) * batch * P)


def operator_input(batch: int, layout: str) -> Case:
    channels = LAYOUTS[layout][1]

    def ours(whole: Tensor, real: Tensor, flag: Tensor, x: Tensor, image: Tensor, x_operator: Tensor) -> Tensor:
        launch.operator_input(Lanes(whole, real), x, image, x_operator, channels)
        return x_operator

    def plain(whole: Tensor, real: Tensor, flag: Tensor, x: Tensor, image: Tensor, x_operator: Tensor) -> Tensor:
        return naive.operator_input(Lanes(whole, real), x, image, x_operator.dtype, channels)

    return Case(f"operator_input {layout} B={batch}", _maker(batch, P, "shs"), ours, plain, 8 * batch * P, 0)


def start(batch: int, size: int) -> Case:
    def ours(whole: Tensor, real: Tensor, flag: Tensor, z: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        launch.start(Lanes(whole, real), (z, m, v), 0xFFFFFFFF)
        return z, m, v

    def plain(whole: Tensor, real: Tensor, flag: Tensor, z: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return naive.start(Lanes(whole, real), z, m, v, 0xFFFFFFFF)

    make = _maker(batch, size, "sss")
    return Case(f"start {size} B={batch}", make, ours, plain, 12 * batch * size, NORMAL * batch * size)


def operator(count: int) -> Case:
    def plain(out: Tensor) -> Tensor:
        return normal(torch.tensor([[1, 0, 2, 3, 4]], device=out.device), count)[0]

    def ours(out: Tensor) -> Tensor:
        return philox_normal(1, 2, 3, 4, count, out.device)

    make = lambda device: [torch.empty(count, device=device)]  # noqa: E731
    return Case(f"philox_normal {count}", make, ours, plain, 4 * count, NORMAL * count)


def _maker(batch: int, size: int, kinds: str) -> Callable[[torch.device], list[Any]]:
    return lambda device: [*lanes(batch, device), *rows(batch, size, device, *kinds)]


CASES: list[Case] = [
    *(case(b, layout) for case in (noise_zt, step_z, step_x, operator_input) for layout in LAYOUTS for b in BATCHES),
    *(start(batch, size) for size in (M, P) for batch in BATCHES),
    operator(M),
]
