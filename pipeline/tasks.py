"""The tasks: a forward operator of the bundle, how to make its parameters, and settings for each family of priors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from rlsd.pipeline import masks
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.presets import FAMILIES, Preset

Shapes = Mapping[str, tuple[int, ...]]
_DEFAULT = Preset(200, 0.07, 0.15, 0.4, 0.8, 4, 0)


@dataclass(frozen=True)
class Task:
    """What to reconstruct from.

    operator: its name in the bundle. parameter: the operator's parameter that the task makes, if any: `make` with
    its shape where it is the same for every item, `make_random` with (shape, seed, item) where it is drawn.
    pictorial: the measurement is a picture in [-1, 1].
    """

    name: str
    summary: str
    operator: str
    parameter: str | None = None
    make: Callable[[tuple[int, ...]], np.ndarray] | None = None
    make_random: Callable[[tuple[int, ...], int, int], np.ndarray] | None = None
    pictorial: bool = True

    def preset(self, family: str) -> Preset:
        """The settings for a family of priors (a name in presets.FAMILIES)."""
        return FAMILIES[family].get(self.name, _DEFAULT)

    def parameters(
        self, shapes: Shapes, seed: int, item: int, given: Mapping[str, np.ndarray], measured: bool
    ) -> dict[str, np.ndarray]:
        """The operator's parameters of one item: those given, the others made.

        A measurement was made with parameters that only its maker knows: where the task would have to draw one
        (or cannot make it at all), InputError says which must be given.
        """
        values = dict(given)
        for name, shape in shapes.items():
            if name in values:
                continue
            if name == self.parameter and self.make:
                values[name] = self.make(shape)
            elif name == self.parameter and self.make_random and not measured:
                values[name] = self.make_random(shape, seed, item)
            else:
                option = "--mask FILE" if name == "mask" else f"--param {name}=FILE"
                raise InputError(f"task {self.name} needs the operator's {name} {list(shape)}: give it with {option}")
        return values


def _inpainting(name: str, summary: str, make: Callable) -> Task:
    return Task(name, summary, "inpainting", "mask", make=make)


def _published(rows: tuple[int, int], columns: tuple[int, int]) -> Callable:
    """A rectangle of the paper: the first and last missing rows and columns of 512, scaled to the image."""
    spans = [(first / 512, (last + 1) / 512) for first, last in (rows, columns)]
    return partial(masks.missing_rectangle, rows=spans[0], columns=spans[1])


_ALL, _MIDDLE = (0.0, 1.0), (5 / 16, 11 / 16)

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        _inpainting("half", "left half missing", partial(masks.missing_rectangle, rows=_ALL, columns=(0, 0.5))),
        _inpainting(
            "half-bottom", "bottom half missing", partial(masks.missing_rectangle, rows=(0.5, 1), columns=_ALL)
        ),
        _inpainting(
            "box", "central box missing", partial(masks.missing_rectangle, rows=(0.25, 0.75), columns=(0.25, 0.75))
        ),
        _inpainting("half-face", "half of a centred face missing", _published((150, 449), (250, 449))),
        _inpainting("full-face", "a centred face missing", _published((150, 449), (150, 374))),
        _inpainting("small-box", "small box missing", _published((200, 299), (300, 399))),
        _inpainting(
            "small-visible",
            "only the middle visible (3/8)",
            partial(masks.visible_rectangle, rows=_MIDDLE, columns=_MIDDLE),
        ),
        Task("random", "80 % of the pixels missing", "inpainting", "mask", make_random=masks.missing_pixels),
        Task("freeform", "10 to 20 % missing, strokes", "inpainting", "mask", make_random=masks.missing_strokes),
        Task("sr4", "means of 4 x 4 pixels", "superres4"),
        Task("sr8", "means of 8 x 8 pixels", "superres8"),
        Task("sr4-bicubic", "reduced 4 x, bicubic", "bicubic4"),
        Task("sr8-bicubic", "reduced 8 x, bicubic", "bicubic8"),
        Task("gaussian-blur", "Gaussian blur", "gaussian_blur"),
        Task("motion-blur", "blur of a shaken camera", "motion_blur", "kernel", make_random=masks.motion_kernel),
        Task("phase-retrieval", "Fourier magnitude only", "phase_retrieval", pictorial=False),
        Task("hdr", "overexposed: clip(2x)", "hdr"),
    )
}


def find_task(name: str, operators: Mapping[str, object]) -> Task:
    """The task of that name, or a bare one for an operator of the bundle that no task covers.

    operators: those of the bundle, by name. InputError when there is none, or the bundle lacks its operator.
    """
    task = TASKS.get(name)
    if task is None and name in operators and name not in {task.operator for task in TASKS.values()}:
        return Task(name, "the bundle's own operator", name)
    if task is None:
        raise InputError(f"task {name!r} is not known: choose one of {', '.join(TASKS)}")
    if task.operator not in operators:
        raise InputError(
            f"task {name} needs the operator {task.operator}, which this bundle lacks: it has {', '.join(operators)}"
        )
    return task
