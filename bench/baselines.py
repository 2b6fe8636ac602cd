"""The same method as plain PyTorch loops: what the engine is measured against.

`published` has the structure of the authors' code: the decoder runs three times a step (coupling, repulsion, step
of x) and is pulled back twice. `shared` has our algebra in eager PyTorch: one decoder evaluation, one pull-back.
Both draw the engine's own random numbers, so that all three loops must arrive at the same particles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlsd.engine import Params, normal
from rlsd.export.package import Networks

Z_STREAM, X_STREAM = 0xFFFFFFFF, 0xFFFFFFFE
LIFT = 1024.0  # of the cotangents of features, where the networks compute in halves


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
    """N particles of one measurement; call `step` K - 1 times, then `finish`.

    Repulsion in the space of features, or of latents where there is no extractor. The networks compute in `dtype`
    with their tensors in `layout` on `device`, where they have to be; the state, y and the operator are float32.
    chunk: so many particles are decoded at a time, and again for the pull-back: less memory for more work.
    """

    networks: Networks
    operator: Callable[[Tensor], Tensor]
    y: Tensor
    particles: int
    params: Params
    seed: int = 0
    published: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    chunk: int = 0
    k: int = 0
    z: Tensor = field(init=False)
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.z = self._noise(Z_STREAM, self.networks.latent)
        self.x = self._noise(X_STREAM, self.networks.image)
        zeros = torch.zeros_like
        self.adam_z = Adam(self.params, self.params.lr_z, zeros(self.z), zeros(self.z))
        self.adam_x = Adam(self.params, self.params.lr_x, zeros(self.x), zeros(self.x))
        halves = self.dtype == torch.float16
        # means over an image make cotangents that no half can hold; powers of two change no digit
        self.scale = 2.0 ** round(math.log2(self.x[0].numel())) if halves else 1.0
        self.lift = LIFT if halves else 1.0

    def step(self) -> None:
        """One step of every particle; with our algebra its decoder evaluation first ends the previous step of x."""
        p, networks = self.params, self.networks
        t = min((p.steps - 1 - self.k) * (len(networks.alphas_cumprod) // p.steps) + networks.steps_offset, self._last)
        abar = float(networks.alphas_cumprod[t].double())
        omega = ((1 - abar) / abar) ** 0.5
        z = self.z.detach().requires_grad_(True)
        decoded = self._decode(z)
        if not self.published:
            self._step_x(decoded.detach())
        n = self._score(t, abar)
        if networks.features is None:
            n = n - p.gamma * (1 - abar) ** 0.5 * self._crowd(self.z.flatten(1)).reshape(self.z.shape)
        weight = p.lambda_ * omega / self.z[0].numel()
        pulled = self._pulled(z, decoded, weight * p.gamma * (1 - abar) ** 0.5)
        self.z = self.adam_z.step(self.z, weight * n + pulled)
        self.k += 1
        if self.published:
            with torch.no_grad():
                self._step_x(self._decode(self.z))

    def finish(self) -> None:
        """The step of x that belongs to the last step of z, which `published` has taken already."""
        if not self.published:  # with a graph, as in the steps: a compiled decoder would be compiled again without
            self._step_x(self._decode(self.z.detach().requires_grad_(True)).detach())

    @property
    def _last(self) -> int:
        return len(self.networks.alphas_cumprod) - 1

    def _score(self, t: int, abar: float) -> Tensor:
        eps = self._noise(self.k, self.networks.latent)
        z_t = (abar**0.5 * self.z + (1 - abar) ** 0.5 * eps).to(self.dtype, memory_format=self.layout)
        args = [z_t, torch.full((self.particles,), t, device=self.device)]
        if self.networks.null_context is not None:
            null = self.networks.null_context
            args.append(null.expand(self.particles, *null.shape))
        with torch.no_grad():
            return self.networks.denoiser(*args).float() - eps

    def _pulled(self, z: Tensor, decoded: Tensor, strength: float) -> Tensor:
        """Gradient in z of the coupling, less `strength` times the repulsion among features pulled back to z."""
        pixels, scale = self.x[0].numel(), self.scale
        if self.published:
            couple = 0.5 * (decoded - self.x).square().flatten(1).mean(1).sum()
            (pulled,) = torch.autograd.grad(couple * scale, z)
            return pulled / scale - (strength * self._repulsion(z, self._decode(z)) if self._repels() else 0)
        image = decoded.detach().requires_grad_(True)
        cotangent = (image.detach() - self.x) / pixels
        if self._repels():
            cotangent = cotangent - strength * self._repulsion(image, image)
        if not self.chunk:
            return torch.autograd.grad(decoded, z, cotangent * scale)[0] / scale
        sources = [part.detach().requires_grad_(True) for part in z.split(self.chunk)]
        parts = zip(sources, cotangent.split(self.chunk))
        return torch.cat([torch.autograd.grad(self._image(s), s, c * scale)[0] / scale for s, c in parts])

    def _repels(self) -> bool:
        return self.params.gamma != 0 and self.particles > 1 and self.networks.features is not None

    def _repulsion(self, source: Tensor, image: Tensor) -> Tensor:
        """R in the space of `source`, from which `image` was computed: features pulled back to it."""
        assert self.networks.features is not None
        phi = self.networks.features(image.to(self.dtype, memory_format=self.layout)).float()
        return torch.autograd.grad(phi, source, self._crowd(phi.detach()) * self.lift)[0] / self.lift

    def _crowd(self, phi: Tensor) -> Tensor:
        """R [N, D] among phi [N, D]."""
        if self.params.gamma == 0 or self.particles == 1:
            return torch.zeros_like(phi)
        difference = phi[:, None] - phi[None]
        distance = difference.square().sum(-1).sqrt()
        itself = torch.eye(self.particles, dtype=torch.bool, device=self.device)
        ordered = distance.masked_fill(itself, math.inf).sort(1).values
        median = ordered[:, (self.particles - 2) // 2]  # without a selection by a mask, which waits for the device
        bandwidth = median**2 / math.log(max(self.particles - 1, 2))
        kernel = torch.exp(-(distance**2) / bandwidth[:, None]) * ~itself
        return (2 * kernel / bandwidth[:, None])[..., None].mul(difference).sum(1) / kernel.sum(1, keepdim=True)

    def _step_x(self, decoded: Tensor) -> None:
        """One step of x towards `decoded` = D(z); nothing before the first step of z."""
        if self.k == 0:
            return
        x = self.x.detach().requires_grad_(True)
        with torch.enable_grad():
            loss = 0.5 * (self.y - self.operator(x)).square().flatten(1).mean(1).sum()
            (gradient,) = torch.autograd.grad(loss, x)
        self.x = self.adam_x.step(self.x, gradient + self.params.rho * (self.x - decoded) / self.x[0].numel())

    def _decode(self, z: Tensor) -> Tensor:
        """D(z) in float32; in chunks it carries no graph."""
        if not self.chunk:
            return self._image(z)
        with torch.no_grad():
            return torch.cat([self._image(part) for part in z.split(self.chunk)])

    def _image(self, z: Tensor) -> Tensor:
        return self.networks.decoder(z.to(self.dtype, memory_format=self.layout)).float()

    def _noise(self, stream: int, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape)
        if self.device.type == "cuda":  # the same numbers, drawn there
            from rlsd.kernels.step import philox_normal

            each = [philox_normal(self.seed, 0, i, stream, size, self.device) for i in range(self.particles)]
        else:
            each = [torch.from_numpy(normal(self.seed, 0, i, stream, size)) for i in range(self.particles)]
        return torch.stack(each).reshape(self.particles, *shape)
