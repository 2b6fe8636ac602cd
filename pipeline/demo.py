"""`rlsd demo`: a few shipped test images on three tasks that have many answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from rlsd.engine import Engine
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.grid import stack
from rlsd.pipeline.items import Plan, Source
from rlsd.pipeline.presets import family_of
from rlsd.pipeline.settings import settings_for
from rlsd.pipeline.tasks import find_task

MODEL = "fashion"
TASKS = ("half", "sr4", "phase-retrieval")
IMAGES = ("0001-pullover", "0009-sneaker", "0030-bag")


def demo_plans(engine: Engine, folder: Path, particles: int | None, steps: int | None, seed: int) -> list[Plan]:
    """The plans of the demo: IMAGES of `folder` on TASKS, with the presets unless particles or steps are given."""
    plans = []
    for name in TASKS:
        task = find_task(name, engine.operators)
        changes = {"particles": particles, "steps": steps, "seed": seed}
        paths = [folder / f"{image}.png" for image in IMAGES]
        for path in paths:
            if not path.is_file():
                raise InputError(f"test image {path} is missing: the installation is not complete")
        sources = [Source(path, index, f"{name}/{path.stem}") for index, path in enumerate(paths)]
        plans.append(Plan(task, settings_for(task, family_of(engine.image_shape), changes), sources))
    return plans


def overview(out: Path, names: Sequence[str]) -> None:
    """Stacks the grids of the named items in one picture: DIR/overview.png."""
    if names:
        temporary = out / ".overview.png"
        stack([Image.open(out / name / "grid.png") for name in names]).save(temporary)
        temporary.replace(out / "overview.png")
