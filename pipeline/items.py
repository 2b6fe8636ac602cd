"""From files to items: one measurement each, with the truth behind it where that is known."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rlsd.engine import Engine, Job, normal
from rlsd.engine.native import STREAM_USER
from rlsd.pipeline.errors import InputError, about
from rlsd.pipeline.fit import Frame, fit_image, read_measurement, read_parameter
from rlsd.pipeline.images import read_image, sha256
from rlsd.pipeline.metrics import data_mask
from rlsd.pipeline.prompts import prompt_context
from rlsd.pipeline.settings import Settings
from rlsd.pipeline.tasks import Task

Read = tuple[np.ndarray, dict[str, np.ndarray], tuple[str, ...]]  # an image or measurement, parameters, notes


@dataclass(frozen=True)
class Source:
    """A file to work on. index addresses the item's random numbers; name is its folder in the output."""

    path: Path
    index: int
    name: str


@dataclass(frozen=True, eq=False)
class Item:
    """One measurement y and what it takes to reconstruct from it. truth: the clean image [C, H, W], if known."""

    index: int
    name: str
    task: Task
    settings: Settings
    y: np.ndarray
    operator_params: Mapping[str, np.ndarray] = field(default_factory=dict)
    truth: np.ndarray | None = None
    context: np.ndarray | None = None
    source: Path | None = None
    digest: str | None = None
    notes: tuple[str, ...] = ()

    def job(self) -> Job:
        """The item as the engine takes it."""
        return Job(
            y=self.y,
            operator=self.task.operator,
            operator_params=self.operator_params,
            particles=self.settings.particles,
            seed=self.settings.seed,
            item=self.index,
            context=self.context,
            params=self.settings.params,
            trace=True,
        )


@dataclass(frozen=True)
class Plan:
    """A task with its settings, applied to sources. given: the operator's parameters as files, by name."""

    task: Task
    settings: Settings
    sources: Sequence[Source]
    measured: bool = False
    given: Mapping[str, Sequence[Path]] = field(default_factory=dict)

    def particle_steps(self) -> int:
        """All the work that the plan asks for."""
        return len(self.sources) * self.settings.particles * (self.settings.params.steps - 1)


def frame_of(engine: Engine) -> Frame:
    """The bundle's image shape and padding (its fact `info image_padding L T R B`, none without)."""
    return frame_in(engine.image_shape, engine.describe().get("info", []))


def frame_in(image: tuple[int, ...], info: Sequence[str]) -> Frame:
    """The same from the facts `info` of a bundle's manifest."""
    for line in info:
        key, *values = line.split()
        if key == "image_padding":
            left, top, right, bottom = map(int, values)
            return Frame(image, (left, top, right, bottom))
    return Frame(image)


def context_of(engine: Engine, label: str | None) -> np.ndarray | None:
    """The named context, None for None. InputError when the bundle has none of that name."""
    if label is None:
        return None
    if label not in engine.contexts:
        known = ", ".join(engine.contexts) or "none"
        raise InputError(f"class {label!r} is not known to the prior {engine.name}; its classes: {known}")
    return engine.context(label)


def conditioning(engine: Engine, settings: Settings) -> np.ndarray | None:
    """The context that the settings name or describe, None for the null context. InputError."""
    if settings.prompt is not None:
        return prompt_context(engine, settings.prompt, settings.text_encoder)
    return context_of(engine, settings.label)


def name_sources(paths: Sequence[Path]) -> list[Source]:
    """The files in their order, named after their stems; a stem met before gets a number."""
    sources: list[Source] = []
    counts: dict[str, int] = {}  # of each stem in lower case, the last number that was tried
    taken = {"report.json", "report.html", "overview.png", "calibration.png", "items.csv", "particles.csv"}
    for index, path in enumerate(paths):
        stem = re.sub(r"[^\w.-]+", "-", path.stem).strip(".-") or "item"
        count = counts.get(stem.lower(), 1)
        name = stem if count == 1 else f"{stem}-{count}"
        while name.lower() in taken:
            count += 1
            name = f"{stem}-{count}"
        counts[stem.lower()] = count
        taken.add(name.lower())
        sources.append(Source(path, index, name))
    return sources


def check_plan(engine: Engine, plan: Plan) -> None:
    """Reads every file of the plan once, keeping nothing, so that what is wrong shows before any work is done."""
    shapes = engine.operators[plan.task.operator].params
    for name, files in plan.given.items():
        if name not in shapes:
            allowed = ", ".join(shapes) or "none"
            raise InputError(f"operator {plan.task.operator} has no parameter {name!r}; allowed is {allowed}")
        if len(files) not in (1, len(plan.sources)):
            raise InputError(f"{name} has {len(files)} files for {len(plan.sources)} inputs; give one, or one for each")
    for source in plan.sources:
        read_source(engine, plan, source)


def load_items(engine: Engine, plan: Plan, failed: list[dict[str, str]] | None = None) -> Iterator[Item]:
    """The plan's items one after another: files read, measurements simulated unless they were measured.

    failed: gets the name and the error of each source that cannot be read, which is left out; without it InputError
    and OSError are raised.
    """
    context = conditioning(engine, plan.settings)
    for source in plan.sources:
        try:
            item = make_item(engine, plan, source, read_source(engine, plan, source), sha256(source.path), context)
        except (InputError, OSError) as error:
            if failed is None:
                raise
            text = str(error) if isinstance(error, InputError) else f"{source.path} cannot be read: {error.strerror}"
            failed.append({"name": source.name, "error": text})
            continue
        yield item


def make_item(engine: Engine, plan: Plan, source: Source, read: Read, digest: str, context: np.ndarray | None) -> Item:
    """The item of what read_source found: the measurement simulated, unless it was measured."""
    image, params, notes = read
    y = image if plan.measured else simulate(engine, plan.task, image, params, plan.settings, source.index)
    return Item(
        index=source.index,
        name=source.name,
        task=plan.task,
        settings=plan.settings,
        y=observed(y, params),
        operator_params=params,
        truth=None if plan.measured else image,
        context=context,
        source=source.path,
        digest=digest,
        notes=notes,
    )


def read_source(engine: Engine, plan: Plan, source: Source) -> Read:
    """One source's image (or measurement), its operator's parameters, and notes. InputError."""
    frame, operator = frame_of(engine), engine.operators[plan.task.operator]
    check_kernels(engine, plan.task, plan.given)
    given = {
        name: read_parameter(files[source.index if len(files) > 1 else 0], name, operator.params[name], frame)
        for name, files in plan.given.items()
    }
    params = plan.task.parameters(operator.params, plan.settings.seed, source.index, given, plan.measured)
    if plan.measured:
        notes: list[str] = []
        task, shape = plan.task, operator.measurement_shape
        y = read_measurement(source.path, shape, frame, task.pictorial, notes, pointwise=task.pointwise)
        return y, params, tuple(notes)
    try:
        picture = fit_image(read_image(source.path), frame)
    except InputError as error:
        raise about(source.path, error) from None
    return picture.values, params, picture.notes


def check_kernels(engine: Engine, task: Task, given: Collection[str]) -> None:
    """InputError where a bundle made by rlsd 0.1 would take a blur's kernel turned by 180 degrees."""
    blurs = {"motion_blur", "nonlinear_blur"} & set(task.operator.split("-"))
    made = engine.describe().get("producer", [""])[0]
    if blurs and made.startswith("rlsd 0.1.") and any(name.endswith("kernel") for name in given):
        raise InputError(
            f"the bundle was made by {made}, whose blurs take kernels turned by 180 degrees: export it anew to give one"
        )


def simulate(
    engine: Engine, task: Task, image: np.ndarray, params: Mapping[str, np.ndarray], settings: Settings, index: int
) -> np.ndarray:
    """y = f(image) + sigma * noise, drawn once an item from the engine's own generator."""
    y = engine.measure(task.operator, image[None], **{name: value[None] for name, value in params.items()})[0]
    noise = normal(settings.seed, index, 0, STREAM_USER, y.size).reshape(y.shape)
    return (y + settings.sigma * noise).astype(np.float32)


def observed(y: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
    """y with 0 where a mask says that nothing was observed: whatever stands there is no measurement."""
    mask = data_mask(y, params)
    return y if mask is None else y * mask
