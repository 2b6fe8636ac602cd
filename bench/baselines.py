"""The same method as plain PyTorch loops: what the engine is measured against.

`published` has the structure of the authors' code: the decoder runs three times a step (coupling, repulsion, step
of x) and is pulled back twice. `shared` has our algebra in eager PyTorch: one decoder evaluation, one pull-back.
Both draw the engine's own random numbers, so that all three loops must arrive at the same particles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlsd.engine import Params, normal
from rlsd.export.package import Networks

Z_STREAM, X_STREAM = 0xFFFFFFFF, 0xFFFFFFFE


@dataclass
class Adam:
    """Adam on one tensor, the same for every particle; betas and epsilon as in Params."""

    params: Params
    rate: float
    m: Tensor
    v: Tensor
    n: int = 0

    def step(self, value: Tensor, gradient: Tensor) -> Tensor:
        p = self.params
        self.n += 1
        self.m.mul_(p.beta1).add_(gradient, alpha=1 - p.beta1)
        self.v.mul_(p.beta2).addcmul_(gradient, gradient, value=1 - p.beta2)
        mean, square = self.m / (1 - p.beta1**self.n), self.v / (1 - p.beta2**self.n)
        return value - self.rate * mean / (square.sqrt() + p.adam_eps)


@dataclass
class TorchLoop:
    """N particles of one measurement; call `step` K - 1 times, then `finish`. Repulsion in the space of features."""

    networks: Networks
    operator: Callable[[Tensor], Tensor]
    y: Tensor
    particles: int
    params: Params
    seed: int = 0
    published: bool = False
    k: int = 0
    z: Tensor = field(init=False)
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.z = self._noise(Z_STREAM, self.networks.latent)
        self.x = self._noise(X_STREAM, self.networks.image)
        zeros = torch.zeros_like
        self.adam_z = Adam(self.params, self.params.lr_z, zeros(self.z), zeros(self.z))
        self.adam_x = Adam(self.params, self.params.lr_x, zeros(self.x), zeros(self.x))
        self._decoded: tuple[Tensor, Tensor] | None = None

    def step(self) -> None:
        """One step of every particle: denoiser, repulsion, step of z, step of x."""
        p, networks = self.params, self.networks
        total = len(networks.alphas_cumprod)
        t = min((p.steps - 1 - self.k) * (total // p.steps) + networks.steps_offset, total - 1)
        abar = float(networks.alphas_cumprod[t].double())
        omega = ((1 - abar) / abar) ** 0.5
        eps = self._noise(self.k, networks.latent)
        with torch.no_grad():
            context = networks.null_context.expand(self.particles, *networks.null_context.shape)  # type: ignore[union-attr]
            times = torch.full((self.particles,), t)
            n = networks.denoiser(abar**0.5 * self.z + (1 - abar) ** 0.5 * eps, times, context) - eps
        z, decoded = self._decode()
        weight = p.lambda_ * omega / self.z[0].numel()
        strength = weight * p.gamma * (1 - abar) ** 0.5
        couple = 0.5 * (decoded - self.x).square().flatten(1).mean(1).sum()
        if self.published:
            (pulled,) = torch.autograd.grad(couple, z)
            pulled = pulled - strength * self._repulsion(z, networks.decoder(z))
        else:
            image = decoded.detach().requires_grad_(True)
            cotangent = (image.detach() - self.x) / self.x[0].numel() - strength * self._repulsion(image, image)
            (pulled,) = torch.autograd.grad(decoded, z, cotangent)
        self.z = self.adam_z.step(self.z, weight * n + pulled)
        self._decoded = None
        self._step_x()
        self.k += 1

    def _repulsion(self, source: Tensor, image: Tensor) -> Tensor:
        """R in the space of `source`, from which `image` was computed: features pulled back to it."""
        if self.params.gamma == 0 or self.particles == 1:
            return torch.zeros_like(source)
        assert self.networks.features is not None
        phi = self.networks.features(image)
        difference = phi.detach()[:, None] - phi.detach()[None]
        distance = difference.square().sum(-1).sqrt()
        others = ~torch.eye(self.particles, dtype=torch.bool)
        median = distance[others].reshape(self.particles, -1).median(1).values
        bandwidth = median**2 / max(torch.tensor(self.particles - 1.0).log(), torch.tensor(2.0).log())
        kernel = torch.exp(-(distance**2) / bandwidth[:, None]) * others
        g = (2 * kernel / bandwidth[:, None])[..., None].mul(difference).sum(1) / kernel.sum(1, keepdim=True)
        return torch.autograd.grad(phi, source, g)[0]

    def _step_x(self) -> None:
        if self.published:
            with torch.no_grad():
                decoded = self.networks.decoder(self.z)
        else:
            decoded = self._decode()[1].detach()
        x = self.x.detach().requires_grad_(True)
        loss = 0.5 * (self.y - self.operator(x)).square().flatten(1).mean(1).sum()
        (gradient,) = torch.autograd.grad(loss, x)
        self.x = self.adam_x.step(self.x, gradient + self.params.rho * (self.x - decoded) / self.x[0].numel())

    def _decode(self) -> tuple[Tensor, Tensor]:
        if self._decoded is None:
            z = self.z.detach().requires_grad_(True)
            self._decoded = (z, self.networks.decoder(z))
        return self._decoded

    def _noise(self, stream: int, shape) -> Tensor:  # type: ignore[no-untyped-def]
        size = int(torch.Size(shape).numel())
        each = [torch.from_numpy(normal(self.seed, 0, i, stream, size)) for i in range(self.particles)]
        return torch.stack(each).reshape(self.particles, *shape)
