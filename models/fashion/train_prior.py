"""Trains the noise predictor on the autoencoder's latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlsd.models.fashion import CLASS_NAMES, data
from rlsd.models.fashion.loop import Recipe, batch_indices, generator, train
from rlsd.models.fashion.networks import Prior, build_scheduler
from rlsd.models.fashion.recipe import SEED, autocast, average_of, batch_of, channels_last
from rlsd.models.fashion.train_vae import encode_all, scaling_of


@dataclass(frozen=True)
class Stage:
    """How one phase trains the noise predictor.

    start: the phase whose average it goes on from. null_share(step): how much of a batch gets the null context, which
    is the one that the method uses. timesteps(u): a uniform number in [0, 1) to the timestep's place in the schedule.
    v_loss: the loss on v, which is the loss on eps divided by abar: about equally large at every timestep, where the
    plain one is fifty times smaller at the noisy end, and it is there that a sample decides what it will be.
    worse: a phase whose average is a worse noise predictor than `start`'s. Then the network learns, in place of the
    noise, what autoguidance (Karras et al., arXiv 2406.02507) predicts: start + (GUIDANCE - 1) (start - worse), which
    takes two networks and is here put into one, as guidance distillation does (Meng et al., arXiv 2210.03142).
    """

    start: str | None
    null_share: Callable[[int], float]
    timesteps: Callable[[Tensor], Tensor]
    v_loss: bool
    worse: str | None = None


GUIDANCE = 2.5
STAGES = {
    "unet": Stage(None, lambda step: 0.4 if step < 3_511 else 0.9, lambda u: u, False),
    "unet-finish": Stage("unet", lambda _: 0.85, lambda u: u**0.7, True),
    "unet-guided": Stage("unet-finish", lambda _: 0.9, lambda u: u, True, worse="unet"),
    "own-unet": Stage(None, lambda _: 0.8, lambda u: u, True),
}


def new_prior(images: Tensor, classes: int) -> Prior:
    """A noise predictor for the latents of images uint8 [N, C, H, W], with random weights."""
    return Prior(classes=classes, side=data.side_of(images))


def train_unet(
    phase: str,
    images: Tensor,
    labels: Tensor,
    work: Path,
    recipe: Recipe,
    stop_at: int | None = None,
    classes: int = len(CLASS_NAMES),
    on_save: Callable[[int, Prior], None] | None = None,
) -> Prior:
    """Train the noise predictor on cached latents. on_save(step, average) follows each save.

    images uint8 [N, C, H, W], labels int64 [N] in 0 .. classes - 1; without classes only the null context is trained.
    """
    mean, std = encode_all(images, work)
    scale = scaling_of(mean, std)
    labels = labels.repeat(2)
    abar = build_scheduler().alphas_cumprod
    torch.manual_seed(SEED[phase])
    stage, prior = STAGES[phase], new_prior(images, classes)
    if stage.start:
        average_of(prior, work / f"{stage.start}.pt").requires_grad_(True).train()
    prior = channels_last(prior)
    guided = autoguidance(stage, work)

    def loss_of(step: int) -> Tensor:
        g, size = generator(SEED[phase], step), batch_of(phase, len(mean))
        chosen = batch_indices(SEED[phase], step, size, len(mean))
        m, s = mean[chosen].float(), std[chosen].float()
        z = (m + s * torch.randn(m.shape, generator=g)) * scale
        eps = torch.randn(m.shape, generator=g)
        # One uniform draw per stratum of the timesteps: the same expectation, a quieter gradient.
        u = (torch.arange(size) + torch.rand(size, generator=g)) / size
        t = (stage.timesteps(u) * len(abar)).long().clamp(max=len(abar) - 1)
        context = torch.where(torch.rand(size, generator=g) < stage.null_share(step), classes, labels[chosen])
        a = abar[t].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * z + (1 - a).sqrt() * eps).contiguous(memory_format=torch.channels_last)
        with autocast():
            guess = prior(noisy, t, context)
        target = eps if guided is None else guided(noisy, t, context)
        square = (guess.float() - target).square()
        return (square / a if stage.v_loss else square).mean()

    return train(phase, prior, loss_of, recipe, work / f"{phase}.pt", on_save, stop_at)


def autoguidance(stage: Stage, work: Path) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """What a stage with a worse network learns, a function of (z_t, t, context) -> eps; None for one without."""
    if stage.start is None or stage.worse is None:
        return None
    good, worse = (channels_last(average_of(Prior(), work / f"{name}.pt")) for name in (stage.start, stage.worse))

    @torch.no_grad()
    def guided(z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        with autocast():
            better, weaker = good(z_t, t, context).float(), worse(z_t, t, context).float()
        return better + (GUIDANCE - 1) * (better - weaker)

    return guided
