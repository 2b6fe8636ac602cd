"""What a worker of a batch could not go on with, as an event that can be sent to the process that leads the batch."""

from __future__ import annotations

import errno

from rlsd.engine import RlsdError, Status
from rlsd.pipeline.batch_folder import OutputError
from rlsd.pipeline.batch_work import Event
from rlsd.pipeline.errors import InputError


def fatal_event(error: Exception) -> Event:
    """The event; an error of a kind that is not foreseen is raised again."""
    if isinstance(error, InputError):
        return Event("fatal", name="input", text=str(error))
    if isinstance(error, RlsdError):
        return Event("fatal", int(error.status), "engine", str(error))
    if isinstance(error, OSError):
        name = f"system {error.filename or ''}"
        return Event("fatal", error.errno or errno.EIO, name, error.strerror or str(error))
    raise error


def error_of(event: Event) -> Exception:
    """What the worker raised, once more."""
    if event.name == "input":
        return InputError(event.text)
    if event.name == "engine":
        return RlsdError(Status(event.index), event.text)
    return OutputError(event.index, event.text, event.name.partition(" ")[2])
