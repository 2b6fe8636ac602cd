"""The tasks: a forward operator of the bundle, how to make its parameters, and settings for each family of priors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from rlsd.pipeline import masks
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.presets import Preset, preset_of

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Maker:
    """Makes an operator's parameter: `fixed` of its shape, the same for all items, or `random` of shape, seed, item."""

    fixed: Callable[[tuple[int, ...]], np.ndarray] | None = None
    random: Callable[[tuple[int, ...], int, int], np.ndarray] | None = None


@dataclass(frozen=True)
class Task:
    """What to reconstruct from.

    operator: its name in the bundle. makers: how the task makes the operator's parameters, by name.
    pictorial: the measurement is a picture in [-1, 1]. channels: of the images it is for, None for any.
    pointwise: a pixel of the measurement is of that pixel of the image alone, and black stays black.
    """

    name: str
    summary: str
    operator: str
    makers: Mapping[str, Maker] = field(default_factory=dict)
    pictorial: bool = True
    channels: int | None = None
    pointwise: bool = False

    def preset(self, family: str, variant: str = "rlsd") -> Preset:
        """The settings for a family of priors (a name in presets.FAMILIES); a chain has those of its first part."""
        return preset_of(self.name.split("+")[0], family, variant)

    def parameters(
        self, shapes: Shapes, seed: int, item: int, given: Mapping[str, np.ndarray], measured: bool
    ) -> dict[str, np.ndarray]:
        """The operator's parameters of one item: those given, the others made.

        A measurement was made with parameters that only its maker knows: where the task would have to draw one
        (or cannot make it at all), InputError says which must be given.
        """
        values = dict(given)
        for name, shape in shapes.items():
            maker = self.makers.get(name, Maker())
            if name in values:
                continue
            if maker.fixed:
                values[name] = maker.fixed(shape)
            elif maker.random and not measured:
                values[name] = maker.random(shape, seed, item)
            else:
                option = "--mask FILE" if name == "mask" else f"--param {name}=FILE"
                raise InputError(f"task {self.name} needs the operator's {name} {list(shape)}: give it with {option}")
        return values


def _inpainting(name: str, summary: str, make: Callable) -> Task:
    return Task(name, summary, "inpainting", {"mask": Maker(fixed=make)}, pointwise=True)


def _drawn(name: str, summary: str, make: Callable) -> Task:
    return Task(name, summary, "inpainting", {"mask": Maker(random=make)}, pointwise=True)


def _published(rows: tuple[int, int], columns: tuple[int, int]) -> Callable:
    """A rectangle of the paper: the first and last missing rows and columns of 512, scaled to the image."""
    spans = [(first / 512, (last + 1) / 512) for first, last in (rows, columns)]
    return partial(masks.missing_rectangle, rows=spans[0], columns=spans[1])


_SHAKEN = {"kernel": Maker(random=masks.motion_kernel)}
_FOUR = partial(np.full, fill_value=4.0)
_TENTH = Maker(fixed=partial(masks.jpeg_tables, quality=10))
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
        _drawn("random", "80 % of the pixels missing", masks.missing_pixels),
        _drawn("freeform", "10 to 20 % missing, strokes", masks.missing_strokes),
        Task("sr4", "means of 4 x 4 pixels", "superres4"),
        Task("sr8", "means of 8 x 8 pixels", "superres8"),
        Task("sr4-bicubic", "reduced 4 x, bicubic", "bicubic4"),
        Task("sr8-bicubic", "reduced 8 x, bicubic", "bicubic8"),
        Task("gaussian-blur", "Gaussian blur", "gaussian_blur"),
        Task("motion-blur", "blur of a shaken camera", "motion_blur", _SHAKEN),
        Task("nonlinear-blur", "the same in linear light", "nonlinear_blur", _SHAKEN),
        Task("phase-retrieval", "Fourier magnitude only", "phase_retrieval", pictorial=False),
        Task("hdr", "overexposed: clip(2x)", "hdr", pointwise=True),
        Task("colour", "gray, of a colour image", "luminance", channels=3, pointwise=True),
        Task("jpeg", "JPEG of quality 10, 4:4:4", "jpeg", {"tables": _TENTH}),
        Task("quantise", "4 levels (2 bits)", "quantisation", {"levels": Maker(fixed=_FOUR)}, pointwise=True),
    )
}


def find_task(name: str, operators: Mapping[str, object]) -> Task:
    """The task of that name, a chain of two as "first+second", or a bare one for an operator that no task covers.

    operators: those of the bundle, by name. InputError when there is none, or the bundle lacks its operator.
    """
    if name not in TASKS and name in operators and name not in {task.operator for task in TASKS.values()}:
        return Task(name, "the bundle's own operator", name)
    task = named_task(name)
    if task.operator not in operators:
        only = f", and is for images of {task.channels} channels" if task.channels else ""
        there = ", ".join(operators)
        raise InputError(
            f"task {name} needs the operator {task.operator}, which this bundle lacks{only}: it has {there}"
        )
    return task


def named_task(name: str) -> Task:
    """The task of that name, whatever a bundle has. InputError when there is none."""
    parts = name.split("+")
    if len(parts) == 2 and all(part in TASKS for part in parts):
        return _chain(*(TASKS[part] for part in parts))
    if name not in TASKS:
        raise InputError(f"task {name!r} is not known: choose one of {', '.join(TASKS)}, or two of them as sr4+jpeg")
    return TASKS[name]


def _apart(maker: Maker) -> Maker:
    """Draws other numbers than the same maker in front of it: random+random hides pixels that the first left."""
    random = maker.random
    return maker if random is None else Maker(random=lambda shape, seed, item: random(shape, seed ^ 1 << 63, item))


def _chain(first: Task, second: Task) -> Task:
    """The second applied to what the first measures; parameters are called first_NAME and second_NAME."""
    makers = {f"first_{word}": maker for word, maker in first.makers.items()}
    makers |= {f"second_{word}": _apart(maker) for word, maker in second.makers.items()}
    summary = f"{first.summary}; then {second.summary}"
    operator = f"{first.operator}-{second.operator}"
    pointwise = first.pointwise and second.pointwise
    return Task(f"{first.name}+{second.name}", summary, operator, makers, second.pictorial, first.channels, pointwise)
