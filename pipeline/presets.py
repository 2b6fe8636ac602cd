"""Settings of the tasks for each family of priors.

`sd512` are the published settings for Stable Diffusion 2.1 at 512 x 512 (arXiv 2406.16683); a task of ours that the
paper does not have takes those of its nearest relative: box and visible part of the half face, Gaussian and nonlinear
blur of motion blur, JPEG of super-resolution, colourisation and quantisation of HDR. Their gamma belongs to the
authors' features: DINO of the decoder's output as it is, at full size and in [-1, 1] (in the variant without images, of
the noisy latents decoded). Ours are of what DINO was trained on, resized and normalised, so that gamma may have to be
found again. `fashion` are ours for the embedded prior.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Preset(NamedTuple):
    """One task's settings, in the symbols of the paper. sigma: standard deviation of the measurement's noise.

    adam_eps: 1e-8 for each of the particles that the settings were found with where means are over all of them, as in
    the published runs; ours are found with 4e-8.
    """

    steps: int
    rho: float
    lambda_: float
    lr_x: float
    lr_z: float
    particles: int
    gamma: float
    sigma: float = 0.001
    adam_eps: float = 4e-8


_OTHER = Preset(200, 0.07, 0.15, 0.4, 0.8, 4, 0)  # what a user's own task begins with
_HALF = Preset(999, 0.07, 0.15, 0.4, 0.8, 4, 50)
_FREE = Preset(500, 0.1, 0.15, 0.4, 1.0, 4, 25)
_SMALL = Preset(999, 0.08, 0.009, 0.3, 0.3, 2, 0, adam_eps=2e-8)
_RANDOM = Preset(999, 0.08, 0.009, 0.4, 0.8, 2, 0, adam_eps=2e-8)
_SUPERRES = Preset(999, 0.05, 0.01, 0.4, 0.6, 2, 0, adam_eps=2e-8)
_DEBLUR = Preset(999, 0.01, 0.007, 0.4, 0.3, 4, 0)
_PHASE = Preset(999, 0.07, 0.02, 0.6, 0.6, 6, 30, adam_eps=6e-8)
_HDR = Preset(999, 0.2, 0.008, 0.1, 0.2, 4, 30)

SD512: Mapping[str, Preset] = {
    "half": _HALF, "half-bottom": _HALF, "half-face": _HALF, "full-face": _HALF, "box": _HALF,
    "small-visible": _HALF, "small-box": _SMALL, "random": _RANDOM, "freeform": _FREE,
    "sr4": _SUPERRES, "sr8": _SUPERRES, "sr4-bicubic": _SUPERRES, "sr8-bicubic": _SUPERRES,
    "gaussian-blur": _DEBLUR, "motion-blur": _DEBLUR, "nonlinear-blur": _DEBLUR, "phase-retrieval": _PHASE,
    "hdr": _HDR, "colour": _HDR, "jpeg": _SUPERRES, "quantise": _HDR,
}  # fmt: skip

# Those published for the variant without images of its own (rho and lr_x play no part there).
_BARE_HALF = _HALF._replace(steps=500, lambda_=0.1, lr_z=0.6, gamma=30)
_BARE_SUPERRES = _SUPERRES._replace(steps=500, lambda_=0.1, lr_z=0.6, gamma=35)

SD512_NONAUG: Mapping[str, Preset] = {
    **dict.fromkeys(("half", "half-bottom", "half-face", "full-face", "box", "small-visible"), _BARE_HALF),
    **dict.fromkeys(("sr4", "sr8", "sr4-bicubic", "sr8-bicubic", "jpeg"), _BARE_SUPERRES),
}

# Found by rlsd.bench.tune on images of the training split (bench/results/tune-fashion.jsonl), but for colour, which the
# gray prior cannot do and which has those of half without repulsion. Where the operator rounds (jpeg, quantise), a
# slower x than its GRID has (--grid lr_x=0.03,0.3 and lr_x=0.05,0.1) brings the residual below 3 sigma with repulsion
# as well, or at all; phase retrieval wants a faster one (--grid lr_x=0.1,0.3,0.6). Two have another repulsion than the
# search chose: HDR none, as the search chose on four other images (--first 50100), where it costs a decibel of the best
# particle; and small-visible has half's, since PSNR against one truth does not tell what repulsion is for where many
# garments are right (QUALITY.md does).
_F_HALF = Preset(200, 0.1, 0.15, 0.1, 0.05, 4, 5, 0.01)
_F_SURE = _F_HALF._replace(gamma=0)
_F_HDR = _F_SURE._replace(lambda_=0.5)
_F_TINY = _F_SURE._replace(lambda_=0.05)
_F_SMALL = Preset(200, 0.1, 0.15, 0.1, 0.15, 4, 0, 0.01)
_F_RANDOM = _F_SMALL._replace(lambda_=0.05)
_F_BLUR = _F_RANDOM._replace(gamma=5)
_F_SHAKEN = _F_RANDOM._replace(gamma=20)
_F_EIGHTH = _F_SMALL._replace(gamma=20)
_F_JPEG = _F_SMALL._replace(lambda_=0.5, lr_x=0.03, gamma=5)
_F_LEVELS = _F_SMALL._replace(lr_x=0.05)
_F_PHASE = Preset(200, 0.1, 0.5, 0.6, 0.15, 6, 0, 0.01)

FASHION: Mapping[str, Preset] = {
    "half": _F_HALF, "half-bottom": _F_HALF, "half-face": _F_HALF, "full-face": _F_SURE, "box": _F_SURE,
    "small-visible": _F_HALF, "small-box": _F_TINY, "random": _F_RANDOM, "freeform": _F_BLUR,
    "sr4": _F_SMALL, "sr8": _F_EIGHTH,
    "sr4-bicubic": _F_SMALL._replace(gamma=5), "sr8-bicubic": _F_EIGHTH._replace(lambda_=0.5),
    "gaussian-blur": _F_BLUR, "motion-blur": _F_SHAKEN, "nonlinear-blur": _F_SHAKEN, "phase-retrieval": _F_PHASE,
    "hdr": _F_HDR, "colour": _F_SURE, "jpeg": _F_JPEG, "quantise": _F_LEVELS,
}  # fmt: skip

FAMILIES: Mapping[str, Mapping[str, Preset]] = {"fashion": FASHION, "sd512": SD512}
VARIANTS: Mapping[tuple[str, str], Mapping[str, Preset]] = {("sd512", "rlsd-nonaug"): SD512_NONAUG}


def preset_of(task: str, family: str, variant: str = "rlsd") -> Preset:
    """A task's settings for a family of priors, a variant's own where there are some."""
    return VARIANTS.get((family, variant), {}).get(task) or FAMILIES[family].get(task, _OTHER)


def family_of(image: tuple[int, ...]) -> str:
    """Which settings suit a prior for images [C, H, W]: `fashion` up to 64 pixels a side, else `sd512`."""
    return "fashion" if min(image[1:]) <= 64 else "sd512"
