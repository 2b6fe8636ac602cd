"""The lock of a batch's folder: a file in it, since a network file system may lock no folders."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from rlsd.pipeline.errors import InputError

LOCK = ".lock"
PATIENCE = 5.0  # seconds that a lock may still be held by workers of a run that was killed


class Lock:
    """Held until it is released; by a run that is killed, until the last worker that inherited `descriptor` is gone.

    Its file goes when it is released, and is left behind by a run that is killed.
    """

    def __init__(self, folder: Path):
        self.folder, self.descriptor = folder, -1

    def take(self) -> None:
        """InputError when another run keeps holding it; OSError."""
        end = time.monotonic() + PATIENCE
        while not self._try():
            if time.monotonic() > end:
                raise InputError(f"output {self.folder} is in use: another run is writing to it")
            time.sleep(0.05)

    def _try(self) -> bool:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW  # NFS locks what is open for writing
        self.descriptor = os.open(self.folder / LOCK, flags, 0o666)
        with ExitStack() as undo:
            undo.callback(os.close, self.descriptor)
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.ESTALE):
                    raise
                return False
            if self.is_in_place():  # and not a file that its holder removed in the meantime
                undo.pop_all()
                return True
        return False

    def is_in_place(self) -> bool:
        """Whether the locked file is still the one in the folder; it is opened, since a `stat` may be cached."""
        try:
            there = os.open(self.folder / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                return os.path.sameopenfile(there, self.descriptor)
            finally:
                os.close(there)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):  # the second: on NFS, of a file that is gone
                raise
            return False

    def release(self) -> None:
        """Removes the file while it is locked, and lets go."""
        with suppress(OSError):
            if self.is_in_place():
                os.unlink(self.folder / LOCK)
        os.close(self.descriptor)
