"""What each command of `rlsd` does, from options to plans; the work is done elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rlsd.pipeline import batch as batches
from rlsd.pipeline import demo as demo_run
from rlsd.pipeline import extension, show, tuning
from rlsd.pipeline import options as o
from rlsd.pipeline.batch_list import own_columns
from rlsd.pipeline.batch_work import Work
from rlsd.pipeline.census import show_census
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.items import Plan, name_sources
from rlsd.pipeline.lpips import load_lpips
from rlsd.pipeline.model import find_bundle, open_model
from rlsd.pipeline.plan import read_plan
from rlsd.pipeline.presets import family_of
from rlsd.pipeline.run import Finished, run_plans
from rlsd.pipeline.settings import settings_for
from rlsd.pipeline.tasks import Task, find_task

SETTINGS = (
    "particles", "seed", "sigma", "label", "steps", "gamma", "repulsion_until", "repulsion", "rho", "lambda_", "lr_x",
    "lr_z", "variant", "guidance", "prompt", "text_encoder",
)  # fmt: skip
MOST_MEMORY = 4096  # GiB of a GPU that `rlsd info --plan` counts with


def reconstruct(
    model: o.Model,
    input: o.Inputs,
    out: o.Out,
    task: o.TaskName = None,
    operator: o.Operator = None,
    overwrite: o.Overwrite = False,
    measured: o.Measured = False,
    sigma: o.Sigma = None,
    mask: o.Mask = None,
    param: o.Parameter = None,
    particles: o.Particles = None,
    steps: o.Steps = None,
    gamma: o.Gamma = None,
    repulsion_until: o.RepulsionUntil = None,
    repulsion: o.Repulsion = None,
    rho: o.Rho = None,
    lambda_: o.Lambda = None,
    lr_x: o.LrX = None,
    lr_z: o.LrZ = None,
    variant: o.Variant = None,
    label: o.Label = None,
    prompt: o.Prompt = None,
    text_encoder: o.TextEncoder = None,
    guidance: o.Guidance = None,
    lpips: o.Lpips = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    threads: o.Threads = 0,
    distributed: o.Distributed = False,
    snapshots: o.Snapshots = None,
    snapshot_steps: o.SnapshotSteps = None,
    timeout: o.Timeout = None,
) -> None:
    """Reconstruct images from files: N diverse answers for each.

    Inputs are clean images, of which a measurement is simulated; or, with --measured, measurements. Each input gets
    a folder in --out with its particles, their mean and deviation, and a grid picture; report.html shows them all.

    Example: rlsd reconstruct -m fashion -t half -i photos/*.png -o results -n 8
    """
    changes = changed_settings(locals())
    if not distributed:
        _refuse_for_one({"snapshots": snapshots, "snapshot-steps": snapshot_steps, "timeout": timeout})
    distance = load_lpips(lpips) if lpips else None
    bundle, chosen = with_operator(find_bundle(model), task, operator)
    group = None
    if distributed:
        group, device, threads = join_group(bundle, device, threads, o.TIMEOUT if timeout is None else timeout)
    with group or nullcontext(), open_model(str(bundle), device=device, threads=threads) as engine:
        chosen = chosen or find_task(task or "", engine.operators)
        settings = settings_for(chosen, family_of(engine.image_shape), changes)
        plan = Plan(chosen, settings, name_sources(input), measured, parameter_files(mask, param))
        options: dict[str, Any] = {"overwrite": overwrite, "console": Console(stderr=True), "lpips": distance}
        if group is None:
            announce(run_plans(engine, [plan], out, **options))
        else:
            from rlsd.pipeline.distributed import run_together

            every = o.SNAPSHOT_STEPS if snapshot_steps is None else snapshot_steps
            options |= {"snapshots": snapshots, "every": every}
            if finished := run_together(engine, plan, out, group, **options):
                announce(finished)


def changed_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a command's options that are settings of the algorithm or the measurement; None: as the task has it."""
    changes = {name: options[name] for name in SETTINGS}
    if options["measured"] and options["sigma"] is None:
        changes["sigma"] = 0.0  # not known
    return changes


def _refuse_for_one(options: Mapping[str, object]) -> None:
    """InputError for an option that only several processes have, lest it be ignored without a word."""
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name} is {value}, which is for several processes: --distributed")


def join_group(bundle: Path, device: str | None, threads: int, timeout: float) -> tuple[Any, str | None, int]:
    """The processes of torchrun, and this one's device and threads. InputError without torch, or if started alone."""
    try:
        from rlsd.pipeline import distributed
    except ModuleNotFoundError as error:
        raise InputError(f"--distributed needs {error.name}, which is not installed: pip install torch") from None
    device, threads = distributed.place(bundle, device, threads)
    return distributed.Group(timeout, gpu=device != "cpu"), device, threads


def batch(
    model: o.Model,
    input: o.BatchInputs,
    out: o.BatchOut,
    task: o.TaskName = None,
    operator: o.Operator = None,
    workers: o.Workers = 1,
    ray: o.Ray = None,
    snapshot_every: o.SnapshotEvery = 60.0,
    pictures: o.Pictures = False,
    root: o.Root = None,
    metrics: o.Metrics = None,
    log: o.Log = None,
    measured: o.Measured = False,
    sigma: o.Sigma = None,
    mask: o.BatchMask = None,
    param: o.Parameter = None,
    particles: o.Particles = None,
    steps: o.Steps = None,
    gamma: o.Gamma = None,
    repulsion_until: o.RepulsionUntil = None,
    repulsion: o.Repulsion = None,
    rho: o.Rho = None,
    lambda_: o.Lambda = None,
    lr_x: o.LrX = None,
    lr_z: o.LrZ = None,
    variant: o.Variant = None,
    label: o.Label = None,
    prompt: o.Prompt = None,
    text_encoder: o.TextEncoder = None,
    guidance: o.Guidance = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    threads: o.Threads = 0,
) -> None:
    """Reconstruct any number of images into a folder, surviving anything.

    Killed at any point and started again with the same command it goes on, and its results are the same bytes. A bad
    item is reported in failures.jsonl and tried again the next time; the exit code is then 1. See docs/batch.md.

    Example: rlsd batch -m fashion -t half -i photos -o results -n 8 --workers 2
    """
    changes = changed_settings(locals()) | {"each_labelled": "class" in own_columns(input)}
    bundle, own = with_operator(find_bundle(model), task, operator)
    facts = batches.facts_of(bundle)
    chosen = own or find_task(task or "", facts.operators)
    settings = settings_for(chosen, family_of(facts.frame.image), changes)
    work = Work(
        str(bundle), chosen.name, settings, str(out), own is not None, measured,
        _one_each(parameter_files(mask, param)), None, threads, snapshot_every, pictures=pictures,
    )  # fmt: skip
    devices = [word.strip() for word in device.split(",")] if device else []
    console = Console(stderr=True)
    done = batches.run_batch(batches.Batch(work, input, root, workers, devices, log, metrics, ray), console)
    typer.echo(f"{done.items - done.failed:,} of {done.items:,} items done, {done.done:,} by this run, in {out}")
    if done.failed:
        typer.echo(f"rlsd: {done.failed:,} of {done.items:,} items failed: see {out / 'failures.jsonl'}", err=True)
        raise typer.Exit(1)


def _one_each(files: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """Parameters that are the same for all items. InputError where one has several files."""
    for name, paths in files.items():
        if len(paths) > 1:
            raise InputError(f"{name} has {len(paths)} files; a manifest's column {name} gives each item its own")
    return {name: str(paths[0]) for name, paths in files.items()}


def with_operator(bundle: Path, task: str | None, operator: str | None) -> tuple[Path, Task | None]:
    """The bundle, extended if it lacks what --task or --operator names; and the task, where --operator gives it."""
    if (task is None) == (operator is None):
        raise InputError("task and operator are two ways to say one thing: give either --task or --operator")
    if operator is not None:
        return extension.for_operator(bundle, operator)
    return extension.for_task(bundle, task or ""), None


def parameter_files(masks: Sequence[Path] | None, parameters: Sequence[str] | None) -> dict[str, list[Path]]:
    """--mask FILE and --param NAME=FILE as name -> files. InputError for a word without `=`."""
    files: dict[str, list[Path]] = {"mask": list(masks)} if masks else {}
    for word in parameters or ():
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise InputError(f"--param {word!r} is not understood: NAME=FILE is wanted")
        files.setdefault(name, []).append(Path(path))
    return files


def announce(finished: Finished) -> None:
    """Results on standard output; items that failed end the program with code 1."""
    show.show_results(finished.report, Console())
    typer.echo(f"Pictures in {finished.page.parent}, all of them in {finished.page}")
    failed = finished.report["failed"]
    for each in failed:
        typer.echo(f"rlsd: {each['name']}: {each['error']}", err=True)
    if failed:
        raise typer.Exit(1)


def tasks(model: o.AnyModel = None) -> None:
    """List the tasks and their settings; with --model, which of them its bundle can do."""
    if model is None:
        show.show_tasks(Console(), None)
        return
    with open_model(model) as engine:
        show.show_tasks(Console(), engine)


def info(
    bundle: Annotated[str | None, typer.Argument(metavar="[BUNDLE]", help=o.MODEL_TEXT, show_default=False)] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Where a GPU's memory goes with this bundle; needs no GPU.")
    ] = False,
    particles: Annotated[int, typer.Option(metavar="N", help="For --plan: particles in flight.", min=1)] = 8,
    memory: Annotated[float, typer.Option(metavar="GIB", help="For --plan: the GPU's memory.", min=0.1)] = 80.0,
) -> None:
    """Show what a bundle holds (opening and verifying it), or without one what this machine has.

    With --plan, count a GPU's memory from the bundle's manifest; the exit code is 1 if the particles do not fit.
    """
    if bundle is None:
        show.show_machine(Console())
        return
    if plan:
        if not memory <= MOST_MEMORY:  # nan, too
            raise InputError(f"memory is {memory:g}; allowed are 0.1 to {MOST_MEMORY} GiB")
        counted = read_plan(find_bundle(bundle))
        show.show_plan(counted, particles, memory, Console())
        if counted.total(particles) > memory * 2**30:
            raise typer.Exit(1)
        return
    with open_model(bundle) as engine:
        show.show_bundle(engine, Console())


def tune(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle for CUDA.", show_default=False)],
    device: o.Device = None,
) -> None:
    """Measure the bundle's batches on this machine's GPU, and keep the times beside it for the engine."""
    with open_model(bundle, device=device) as engine:
        path = tuning.tune(engine, typer.echo)
    typer.echo(f"Written to {path}")


def demo(
    out: o.Out = Path("rlsd-demo"),
    overwrite: o.Overwrite = False,
    particles: o.Particles = None,
    steps: o.Steps = None,
    seed: o.Seed = 0,
    threads: o.Threads = 0,
) -> None:
    """Reconstruct shipped test images on three tasks, and say where the pictures are.

    Results go to the folder rlsd-demo unless --out names another.
    """
    folder = find_bundle(demo_run.MODEL).parent / "test_images"
    with open_model(demo_run.MODEL, threads=threads) as engine:
        plans = demo_run.demo_plans(engine, folder, particles, steps, seed)
        finished = run_plans(engine, plans, out, overwrite=overwrite, console=Console(stderr=True))
    demo_run.overview(out, [item["name"] for item in finished.report["items"]])
    announce(finished)


def export(
    checkpoint: Annotated[
        str,
        typer.Option(metavar="DIR|OWNER/NAME", help="Folder in diffusers layout, or one on the hub; safetensors only."),
    ],
    out: Annotated[Path, typer.Option(metavar="BUNDLE", help="The bundle to write.")],
    revision: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="For one on the hub: the commit's full hash, 40 digits.")
    ] = None,
    target: Annotated[str, typer.Option(metavar="cpu|cuda", help="What the bundle runs on.")] = "cpu",
    precision: Annotated[
        str | None, typer.Option(metavar="fp32|fp16", help="Precision; default: fp32 for cpu, fp16 for cuda.")
    ] = None,
    arch: Annotated[
        str, typer.Option(metavar="CC,...", help="For cuda: compute capabilities times 10, as 90 for 9.0.")
    ] = "80,90,100",
    size: Annotated[
        str | None, typer.Option(metavar="H[xW]", help="Image size; default: the checkpoint's own.")
    ] = None,
    operators: Annotated[
        str, typer.Option(metavar="NAMES", help="Comma-separated forward operators, all, or your own as FILE.py:NAME.")
    ] = "all",
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="B,...", help="Numbers of samples that each graph is made for; default: 2,8,16, for cuda 1,4."
        ),
    ] = None,
    features: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Feature extractor for the repulsion; default: the checkpoint's.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TEXT", help="Keep a text's context, for --class NAME; may be repeated."),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Its name; default: the folder's.")] = None,
    without: Annotated[
        str, typer.Option(metavar="NAMES", help="Savings to leave out, to measure them: upsampling, context, ...")
    ] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace an existing bundle.")] = False,
) -> None:
    """Turn a diffusion checkpoint into a bundle (needs torch: pip install 'rlsd\\[export]')."""
    batches = None if batch is None else _whole_numbers("batch", batch)
    architectures = _whole_numbers("arch", arch)
    prompts = _named("prompt", "NAME=TEXT", prompt)
    names = None if operators == "all" else [name.strip() for name in operators.split(",")]
    try:
        from rlsd.export import CheckError, export_checkpoint
    except ModuleNotFoundError as error:
        raise InputError(f"export needs {error.name}, which is not installed: pip install 'rlsd[export]'") from None
    try:
        path = export_checkpoint(
            checkpoint, out, revision=revision, target=target, precision=precision, architectures=architectures,
            size=size, operators=names, batches=batches, features=features, prompts=prompts, name=name,
            overwrite=overwrite,
            without=[word.strip() for word in without.split(",") if word.strip()],
        )  # fmt: skip
    except CheckError as error:
        typer.echo(f"rlsd: {error}", err=True)
        raise typer.Exit(1) from None
    except (ValueError, OSError) as error:  # CheckpointError is a ValueError; diffusers says OSError
        raise InputError(" ".join(str(error).split())) from error
    if target == "cuda":
        show_census(path, Console())
    typer.echo(f"Bundle written to {path}")


def _whole_numbers(field: str, given: str) -> list[int]:
    try:
        return [int(word) for word in given.split(",")]
    except ValueError:
        raise InputError(f"{field} is {given!r}; whole numbers are wanted, as 2 or 2,8,16") from None


def _named(field: str, wanted: str, given: Sequence[str] | None) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for word in given or ():
        name, equals, value = word.partition("=")
        if not (name and equals) or name in pairs:
            raise InputError(f"--{field} {word!r} is not understood: {wanted} is wanted, each name once")
        pairs[name] = value
    return pairs
