"""A classifier that the repulsion does not see: it says to which garment a reconstruction belongs.

The prior's feature extractor is itself a classifier. Modes counted with it would be counted with what was pushed
apart, so that a second network, of another architecture and seed, is trained on the training images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from rlsd.bench.quality.problem import Array

EPOCHS, BATCH, RATE, SEED = 4, 128, 2e-3, 7001


def network() -> nn.Sequential:
    """Images [B, 1, 32, 32] in [-1, 1] -> logits [B, 10]; max-pooling and BatchNorm, unlike the extractor."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if after != before else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 10))


class Judge:
    """Trained once, kept in the work folder. accuracy: share of the test images that it names rightly."""

    def __init__(self, model: nn.Module, accuracy: float):
        self.model, self.accuracy = model.eval(), accuracy

    @classmethod
    def of(cls, work: Path, train: tuple[Array, Array], test: tuple[Array, Array]) -> Judge:
        """The judge of a work folder, trained if it is not there (about 3 minutes on one core).

        train, test: images [n, 1, 32, 32] in [-1, 1] and their classes.
        """
        file, model = work / f"judge-{SEED}-{EPOCHS}.pt", network()
        if not file.is_file():
            work.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".tmp")
            torch.save(trained(*train).state_dict(), temporary)
            temporary.rename(file)
        model.load_state_dict(torch.load(file, weights_only=True))
        judge = cls(model, 0.0)
        judge.accuracy = float((judge(test[0]) == test[1]).mean())
        return judge

    def __call__(self, images: Array) -> Array:
        """The class of each image [n, 1, 32, 32], clipped to [-1, 1]."""
        with torch.no_grad():
            parts = torch.from_numpy(np.ascontiguousarray(images, np.float32)).clamp(-1, 1).split(512)
            return torch.cat([self.model(part).argmax(1) for part in parts]).numpy()


def trained(images: Array, labels: Array, epochs: int = EPOCHS) -> nn.Sequential:
    """The network after `epochs` passes over the images in an order that depends on SEED alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = network().train()
        steps = epochs * (len(images) // BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, max(steps, 2))
        x, y = torch.from_numpy(images), torch.from_numpy(labels)
        for _ in range(epochs):
            for chosen in torch.randperm(len(x))[: steps // epochs * BATCH].split(BATCH):
                loss = F.cross_entropy(model(softened(x[chosen])), y[chosen], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model


def softened(x: torch.Tensor) -> torch.Tensor:
    """Half of the images blurred a little: a decoder's images have less texture than photos."""
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, blurred)
