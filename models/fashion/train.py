"""Train the embedded prior: VAE, classifier and noise predictor, on a CPU, in about three hours.

    python -m rlsd.models.fashion.train --data FOLDER --work FOLDER [vae] [vae-decoder] [classifier] \\
        [classifier-mild] [unet] [unet-finish] [unet-guided] [export-weights]

Without phases it runs all of them in this order. Kill it at any time: it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlsd.models.fashion import CHECKPOINT, data
from rlsd.models.fashion.classifier import Classifier
from rlsd.models.fashion.loop import Module, Recipe, batch_indices, generator, train
from rlsd.models.fashion.networks import NULL, Prior, Vae, build_scheduler, build_vae, write_checkpoint

UNET_PHASES = ("unet", "unet-finish", "unet-guided")
PHASES = ("vae", "vae-decoder", "classifier", "classifier-mild", *UNET_PHASES, "export-weights")
RECIPES = {
    "vae": Recipe(steps=2800, lr=1.5e-3, weight_decay=1e-4, ema=0.995),
    "vae-decoder": Recipe(steps=2000, lr=8e-4, weight_decay=1e-4, ema=0.998),
    "classifier": Recipe(steps=3500, lr=2e-3, weight_decay=0.05, ema=0.998),
    "classifier-mild": Recipe(steps=2500, lr=1.5e-3, weight_decay=0.05, ema=0.998),
    "unet": Recipe(steps=4900, lr=1e-3, warmup=400, horizon=6000, cooldown=1075, weight_decay=0.01, ema=0.999),
    "unet-finish": Recipe(steps=12000, lr=8e-4, warmup=300, weight_decay=0.01, ema=0.9995),
    "unet-guided": Recipe(steps=3000, lr=4e-4, warmup=100, weight_decay=0.01, ema=0.998),
}
BATCH = {"vae": 64, "vae-decoder": 64, "classifier": 128, "classifier-mild": 128, **dict.fromkeys(UNET_PHASES, 96)}
SEED = {
    "vae": 11,
    "vae-decoder": 12,
    "classifier": 22,
    "classifier-mild": 23,
    "unet": 33,
    "unet-finish": 34,
    "unet-guided": 35,
}
KL_WEIGHT = 5e-3  # per latent value, against a loss per pixel: smooth latents first, decibels second


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
}


def flip_half(images: Tensor, g: torch.Generator) -> Tensor:
    """Mirror a random half of images [B, 1, H, W]."""
    flip = torch.rand(len(images), 1, 1, 1, generator=g) < 0.5
    return torch.where(flip, images.flip(-1), images)


def channels_last(model: Any) -> Any:
    """The layout that oneDNN's convolutions prefer. Any: torch's annotations of `to` lack memory_format."""
    return model.to(memory_format=torch.channels_last)


def autocast() -> torch.autocast:
    """bf16 where it is safe: 1.6 times faster on a CPU that has it."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def train_vae(images: Tensor, work: Path, recipe: Recipe, stop_at: int | None = None) -> Vae:
    """images uint8 [N, 1, 28, 28] -> the averaged AutoencoderKL."""
    torch.manual_seed(SEED["vae"])
    vae = channels_last(build_vae())

    def loss_of(step: int) -> Tensor:
        g = generator(SEED["vae"], step)
        chosen = batch_indices(SEED["vae"], step, BATCH["vae"], len(images))
        x = flip_half(data.to_model(images[chosen]), g).contiguous(memory_format=torch.channels_last)
        with autocast():
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)
            shown = vae.decode(z).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        return F.l1_loss(shown, x) + F.mse_loss(shown, x) + KL_WEIGHT * kl

    return train("vae", vae, loss_of, recipe, work / "vae.pt", stop_at=stop_at)


def train_decoder(images: Tensor, work: Path, recipe: Recipe, stop_at: int | None = None) -> Vae:
    """Go on with the decoder alone, on latents that stay as they are: no KL term holds it back any more.

    The loss adds the L1 of neighbouring pixels' differences, which keeps edges and straps from fading.
    """
    mean, std = encode_all(images, work)
    torch.manual_seed(SEED["vae-decoder"])
    vae = average_of(build_vae(), work / "vae.pt").train()
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    vae = channels_last(vae)

    def loss_of(step: int) -> Tensor:
        g = generator(SEED["vae-decoder"], step)
        chosen = batch_indices(SEED["vae-decoder"], step, BATCH["vae-decoder"], len(mean))
        x = data.to_model(images[chosen % len(images)])
        x = torch.where((chosen >= len(images))[:, None, None, None], x.flip(-1), x)
        z = mean[chosen].float() + std[chosen].float() * torch.randn(mean[chosen].shape, generator=g)
        with autocast():
            shown = vae.decode(z.contiguous(memory_format=torch.channels_last)).sample
        error = shown.float() - x
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + error.square().mean() + edges

    return train("vae-decoder", vae, loss_of, recipe, work / "vae-decoder.pt", stop_at=stop_at)


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
    phase: str, images: Tensor, labels: Tensor, work: Path, recipe: Recipe, stop_at: int | None = None
) -> Classifier:
    """images uint8 [N, 1, 28, 28], labels int64 [N] -> the averaged Classifier.

    The phase "classifier" starts from nothing on fully degraded images; "classifier-mild" goes on from its
    average with half the degradation, which the accuracy on clean images needs.
    """
    torch.manual_seed(SEED[phase])
    mild = phase == "classifier-mild"
    start = average_of(Classifier(), work / "classifier.pt").requires_grad_(True).train() if mild else Classifier()
    model = channels_last(start)

    def loss_of(step: int) -> Tensor:
        g = generator(SEED[phase], step)
        chosen = batch_indices(SEED[phase], step, BATCH[phase], len(images))
        x = degrade(flip_half(data.to_model(images[chosen]), g), g, 0.5 if mild else 1.0)
        with autocast():
            logits = model(x.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.02)

    return train(phase, model, loss_of, recipe, work / f"{phase}.pt", stop_at=stop_at)


def average_of(model: Module, path: Path) -> Module:
    """Load the moving average that a phase left at `path`."""
    if not path.exists():
        raise FileNotFoundError(f"--work: {path} is missing: run the phase {path.stem!r} first")
    model.load_state_dict(torch.load(path, weights_only=True)["ema"])
    return model.eval().requires_grad_(False)


@torch.no_grad()
def encode_all(images: Tensor, work: Path) -> tuple[Tensor, Tensor]:
    """Posterior mean and std, fp16 [2N, 4, 8, 8] each: the images, then their mirror images.

    Cached in the work folder until the VAE there changes.
    """
    path, source = work / "latents.pt", work / "vae.pt"
    vae = channels_last(average_of(build_vae(), source))
    if path.exists() and path.stat().st_mtime >= source.stat().st_mtime:
        cached = torch.load(path, weights_only=True)
        return cached["mean"], cached["std"]
    means, stds = [], []
    for batch in (*images.split(256), *images.flip(-1).split(256)):
        x = data.to_model(batch).contiguous(memory_format=torch.channels_last)
        with autocast():  # its rounding is far below the posterior's own std
            posterior = vae.encode(x).latent_dist
        means.append(posterior.mean.half())
        stds.append(posterior.std.half())
    mean, std = torch.cat(means), torch.cat(stds)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    torch.save({"mean": mean, "std": std}, temporary)
    os.replace(temporary, path)
    return mean, std


def scaling_of(mean: Tensor, std: Tensor) -> float:
    """1 / (standard deviation of the sampled latents), the convention of latent diffusion."""
    total = mean.float().var() + std.float().square().mean()
    return round(float(total.rsqrt()), 6)


def train_unet(
    phase: str, images: Tensor, labels: Tensor, work: Path, recipe: Recipe, stop_at: int | None = None
) -> Prior:
    """Train the noise predictor on cached latents; leaves a usable snapshot in the work folder at every save."""
    mean, std = encode_all(images, work)
    scale = scaling_of(mean, std)
    labels = labels.repeat(2)
    abar = build_scheduler().alphas_cumprod
    torch.manual_seed(SEED[phase])
    stage, prior = STAGES[phase], Prior()
    if stage.start:
        average_of(prior, work / f"{stage.start}.pt").requires_grad_(True).train()
    prior = channels_last(prior)
    guided = autoguidance(stage, work)

    def loss_of(step: int) -> Tensor:
        g, size = generator(SEED[phase], step), BATCH[phase]
        chosen = batch_indices(SEED[phase], step, size, len(mean))
        m, s = mean[chosen].float(), std[chosen].float()
        z = (m + s * torch.randn(m.shape, generator=g)) * scale
        eps = torch.randn(m.shape, generator=g)
        # One uniform draw per stratum of the timesteps: the same expectation, a quieter gradient.
        u = (torch.arange(size) + torch.rand(size, generator=g)) / size
        t = (stage.timesteps(u) * len(abar)).long().clamp(max=len(abar) - 1)
        context = torch.where(torch.rand(size, generator=g) < stage.null_share(step), NULL, labels[chosen])
        a = abar[t].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * z + (1 - a).sqrt() * eps).contiguous(memory_format=torch.channels_last)
        with autocast():
            guess = prior(noisy, t, context)
        target = eps if guided is None else guided(noisy, t, context)
        square = (guess.float() - target).square()
        return (square / a if stage.v_loss else square).mean()

    def snapshot(step: int, average: Prior) -> None:
        export(work, work / "snapshot", average)
        print(f"{phase}: snapshot of step {step} in {work / 'snapshot'}", flush=True)

    return train(phase, prior, loss_of, recipe, work / f"{phase}.pt", snapshot, stop_at)


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


def export(work: Path, out: Path, prior: Prior | None = None) -> None:
    """Write the averaged weights as a checkpoint in the layout of diffusers, fp16 safetensors."""
    vae = average_of(build_vae(), work / "vae-decoder.pt")
    latents = torch.load(work / "latents.pt", weights_only=True)
    vae.register_to_config(scaling_factor=scaling_of(latents["mean"], latents["std"]))
    classifier = average_of(Classifier(), work / "classifier-mild.pt")
    write_checkpoint(out, vae, prior or average_of(Prior(), work / f"{UNET_PHASES[-1]}.pt"), classifier)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=f"any of {', '.join(PHASES)}; default: all")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and cached latents")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="where export-weights writes")
    parser.add_argument("--steps", type=int, help="override the number of steps of the chosen phases")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    unknown = set(args.phases) - set(PHASES)
    if unknown:
        parser.error(f"unknown phase {sorted(unknown)[0]!r}: choose from {', '.join(PHASES)}")
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    images, labels = data.load(args.data, "train")
    recipes = {k: replace(r, steps=args.steps or r.steps) for k, r in RECIPES.items()}
    for phase in args.phases or PHASES:
        if phase == "vae":
            train_vae(images, args.work, recipes["vae"])
        elif phase == "vae-decoder":
            train_decoder(images, args.work, recipes["vae-decoder"])
        elif phase.startswith("classifier"):
            train_classifier(phase, images, labels, args.work, recipes[phase])
        elif phase in UNET_PHASES:
            train_unet(phase, images, labels, args.work, recipes[phase])
        else:
            export(args.work, args.out)


if __name__ == "__main__":
    main()
