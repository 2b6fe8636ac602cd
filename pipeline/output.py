"""The output folder. Item folders and files appear in it under their names only when they are complete and synced."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO

from rlsd.pipeline.errors import InputError

OURS = re.compile(
    r"particle_\d+\.png|(mean|std|measurement|input|grid|similarity|trajectories)\.png|arrays\.npz|item\.json"
)
TEMPORARY = ".tmp-"  # a folder that a killed run may leave behind


class OutputFolder:
    """DIR, with a hidden folder for what is being written; use it in a `with` block.

    The folder must not exist or be empty, unless `overwrite`: then item folders and reports of an earlier run are
    replaced one by one, and nothing else is touched. An error leaves complete items and no trace of others. Without
    `overwrite` an item that another run has written meanwhile is an InputError.
    """

    def __init__(self, path: Path, names: Sequence[str], *, overwrite: bool = False):
        self.path, self.names, self.overwrite = path, names, overwrite
        self._made: list[Path] = []

    def check(self) -> None:
        """InputError when the folder cannot be used; changes nothing."""
        nearest = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if folder.exists())
        if not nearest.is_dir():
            raise InputError(f"output {nearest} is a file; a folder is wanted")
        if not os.access(nearest, os.W_OK | os.X_OK):
            read_only = os.statvfs(nearest).f_flag & os.ST_RDONLY
            why = f"{nearest} is on a read-only file system" if read_only else f"no permission in {nearest}"
            raise InputError(f"output {self.path} cannot be written: {why}")
        if not self.path.exists():
            return
        if not self.overwrite and any(not file.name.startswith(TEMPORARY) for file in self.path.iterdir()):
            raise InputError(f"output {self.path} is not empty: name another folder or add --overwrite")
        for name in self.names:
            target = self.path / name
            if target.exists() and not is_item_folder(target):
                raise InputError(f"output {target} is there and was not written by rlsd: it will not be replaced")

    def __enter__(self) -> OutputFolder:
        self.check()
        for folder in (*reversed(self.path.absolute().parents), self.path.absolute()):
            if not folder.exists():
                folder.mkdir()
                self._made.append(folder)
        self._work = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self.path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        for folder in reversed(self._made):
            if not any(folder.iterdir()):
                folder.rmdir()

    @contextmanager
    def item(self, name: str) -> Iterator[Path]:
        """A folder to fill; on a clean end it becomes DIR/name (which may have one folder above it), else it goes."""
        folder = self._work / name.replace("/", "-")
        folder.mkdir()
        try:
            yield folder
            for file in folder.iterdir():
                sync(file)
            sync(folder)
            self._place(folder, self.path / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _place(self, folder: Path, target: Path) -> None:
        target.parent.mkdir(exist_ok=True)
        if target.exists() and not self.overwrite:
            raise InputError(f"output {target} was written by another run meanwhile: name another folder for this one")
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=self._work)) / "old"  # short: the item's name may be as long as any
            os.rename(target, old)
        try:
            os.rename(folder, target)
        except BaseException:
            if old is not None:
                os.rename(old, target)
            raise
        sync(target.parent)
        if old is not None:
            shutil.rmtree(old.parent, ignore_errors=True)

    def file(self, name: str, content: bytes | str) -> Path:
        """Writes DIR/name in one step."""
        with self.stream(name) as stream:
            stream.write(encoded(content) if isinstance(content, str) else content)
        return self.path / name

    @contextmanager
    def stream(self, name: str) -> Iterator[IO[bytes]]:
        """A file to write to; on a clean end it becomes DIR/name."""
        temporary = self._work / name
        try:
            with open(temporary, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self.path / name)
            sync(self.path)
        finally:
            temporary.unlink(missing_ok=True)


def encoded(text: str) -> bytes:
    """UTF-8, in which the name of a file that is none (Python has it with surrogates) gets its own bytes again."""
    return text.encode(errors="surrogateescape")


def is_item_folder(path: Path) -> bool:
    """Whether it is a folder that holds nothing but what we write for an item."""
    return path.is_dir() and not path.is_symlink() and all(OURS.fullmatch(file.name) for file in path.iterdir())


def sync(path: Path) -> None:
    """Flushes a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
