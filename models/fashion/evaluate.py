"""Measure the embedded prior on the 10,000 test images and on seeded samples of its own; PASS or FAIL per target.

    python -m rlsd.models.fashion.evaluate --data FOLDER

Writes evaluation.json and samples.png beside this file. The exit status is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rlsd.models.fashion import CHECKPOINT, CLASS_NAMES, PATH, data, load_classifier
from rlsd.models.fashion.classifier import Classifier
from rlsd.models.fashion.networks import NULL, Prior, Schedule, Vae, load_checkpoint

TARGETS = {"psnr_32": 24.0, "accuracy": 0.91, "confident_ratio": 0.9, "histogram_entropy": 0.9}
CONFIDENT = 0.9
DDIM_STEPS, SEED, CHUNK = 50, 2026, 250


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Decibels [N] between images [N, 1, H, W] of data range 2."""
    return 10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)))


def reconstruct(vae: Vae, images: Tensor) -> Tensor:
    """Decode the posterior mean of uint8 images [N, 1, 28, 28] -> [N, 1, 32, 32], clamped to [-1, 1]."""
    parts = [vae.decode(vae.encode(data.to_model(b)).latent_dist.mean).sample for b in images.split(CHUNK)]
    return torch.cat(parts).clamp(-1, 1)


def centre(x: Tensor) -> Tensor:
    """The 28 x 28 part that is not padding."""
    return x[..., data.PAD : -data.PAD, data.PAD : -data.PAD]


def sample(vae: Vae, prior: Prior, schedule: Schedule, labels: Tensor, seed: int) -> Tensor:
    """DDIM with eta 0 from noise: one image per context label [N] -> [N, 1, 32, 32] in [-1, 1]."""
    g = torch.Generator().manual_seed(seed)
    schedule.set_timesteps(DDIM_STEPS)
    images = []
    for context in labels.split(CHUNK):
        z = torch.randn(len(context), 4, 8, 8, generator=g)
        for t in schedule.timesteps:
            eps = prior(z, t.expand(len(context)), context)
            z = schedule.step(eps, t, z, eta=0.0, return_dict=False)[0]
        images.append(vae.decode(z / vae.config.scaling_factor).sample)
    return torch.cat(images).clamp(-1, 1)


def classify(classifier: Classifier, x: Tensor) -> tuple[Tensor, np.ndarray]:
    """Probabilities [N, 10] and features float64 [N, D] of images [N, 1, 32, 32]."""
    features = torch.cat([classifier.features(b) for b in x.split(CHUNK)])
    return classifier.head(features).softmax(1), features.double().numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance between Gaussians fitted to features [N, D] and [M, D]."""
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(ca)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cb @ root).clip(min=0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca) + np.trace(cb) - 2 * cross)


def confident(probabilities: Tensor) -> float:
    """The share of images that the classifier gives one class with a probability above 0.9."""
    return (probabilities.amax(1) > CONFIDENT).double().mean().item()


def histogram_entropy(probabilities: Tensor) -> tuple[list[int], float]:
    """Class counts, and the entropy of their histogram as a share of the uniform histogram's."""
    counts = torch.bincount(probabilities.argmax(1), minlength=len(CLASS_NAMES)).double()
    p = counts / counts.sum()
    return counts.int().tolist(), float(-torch.xlogy(p, p).sum() / np.log(len(p)))


def sheet(x: Tensor, columns: int, path: Path) -> None:
    """Tile images [N, 1, 32, 32] row by row into one grayscale PNG, twice enlarged, N a multiple of columns."""
    pixels = centre(x)[:, 0].add(1).mul(127.5).round().byte().numpy()
    rows = pixels.reshape(-1, columns, *pixels.shape[1:]).transpose(0, 2, 1, 3)
    tiled = rows.reshape(-1, columns * pixels.shape[2])
    Image.fromarray(tiled).resize((tiled.shape[1] * 2, tiled.shape[0] * 2), Image.Resampling.NEAREST).save(path)


@torch.no_grad()
def evaluate(checkpoint: Path, folder: Path, count: int, sheet_path: Path) -> dict[str, object]:
    """All figures of the model card; `count` unconditional samples."""
    vae, prior, schedule = load_checkpoint(checkpoint)
    classifier = load_classifier(checkpoint / "features")
    test, labels = data.load(folder, "t10k")
    train = data.load(folder, "train")[0][: len(test)]
    x, shown = data.to_model(test), reconstruct(vae, test)
    of_test, test_features = classify(classifier, x)
    _, train_features = classify(classifier, data.to_model(train))
    samples = sample(vae, prior, schedule, torch.full((count,), NULL), SEED)
    of_samples, sample_features = classify(classifier, samples)
    counts, entropy = histogram_entropy(of_samples)
    asked = torch.arange(len(CLASS_NAMES)).repeat_interleave(20)
    of_asked, _ = classify(classifier, sample(vae, prior, schedule, asked, SEED + 1))
    sheet(samples[:100], 10, sheet_path)
    return {
        "psnr_32": psnr(x, shown).mean().item(),
        "psnr_28": psnr(centre(x), centre(shown)).mean().item(),
        "accuracy": (of_test.argmax(1) == labels).double().mean().item(),
        "accuracy_on_reconstructions": (classify(classifier, shown)[0].argmax(1) == labels).double().mean().item(),
        "confident_ratio": confident(of_samples) / confident(of_test),
        "confident_samples": confident(of_samples),
        "confident_test": confident(of_test),
        "histogram_entropy": entropy,
        "histogram": dict(zip(CLASS_NAMES, counts, strict=True)),
        "conditional_agreement": (of_asked.argmax(1) == asked).double().mean().item(),
        "frechet_samples_test": frechet(sample_features, test_features),
        "frechet_train_test_same_count": frechet(train_features[:count], test_features),
        "frechet_train_test": frechet(train_features, test_features),
        "samples": count,
        "ddim_steps": DDIM_STEPS,
        "seed": SEED,
    }


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, default=PATH, help="folder for evaluation.json and samples.png")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.samples < 100:
        parser.error(f"--samples: {args.samples} is too few: the sample sheet alone takes 100")
    torch.set_num_threads(args.threads)
    figures = evaluate(args.checkpoint, args.data, args.samples, args.out / "samples.png")
    passed = {name: float(str(figures[name])) >= target for name, target in TARGETS.items()}
    report = {**figures, "targets": TARGETS, "passed": passed}
    (args.out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    for name, target in TARGETS.items():
        print(f"{'PASS' if passed[name] else 'FAIL'} {name}: {figures[name]:.4f} (target {target})")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
