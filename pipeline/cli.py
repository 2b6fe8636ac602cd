"""The command line `rlsd`: errors become one sentence and an exit code.

Exit codes: 0 all done; 1 something failed on the way; 2 something given is not usable; 130 interrupted.
"""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from rlsd.engine import RlsdError, Status
from rlsd.pipeline import bench_commands, commands
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.machine import engine_version

DONE, FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130
_USERS = (Status.INVALID_ARGUMENT, Status.BAD_BUNDLE, Status.NO_RUNTIME, Status.NO_DEVICE)

app = typer.Typer(
    name="rlsd",
    help="Many diverse reconstructions of an image from an incomplete or corrupted measurement.\n\n"
    "Start with `rlsd demo`; then `rlsd tasks` and `rlsd reconstruct --help`.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rlsd {engine_version()}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _paragraphs(command: Callable[..., object]) -> str:
    """The paragraphs of its docstring, each on one line: typer would keep their line breaks."""
    return "\n\n".join(" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n"))


for command in (
    commands.reconstruct, commands.batch, commands.demo, commands.tasks, commands.info, commands.tune, commands.export,
):  # fmt: skip
    app.command(help=_paragraphs(command))(command)

benchmarks = typer.Typer(rich_markup_mode="rich", context_settings=app.info.context_settings)
benchmarks.callback(invoke_without_command=True, help=_paragraphs(bench_commands.bench))(bench_commands.bench)
benchmarks.command(help=_paragraphs(bench_commands.serve))(bench_commands.serve)
app.add_typer(benchmarks, name="bench")


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):  # which may be in a code that lacks the letters of a file's name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns the exit code; says on standard error what was wrong."""
    command = typer.main.get_command(app)
    try:
        code = command.main(spread(arguments, ("--input", "-i")), prog_name="rlsd", standalone_mode=False) or DONE
        return _say("interrupted", INTERRUPTED) if code == INTERRUPTED else int(code)
    except InputError as error:
        return _say(str(error), UNUSABLE)
    except RlsdError as error:
        hint = "; pip install 'rlsd[cpu]'" if error.status is Status.NO_RUNTIME else ""
        return _say(f"{error}{hint}", UNUSABLE if error.status in _USERS else FAILED)
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", INTERRUPTED)
    except OSError as error:
        return _say(f"{error.filename or 'the system says'}: {error.strerror or error}", FAILED)
    except MemoryError:
        return _say("out of memory", FAILED)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's usage errors, whose class has moved between its versions
            sentence = " ".join(str(error.format_message()).split())
            return _say(sentence, UNUSABLE) if sentence else UNUSABLE  # none where it has printed its help instead
        traceback.print_exc()
        return _say("this is a fault of rlsd; please report it with the lines above", FAILED)


def spread(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """`--input a b c` as `--input a --input b --input c`, so that a shell's wildcards may follow the option."""
    words: list[str] = []
    current = ""
    for word in arguments:
        if word in names or (word.startswith("-") and word != "-"):
            current = word if word in names else ""
            words.append(word)
            continue
        if current and words[-1] != current:
            words.append(current)
        words.append(word)
    return words


def _say(sentence: str, code: int) -> int:
    print(f"rlsd: {sentence}", file=sys.stderr)
    return code
