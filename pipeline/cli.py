"""The command line `rlsd`. Thin: it turns options into plans, and errors into one sentence and an exit code.

Exit codes: 0 all done; 1 something failed on the way; 2 something given is not usable; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rlsd.engine import RlsdError, Status
from rlsd.pipeline import demo as demo_module
from rlsd.pipeline import show
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.items import Plan, name_sources
from rlsd.pipeline.machine import engine_version
from rlsd.pipeline.model import open_model
from rlsd.pipeline.presets import family_of
from rlsd.pipeline.run import Finished, run_plans
from rlsd.pipeline.settings import settings_for
from rlsd.pipeline.tasks import find_task

BLAME_THE_INPUT = (Status.INVALID_ARGUMENT, Status.BAD_BUNDLE, Status.NO_RUNTIME)

app = typer.Typer(
    name="rlsd",
    help="Many diverse reconstructions of an image from an incomplete or corrupted measurement.\n\n"
    "Start with [bold]rlsd demo[/bold], then [bold]rlsd tasks[/bold] and [bold]rlsd reconstruct --help[/bold].",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Option("--model", "-m", metavar="NAME|BUNDLE", help="A shipped prior, or the folder of a bundle.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the results.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace items and reports of an earlier run in --out.")]
Threads = Annotated[int, typer.Option(metavar="T", help="Worker threads; 0: one per processor.", rich_help_panel="Run")]
Seed = Annotated[int, typer.Option(metavar="S", help="All random numbers derive from it.", rich_help_panel="Run")]


def _algorithm(help_text: str, *names: str, metavar: str = "X") -> Any:
    return typer.Option(*names, metavar=metavar, help=help_text, rich_help_panel="Algorithm (default: the task's preset)")


def _measurement(help_text: str, *names: str, metavar: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=help_text, rich_help_panel="Measurement")
