"""Train the embedded prior: VAE, classifier and noise predictor, on a CPU, in about three hours.

    python -m rlsd.models.fashion.train --data FOLDER --work FOLDER [vae] [vae-decoder] [classifier] \\
        [classifier-mild] [unet] [unet-finish] [unet-guided] [export-weights]

Or a prior of your own images (docs/own-prior.md), with or without classes in sub-folders:

    python -m rlsd.models.fashion.train --images FOLDER --size 32 --work FOLDER --out CHECKPOINT \\
        [vae] [vae-decoder] [classifier] [own-unet] [export-weights]

Without phases it runs all of them in this order. Kill it at any time: it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rlsd.models.fashion import CHECKPOINT, CLASS_NAMES, data, own
from rlsd.models.fashion.loop import Recipe
from rlsd.models.fashion.networks import Prior, write_checkpoint
from rlsd.models.fashion.recipe import OWN_PHASES, OWN_RECIPES, PHASES, RECIPES, UNET_PHASES, average_of
from rlsd.models.fashion.train_classifier import new_classifier, train_classifier
from rlsd.models.fashion.train_prior import new_prior, train_unet
from rlsd.models.fashion.train_vae import scaling_of, train_decoder, train_vae, vae_for


def export(work: Path, out: Path, prior: Prior | None = None) -> None:
    """Write the averaged weights as a checkpoint in the layout of diffusers, fp16 safetensors."""
    vae = average_of(vae_for(data.ANY), work / "vae-decoder.pt")
    latents = torch.load(work / "latents.pt", weights_only=True)
    vae.register_to_config(scaling_factor=scaling_of(latents["mean"], latents["std"]))
    classifier = average_of(new_classifier(data.ANY, len(CLASS_NAMES)), work / "classifier-mild.pt")
    average = prior or average_of(new_prior(data.ANY, len(CLASS_NAMES)), work / f"{UNET_PHASES[-1]}.pt")
    write_checkpoint(out, vae, average, classifier)


def run_phase(phase: str, images: Tensor, labels: Tensor, work: Path, out: Path, recipes: Mapping[str, Recipe]) -> None:
    """One phase of the embedded prior's training; a usable snapshot follows each save of the noise predictor."""

    def snapshot(step: int, average: Prior) -> None:
        export(work, work / "snapshot", average)
        print(f"{phase}: snapshot of step {step} in {work / 'snapshot'}", flush=True)

    if phase == "vae":
        train_vae(images, work, recipes["vae"])
    elif phase == "vae-decoder":
        train_decoder(images, work, recipes["vae-decoder"])
    elif phase.startswith("classifier"):
        train_classifier(phase, images, labels, work, recipes[phase])
    elif phase in UNET_PHASES:
        train_unet(phase, images, labels, work, recipes[phase], on_save=snapshot)
    else:
        export(work, out)


def with_steps(recipes: Mapping[str, Recipe], words: str | None) -> dict[str, Recipe]:
    """The recipes with other numbers of steps: "N" for all, or "PHASE=N,...". ValueError."""
    changed = dict(recipes)
    for word in words.split(",") if words else ():
        phase, equals, number = word.rpartition("=")
        if not number.isdigit() or int(number) < 1 or (equals and phase not in recipes):
            raise ValueError(f"--steps {word!r} is not allowed: a number, or PHASE=N with one of {', '.join(recipes)}")
        for each in [phase] if equals else recipes:
            changed[each] = replace(changed[each], steps=int(number))
    return changed


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=f"any of {', '.join(PHASES)}; default: all")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--images", type=Path, help="your own images instead; sub-folders are classes")
    parser.add_argument("--size", type=int, choices=own.SIZES, default=32, help="for --images: side of the images")
    parser.add_argument("--gray", action="store_true", help="for --images: one channel, whatever the files have")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and cached latents")
    parser.add_argument("--out", type=Path, help="where export-weights writes; needed with --images")
    parser.add_argument("--steps", metavar="N|PHASE=N,...", help="other numbers of steps than the recipe's")
    parser.add_argument("--threads", type=int, default=2)
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser, args = parse(arguments)
    phases = (*OWN_PHASES, "export-weights") if args.images else PHASES
    unknown = [phase for phase in args.phases if phase not in phases]
    if unknown:
        parser.error(f"unknown phase {unknown[0]!r}: choose from {', '.join(phases)}")
    if args.images and not args.out:
        parser.error("--images needs --out, the folder for the checkpoint")
    torch.set_num_threads(args.threads)
    try:
        recipes = with_steps(OWN_RECIPES if args.images else RECIPES, args.steps)
        if args.images:
            pictures = own.load_images(args.images, args.size, gray=args.gray)
            own.train_own(pictures, args.phases or phases, args.work, args.out, recipes)
            return
    except ValueError as error:
        parser.error(str(error))
    args.work.mkdir(parents=True, exist_ok=True)
    images, labels = data.load(args.data, "train")
    for phase in args.phases or PHASES:
        run_phase(phase, images, labels, args.work, args.out or CHECKPOINT, recipes)


if __name__ == "__main__":
    main()
