"""Trains the classifier whose features the repulsion measures distances in."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from rlsd.models.fashion import CLASS_NAMES, data
from rlsd.models.fashion.classifier import Classifier
from rlsd.models.fashion.loop import Recipe, batch_indices, generator, train
from rlsd.models.fashion.recipe import SEED, autocast, average_of, batch_of, channels_last, flip_half


def new_classifier(images: Tensor, classes: int) -> Classifier:
    """A classifier for images uint8 [N, C, H, W], with random weights."""
    return Classifier(classes=classes, in_channels=images.shape[1])


def degrade(x: Tensor, g: torch.Generator, strength: float) -> Tensor:
    """Shift by up to 2 pixels, blur a third and add noise to half: phi must also work on what a decoder makes.

    strength in 0..1 scales the shifts, the share of the blur and the noise.
    """
    dx, dy = (int(strength * v) for v in torch.randint(-2, 3, (2,), generator=g))
    x = torch.roll(x, (dy, dx), (2, 3))
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), value=-1.0), 3, stride=1)
    amount = torch.rand(len(x), 1, 1, 1, generator=g).sub(2 / 3).clamp(min=0) * 3
    x = x + strength * amount * (blurred - x)
    sigma = 0.3 * torch.rand(len(x), 1, 1, 1, generator=g).sub(0.5).clamp(min=0)
    return x + strength * sigma * torch.randn(x.shape, generator=g)


def train_classifier(
    phase: str,
    images: Tensor,
    labels: Tensor,
    work: Path,
    recipe: Recipe,
    stop_at: int | None = None,
    classes: int = len(CLASS_NAMES),
) -> Classifier:
    """images uint8 [N, C, H, W], labels int64 [N] in 0 .. classes - 1 -> the averaged Classifier.

    The phase "classifier" starts from nothing on fully degraded images; "classifier-mild" goes on from its
    average with half the degradation, which the accuracy on clean images needs.
    """
    torch.manual_seed(SEED[phase])
    mild = phase == "classifier-mild"
    start = (
        average_of(new_classifier(images, classes), work / "classifier.pt").requires_grad_(True).train()
        if mild
        else new_classifier(images, classes)
    )
    model = channels_last(start)

    def loss_of(step: int) -> Tensor:
        g = generator(SEED[phase], step)
        chosen = batch_indices(SEED[phase], step, batch_of(phase, len(images)), len(images))
        x = degrade(flip_half(data.to_model(images[chosen]), g), g, 0.5 if mild else 1.0)
        with autocast():
            logits = model(x.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.02)

    return train(phase, model, loss_of, recipe, work / f"{phase}.pt", stop_at=stop_at)
