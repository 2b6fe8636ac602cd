"""The embedded default prior: a small latent diffusion model of Fashion-MNIST garments.

`PATH` is this folder. `PATH / "checkpoint"` holds the weights in the layout of diffusers. Importing this
package needs nothing but Python; torch is imported by the functions that need it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlsd.models.fashion.classifier import Classifier

PATH = Path(__file__).resolve().parent
CHECKPOINT = PATH / "checkpoint"

CLASS_NAMES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)


def load_classifier(path: Path | str = CHECKPOINT / "features") -> Classifier:
    """Load the garment classifier in eval mode, in fp32, from a folder with config.json and model.safetensors.

    It maps images [B, 1, H, W] in [-1, 1] to logits [B, 10]; `features(x)` gives [B, 128].
    """
    from rlsd.models.fashion.classifier import Classifier

    return Classifier.from_pretrained(path)
