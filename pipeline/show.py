"""Tables for people: machine, bundle, tasks, results."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlsd.engine import Engine
from rlsd.pipeline.items import frame_of
from rlsd.pipeline.machine import libraries, machine, versions
from rlsd.pipeline.model import shipped
from rlsd.pipeline.plan import Plan
from rlsd.pipeline.presets import FAMILIES, VARIANTS, family_of
from rlsd.pipeline.tasks import TASKS


def facts(title: str, values: Mapping[str, str]) -> Table:
    """A table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(name, Text(value))  # a path may hold what looks like markup
    return table


def show_machine(console: Console) -> None:
    """This machine, versions, libraries, shipped priors."""
    priors = {name: str(path) for name, path in shipped().items()} or {"none": "built by `make bundle`"}
    for title, values in (
        ("Machine", machine()),
        ("Versions", versions()),
        ("Libraries", libraries()),
        ("Shipped priors", priors),
    ):
        console.print(facts(title, values))
        console.print()


def show_plan(plan: Plan, particles: int, memory: float, console: Console) -> None:
    """A bundle's memory on a GPU of so many GiB, with so many particles in flight."""
    size = lambda count: "not known" if count is None else f"{count / 1e6:,.1f} MB"  # noqa: E731
    console.print(
        facts(
            "Memory on a GPU",
            {
                "weights, once": size(plan.weights),
                "state of a particle": size(plan.particle),
                "inputs of a job": size(plan.job),
            },
        )
    )
    table = Table("batch", "a seat's tensors", "in graphs, once", title="Batches", title_justify="left", box=SIMPLE)
    for seat in plan.seats:
        table.add_row(str(seat.batch), size(seat.tensors), size(seat.graphs))
    console.print(table)
    total, most = plan.total(particles), plan.most_particles(int(memory * 2**30))
    console.print(
        f"{particles} particles of one job: {total / 2**30:.2f} of {memory:g} GiB. At most {most} keep all their "
        "activations; beyond, chunks take turns and decode twice. The workspaces of ONNX Runtime's libraries and the "
        "driver's context (about 0.5 GiB) come on top."
    )


def show_bundle(engine: Engine, console: Console) -> None:
    """An opened bundle: shapes, operators, graphs with their sizes and checks."""
    described = engine.describe()
    console.print(facts(f"Bundle {engine.name}", bundle_facts(engine, described)))
    console.print()
    table = Table("operator", "measurement", "parameters", "tasks", title="Operators", title_justify="left", box=SIMPLE)
    for name, operator in engine.operators.items():
        parameters = ", ".join(f"{key} {shape(value)}" for key, value in operator.params.items())
        tasks = ", ".join(task.name for task in TASKS.values() if task.operator == name)
        table.add_row(name, shape(operator.measurement_shape), parameters, tasks)
    console.print(table)
    console.print(graph_table(described))
    console.print("Every file has the size and SHA-256 that the manifest says.", style="dim")


def bundle_facts(engine: Engine, described: Mapping[str, list[str]]) -> dict[str, str]:
    """What the bundle holds, in words."""
    frame = frame_of(engine)
    sizes = [int(line.split()[1]) for line in described.get("file", [])]
    values = {
        "folder": str(Path(engine.path).resolve()),
        "made by": first(described, "producer"),
        "target": f"{first(described, 'target')}, {first(described, 'precision')}",
        "image": f"{shape(engine.image_shape)}, of which {frame.content[0]} x {frame.content[1]} are content"
        if frame.content != engine.image_shape[1:]
        else shape(engine.image_shape),
        "latent": shape(engine.latent_shape),
        "timesteps": str(engine.timesteps),
        "context": shape(engine.context_shape) if engine.context_shape else "none",
        "classes": ", ".join(engine.contexts) or "none",
        "features": f"{engine.feature_dim} values" if engine.feature_dim else "none: repulsion acts on latents",
        "size on disk": f"{sum(sizes) / 2**20:.1f} MiB in {len(sizes)} files",
        "memory a particle": f"{engine.bytes_per_particle / 2**20:.2f} MiB",
        "ONNX Runtime": first(described, "onnxruntime"),
    }
    return {name: value for name, value in values.items() if value}


def graph_table(described: Mapping[str, list[str]]) -> Table:
    """Each graph: the batches it was made for, its size, its largest error against float64 at export."""
    sizes = {line.split()[0]: int(line.split()[1]) for line in described.get("file", [])}
    checks = {tuple(line.split()[:-1]): float(line.split()[-1]) for line in described.get("check", [])}
    graphs: dict[str, list[tuple[int, int, float | None]]] = {}
    for line in described.get("graph", []):
        name, batch, file = line.split()
        error = checks.get((name, batch), checks.get((name,)))
        graphs.setdefault(name, []).append((int(batch), sizes.get(file, 0), error))
    table = Table(
        "graph", "batches", "KiB", "error at export", title="Graphs, weights apart", title_justify="left", box=SIMPLE
    )
    for name, made in graphs.items():
        errors = [error for _, _, error in made if error is not None]
        table.add_row(
            name,
            ", ".join(str(batch) for batch, _, _ in made),
            ", ".join(f"{size / 1024:.1f}" for _, size, _ in made),
            f"{max(errors):.1e}" if errors else "not stated",
        )
    return table


def show_tasks(console: Console, engine: Engine | None) -> None:
    """All tasks with their settings; with an engine those of its family, and which of them its bundle can do."""
    table = Table(title="Tasks", title_justify="left", box=SIMPLE)
    for head in ("task", "measured", "operator", *(["works"] if engine else [])):
        table.add_column(head, no_wrap=True)
    for task in TASKS.values():
        works = ["yes" if task.operator in engine.operators else "no"] if engine else []
        table.add_row(task.name, task.summary, task.operator, *works)
    console.print(table)
    for family in [family_of(engine.image_shape)] if engine else FAMILIES:
        console.print(settings_table(family))
        for variant in (variant for name, variant in VARIANTS if name == family):
            console.print(settings_table(family, variant))


def settings_table(family: str, variant: str = "") -> Table:
    """The settings of every task for one family of priors, or those that a variant has of its own."""
    title = f"Settings for {family}" + f", --variant {variant} (other tasks: as above)" * bool(variant)
    table = Table(title=title, title_justify="left", box=SIMPLE, collapse_padding=True)  # for 80 columns
    table.add_column("task", no_wrap=True)
    for head in ("steps", "rho", "lambda", "lr_x", "lr_z", "N", "gamma", "sigma", "adam_eps"):
        table.add_column(head, justify="right")
    for name in VARIANTS[family, variant] if variant else TASKS:
        table.add_row(name, *(f"{value:g}" for value in TASKS[name].preset(family, variant)))
    return table


def show_results(report: Mapping[str, Any], console: Console) -> None:
    """The items of a report with their main figures."""
    table = Table("item", "PSNR", "best", "of mean", "SSIM", "similarity", "deviation", box=None, pad_edge=False)
    for item in report["items"]:
        psnr, ssim = item.get("psnr") or {}, item.get("ssim") or {}
        values = (
            (psnr.get("mean"), ".2f"), (psnr.get("best"), ".2f"), (psnr.get("of_mean_image"), ".2f"),
            (ssim.get("mean"), ".3f"), (item["feature_similarity"], ".3f"), (item["deviation"], ".3f"),
        )  # fmt: skip
        table.add_row(item["name"], *("" if value is None else format(value, form) for value, form in values))
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    if report["items"]:
        console.print(table)
    time = report["time"]
    rate = time["particle_steps_per_second"]
    console.print(
        f"{time['particle_steps']:,} particle-steps in {time['seconds']:.1f} s"
        + (f", {rate:,.0f} a second on {time['where']}" if rate else ""),
        highlight=False,
    )


def first(described: Mapping[str, list[str]], key: str) -> str:
    """The first value of a fact, "" without one."""
    return (described.get(key) or [""])[0]


def shape(values: tuple[int, ...]) -> str:
    """(1, 28, 28) as "1 x 28 x 28"."""
    return " x ".join(map(str, values)) if prod(values) else "none"
