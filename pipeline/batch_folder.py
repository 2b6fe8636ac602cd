"""The output folder of a batch: what is finished, what is under way, and whose run it is.

    run.json          what the run is: another run is refused
    items/NAME/       arrays.npz, item.json (and pictures): a finished item
    items.csv         the figures of all finished items, once the batch has ended
    failures.jsonl    items that failed in the last run, if any did
    .snapshots/       items under way; gone when the batch has ended
    .lock             held by the run that is under way

Everything appears under its name only when it is complete and synced.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rlsd.engine import RlsdError
from rlsd.pipeline.batch_lock import LOCK, Lock
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.manifest import Entry
from rlsd.pipeline.output import TEMPORARY, OutputFolder, encoded, sync

RUN, ITEMS, SNAPSHOTS, TABLE, FAILURES = "run.json", "items", ".snapshots", "items.csv", "failures.jsonl"
COLUMNS = (
    "item", "name", "source", "particles", "sigma", "residual_mean", "residual_best", "psnr_mean", "psnr_best",
    "psnr_of_mean_image",
)  # fmt: skip


class OutputError(OSError):
    """The output cannot be written: the batch stops, and goes on when it is started again."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns any OSError into an OutputError that says what to do."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        why = error.strerror or str(error)
        if not folder.is_dir():
            why = "the folder is gone"
        text = f"cannot be written: {why}; what is finished stays, start the same command again to go on"
        raise OutputError(error.errno or errno.EIO, text, str(folder)) from error


class Items:
    """The folder as a worker sees it; use it in a `with` block. Several processes may, for different items."""

    def __init__(self, path: Path):
        self.path = path
        self._stack = ExitStack()

    def __enter__(self) -> Items:
        with writing(self.path):
            if not self.path.is_dir():
                raise FileNotFoundError(errno.ENOENT, "the folder is gone", str(self.path))
            self._items = self._stack.enter_context(OutputFolder(self.path / ITEMS, (), overwrite=True))
            self._snapshots = self._stack.enter_context(OutputFolder(self.path / SNAPSHOTS, (), overwrite=True))
        return self

    def __exit__(self, *what: Any) -> None:
        self._stack.close()

    @contextmanager
    def item(self, name: str) -> Iterator[Path]:
        """A folder to fill, which becomes items/NAME; then its snapshot goes. OutputError."""
        with writing(self.path):
            with self._items.item(name) as folder:
                yield folder
            self.drop_snapshot(name)

    def keep_snapshot(self, name: str, content: bytes) -> None:
        """Replaces the item's snapshot in one step. OutputError."""
        with writing(self.path):
            self._snapshots.file(name, content)

    def snapshot(self, name: str) -> bytes | None:
        """The item's snapshot, None without one or where it cannot be read."""
        try:
            return (self.path / SNAPSHOTS / name).read_bytes()
        except OSError:
            return None

    def drop_snapshot(self, name: str) -> None:
        """Removes the item's snapshot, if there is one."""
        with suppress(FileNotFoundError):
            os.unlink(self.path / SNAPSHOTS / name)


class BatchFolder:
    """The folder as the process sees it that leads the batch; use it in a `with` block, which holds the lock.

    run: what the batch is; facts that are not those of an earlier run in the folder are an InputError.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]):
        self.path, self.run, self.lock = path, dict(run), Lock(path)
        self._made: list[Path] = []
        self._claimed = False  # by this run, not by an earlier one

    def __enter__(self) -> BatchFolder:
        OutputFolder(self.path, (), overwrite=True).check()
        self._make()
        with writing(self.path):
            self.lock.take()
            try:
                self._claim()
            except BaseException:
                self.lock.release()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        given_up = self._claimed and isinstance(error, (InputError, RlsdError))
        if given_up:
            self._withdraw()
        self.lock.release()
        if given_up:
            self._unmake()

    def _make(self) -> None:
        """The folder, and those above it that are missing. OutputError."""
        for folder in (*reversed(self.path.absolute().parents), self.path.absolute()):
            try:
                if not folder.exists():
                    folder.mkdir(exist_ok=True)
                    self._made.append(folder)
            except OSError as error:
                self._unmake()
                raise OutputError(error.errno or errno.EIO, f"cannot be made: {error.strerror}", str(folder)) from error

    def _unmake(self) -> None:
        with suppress(OSError):
            for folder in reversed(self._made):
                folder.rmdir()

    def _withdraw(self) -> None:
        """Leaves no trace where something given was wrong and nothing is finished or kept: another run may come."""
        with suppress(OSError):
            for kept in (self.path / SNAPSHOTS).glob("~*"):  # how often workers died
                kept.unlink()
            for below in (self.path / ITEMS, self.path / SNAPSHOTS):
                self._sweep(below)
                below.rmdir()
            (self.path / RUN).unlink()

    def _claim(self) -> None:
        """Writes run.json into an empty folder, or compares it with what this run is."""
        try:
            found = json.loads((self.path / RUN).read_text())
        except FileNotFoundError:
            if any(entry.name != LOCK and not entry.name.startswith(TEMPORARY) for entry in self.path.iterdir()):
                raise InputError(f"output {self.path} is not empty and has no {RUN} of a batch: name another") from None
            with suppress(PermissionError):
                sync(self.path.absolute().parent)
            self._write(RUN, json.dumps(self.run, indent=1) + "\n")
            found, self._claimed = self.run, True
        except ValueError:
            raise InputError(f"output {self.path}: its {RUN} cannot be read as JSON; name another folder") from None
        for key in (*self.run, *(found if isinstance(found, dict) else ())):
            old, new = (facts.get(key) if isinstance(facts, dict) else None for facts in (found, self.run))
            if old != new:
                is_, ones = f"is {_short(old)}", f"this one's is {_short(new)}"
                if key == "list":  # both are digests
                    is_, ones = "of items is another", "files or rows have changed, or files are named by another path"
                raise InputError(
                    f"output {self.path} holds a batch whose {key} {is_}; {ones}: "
                    "give the same command again to go on, or name another folder"
                )
        self._sweep(self.path)
        for below in (ITEMS, SNAPSHOTS):
            (self.path / below).mkdir(exist_ok=True)
            self._sweep(self.path / below)
        sync(self.path)

    def _write(self, name: str, content: str) -> None:
        with OutputFolder(self.path, (), overwrite=True) as folder:
            folder.file(name, content)

    def _sweep(self, folder: Path) -> None:
        """Removes what killed runs have left half-written."""
        if folder.is_dir():
            for entry in folder.iterdir():
                if entry.name.startswith(TEMPORARY):
                    shutil.rmtree(entry)

    def is_finished(self, name: str) -> bool:
        """Whether the item of that name is there."""
        return os.path.isdir(os.path.join(self.path, ITEMS, name))

    def check(self) -> None:
        """OutputError when the folder is gone or is no longer the one that was locked."""
        with writing(self.path):
            if not self.lock.is_in_place():
                raise FileNotFoundError(errno.ENOENT, f"the folder, or {LOCK} in it, was replaced", str(self.path))

    def end(self, entries: Iterable[Entry], failures: Mapping[Any, Mapping[str, Any]]) -> None:
        """Writes the table and the failures, and removes what only serves to go on."""
        with writing(self.path):
            self._sweep(self.path / ITEMS)  # of workers that died
            shutil.rmtree(self.path / SNAPSHOTS)
            with suppress(OSError):
                os.rmdir(self.path / ITEMS)  # where every item failed
            with OutputFolder(self.path, (), overwrite=True) as folder:
                with folder.stream(TABLE) as stream:
                    for row in self._rows(entries):
                        stream.write(encoded(row))
                if failures:
                    lines = (json.dumps(failures[key]) + "\n" for key in sorted(failures))
                    folder.file(FAILURES, "".join(lines))
            if not failures and (self.path / FAILURES).exists():
                os.unlink(self.path / FAILURES)
                sync(self.path)

    def _rows(self, entries: Iterable[Entry]) -> Iterator[str]:
        """items.csv, line by line."""
        yield ",".join(COLUMNS) + "\n"
        for entry in entries:
            try:
                record = _record(self.path / ITEMS / entry.name / "item.json")
            except FileNotFoundError:
                continue
            record |= {f"{key}_{part}": value for key in ("residual", "psnr") for part, value in _parts(record, key)}
            line = io.StringIO()
            csv.writer(line, lineterminator="\n").writerow(record.get(column, "") for column in COLUMNS)
            yield line.getvalue()


def _record(path: Path) -> dict[str, Any]:
    """What an item's file says. InputError where a crash or somebody has spoilt it."""
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise InputError(
            f"{path} cannot be read as an item's JSON: remove the folder {path.parent} and give the same command "
            "again, which does the item again"
        )
    return record


def _parts(record: Mapping[str, Any], key: str) -> Iterable[tuple[str, Any]]:
    return (record.get(key) or {}).items()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
