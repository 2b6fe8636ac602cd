"""Bundles and manifests of batches that try to reach files which are not theirs: none may be opened.

python tests/path_attacks.py        prints one line an attack; 1 as exit status if one gets out

Every attack aims at one file outside its folder, the canary, that holds what would be accepted if it were read. The
kernel tells whether anybody opened it (inotify). A hard link is the file itself: there what counts is that bytes with
another digest are refused, and that no message repeats them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from bundle_factory import write_bundle
from corrupted_bundles import lines_of, seal
from onnx import TensorProto, helper
from PIL import Image
from tiny import make_nets

from rlsd.engine import Engine, RlsdError
from rlsd.pipeline.batch_list import list_inputs
from rlsd.pipeline.classes import class_head
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.extension import has_operator
from rlsd.pipeline.images import read_image

IN_ACCESS, IN_OPEN = 0x1, 0x20
SECRET = b"the canary sings"
LISTED = ("weights.bin", "alphas_cumprod.f64", "null_context.f32", "context.loud.f32", "decoder.b1.onnx")


class Canary:
    """A file outside, watched. Its content is given by each attack."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._libc = ctypes.CDLL(None, use_errno=True)
        path.parent.mkdir(parents=True, exist_ok=True)

    def holds(self, content: bytes) -> Path:
        """Writes it, and watches from now on."""
        self.path.write_bytes(content)
        self._watch = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if (
            self._watch < 0
            or self._libc.inotify_add_watch(self._watch, os.fsencode(self.path), IN_OPEN | IN_ACCESS) < 0
        ):
            raise OSError(ctypes.get_errno(), "inotify")
        return self.path

    def opened(self) -> bool:
        """Whether anybody opened it since; ends the watch."""
        try:
            return bool(os.read(self._watch, 4096))
        except BlockingIOError:
            return False
        finally:
            os.close(self._watch)


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@dataclass(frozen=True)
class Attack:
    """act: does what a user would do with the prepared folder; a refusal is an RlsdError or InputError.

    aims: whether the canary must stay closed (all but hard links).
    """

    name: str
    act: Callable[[Path, Canary], object]
    aims: bool = True


def open_bundle(bundle: Path) -> None:
    """Opens it, and uses what a run may use: every operator, contexts, the classifier."""
    has_operator(bundle, "inpainting")
    with Engine(bundle, threads=1) as engine:
        for operator in engine.operators:
            params = {name: np.zeros(shape) for name, shape in engine.operators[operator].params.items()}
            engine.measure(operator, np.zeros((1, *engine.image_shape), np.float32), **params)
        for name in engine.contexts:
            engine.context(name)
        class_head(engine)


def edited(bundle: Path, old: str, new: str) -> None:
    """Replaces words of the manifest's facts and seals it again."""
    seal(bundle, [line.replace(old, new) for line in lines_of(bundle)])


# ------------------------------------------------------------ bundles


def named_paths() -> Iterator[Attack]:
    """A fact that names the canary's path instead of a file's name."""
    forms = (
        "../outside/canary", "{outside}/canary", "./../outside/canary", "sub/../../outside/canary", "link/canary", "..",
        "../bundle/{file}", "/{file}", "..\\outside\\canary", "%2e%2e/outside/canary", "~/canary", "canary\0",
        "a" * 5000,
    )  # fmt: skip
    for i, form in enumerate(forms):
        for file in (LISTED[i % len(LISTED)], LISTED[(i + 2) % len(LISTED)]):

            def act(bundle: Path, canary: Canary, form: str = form, file: str = file) -> None:
                canary.holds((bundle / file).read_bytes())
                (bundle / "link").symlink_to(canary.path.parent)
                new = form.format(outside=canary.path.parent, file=file)
                lines = [
                    " ".join(new if word == file else word for word in line.split(" ")) for line in lines_of(bundle)
                ]
                (bundle / "link").rename(bundle.parent / "link")
                seal(bundle, lines)
                (bundle.parent / "link").rename(bundle / "link")
                open_bundle(bundle)

            yield Attack(f"{file} named {form[:30]!r}", act)


def links() -> Iterator[Attack]:
    """A file of the bundle that is a link to the canary, or no file."""

    def symbolic(bundle: Path, canary: Canary, file: str, relative: bool) -> None:
        target = canary.holds((bundle / file).read_bytes())
        (bundle / file).unlink()
        (bundle / file).symlink_to(os.path.relpath(target, bundle) if relative else target)
        open_bundle(bundle)

    def hard(bundle: Path, canary: Canary, file: str) -> None:
        canary.holds(SECRET)
        (bundle / file).unlink()
        os.link(canary.path, bundle / file)
        open_bundle(bundle)

    def after_opening(bundle: Path, canary: Canary, file: str) -> None:
        seal(bundle, [*lines_of(bundle), f"info class_head {LISTED[0]} a b"])
        with Engine(bundle, threads=1) as engine:
            target = canary.holds((bundle / file).read_bytes())
            (bundle / file).unlink()
            (bundle / file).symlink_to(target)
            engine.context("loud")
            class_head(engine)

    for i, file in enumerate((*LISTED, "manifest.txt")):
        yield Attack(f"{file} a symbolic link", lambda b, c, f=file, r=i % 2 == 0: symbolic(b, c, f, r))
        yield Attack(f"{file} a hard link to something else", lambda b, c, f=file: hard(b, c, f), aims=False)
    for file in ("context.loud.f32", "weights.bin"):
        yield Attack(f"{file} a link once it is open", lambda b, c, f=file: after_opening(b, c, f))
    for path in ("../outside/canary", "{outside}/canary", "unlisted.f32"):

        def head(bundle: Path, canary: Canary, path: str = path) -> None:
            canary.holds(np.zeros(12, np.float32).tobytes())
            seal(bundle, [*lines_of(bundle), f"info class_head {path.format(outside=canary.path.parent)} a b"])
            (bundle / "unlisted.f32").symlink_to(canary.path)
            open_bundle(bundle)

        yield Attack(f"class_head {path}", head)


def no_files() -> Iterator[Attack]:
    """Something in a file's place that has no end, or waits."""

    def in_place(bundle: Path, canary: Canary, file: str, make: Callable[[Path], object]) -> None:
        canary.holds(SECRET)
        (bundle / file).unlink()
        make(bundle / file)
        open_bundle(bundle)

    def unix_socket(path: Path) -> None:
        with working_in(path.parent), socket.socket(socket.AF_UNIX) as made:  # its path must be short
            made.bind(path.name)

    makers: Sequence[tuple[str, Callable[[Path], object]]] = (
        ("a pipe", os.mkfifo), ("a folder", os.mkdir), ("a socket", unix_socket),
        ("an endless device", lambda path: path.symlink_to("/dev/zero")),
        ("this process's memory", lambda path: path.symlink_to("/proc/self/mem")),
    )  # fmt: skip
    for what, make in makers:
        for file in ("manifest.txt", "weights.bin"):
            yield Attack(f"{file} {what}", lambda b, c, f=file, m=make: in_place(b, c, f, m))


def external_data() -> Iterator[Attack]:
    """A graph whose weights lie elsewhere, or beyond the end of the file."""

    def located(bundle: Path, canary: Canary, entries: dict[str, str], constant: bool) -> None:
        canary.holds((bundle / "weights.bin").read_bytes())
        model = onnx.load(bundle / "decoder.b1.onnx", load_external_data=False)
        tensor = next(each for each in model.graph.initializer if each.data_location == TensorProto.EXTERNAL)
        known = {entry.key: entry.value for entry in tensor.external_data} | entries
        known["location"] = known["location"].format(outside=canary.path.parent, bundle=bundle)
        del tensor.external_data[:]
        for key, value in known.items():
            tensor.external_data.add(key=key, value=value)
        if constant:  # as the attribute of a node
            model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
            model.graph.initializer.remove(tensor)
        (bundle / "decoder.b1.onnx").write_bytes(model.SerializeToString())
        shutil.copy(bundle / "weights.bin", bundle / "unlisted.bin")
        files = lines_of(bundle)
        (bundle / "unlisted.bin").rename(bundle.parent / "unlisted.bin")
        seal(bundle, files)
        (bundle.parent / "unlisted.bin").rename(bundle / "unlisted.bin")
        with working_in(canary.path.parent):
            open_bundle(bundle)

    locations = ("../outside/canary", "{outside}/canary", "canary", "file://{outside}/canary", "unlisted.bin", "",
                 "weights.bin/../../outside/canary", "{bundle}/unlisted.bin")  # fmt: skip
    for location in locations:
        for constant in (False, True):
            name = f"external data at {location!r}" + (", of a node" if constant else "")
            yield Attack(name, lambda b, c, w=location, k=constant: located(b, c, {"location": w}, k))
    for entries in ({"offset": "-64"}, {"offset": str(2**63)}, {"offset": str(2**64 - 64)}, {"length": str(2**62)}):
        yield Attack(f"external data with {entries}", lambda b, c, e=entries: located(b, c, e, False))


# ------------------------------------------------------------ manifests of batches


def manifests() -> Iterator[Attack]:
    """A row whose cell leads out of the manifest's folder."""

    def listed(folder: Path, canary: Canary, column: str, cell: str) -> None:
        target = canary.path
        Image.new("L", (4, 4), 7).save(target, "PNG")
        canary.holds(target.read_bytes())
        (folder / "link.png").symlink_to(target)
        (folder / "folder").symlink_to(target.parent)
        (folder / "loop.png").symlink_to("loop.png")
        os.mkfifo(folder / "pipe.png")
        chunks = folder / "array.zarr"
        chunks.mkdir()
        (chunks / "zarr.json").symlink_to(target)
        (chunks / ".zarray").symlink_to(target)
        Image.new("L", (4, 4), 9).save(folder / "good.png")
        cell = cell.format(outside=target.parent)
        row = {"input": "good.png", "name": "x", "mask": "good.png"} | {column: cell}
        text = ",".join(row) + "\n" + ",".join('"' + value.replace('"', '""') + '"' for value in row.values()) + "\n"
        (folder / "items.csv").write_text(text, newline="")
        for entry in list_inputs([str(folder / "items.csv")], None, ["mask"]).entries():
            if entry.error:
                raise InputError(entry.error)
            if (folder / "out" / entry.name).resolve().parent != folder.resolve() / "out":
                return  # it would be written elsewhere
            for path in (entry.path, *entry.given.values()):
                read_image(Path(path))

    cells = (
        "../outside/canary", "{outside}/canary", "folder/../../outside/canary", "link.png", "folder/canary", "loop.png",
        "pipe.png", "/dev/zero", "/proc/self/environ", "~/canary", "array.zarr[0]", "../outside/canary[0]", "x" * 5000,
        "a\0b", "..", ".", "good.png/../../outside/canary", "file://{outside}/canary",
    )  # fmt: skip
    for i, cell in enumerate(cells):
        column = "mask" if i % 3 == 2 else "input"
        yield Attack(f"manifest: {column} {cell[:30]!r}", lambda f, c, k=column, v=cell: listed(f, c, k, v))
    for name in ("../x", "/x", "..", ".hidden", "a/b", "a\\b", "a\nb", "x" * 300, "é", "-rf"):
        yield Attack(f"manifest: name {name[:20]!r}", lambda f, c, v=name: listed(f, c, "name", v))


# ------------------------------------------------------------ verdicts


def attacks() -> list[Attack]:
    """All of them."""
    return [each for kind in (named_paths, links, no_files, external_data, manifests) for each in kind()]


def verdict(attack: Attack, work: Path) -> str | None:
    """Carries it out in the new folder `work`: how it got out, None if it did not."""
    work.mkdir()
    canary, message, refused = Canary(work / "outside/canary"), "", False
    if attack.name.startswith("manifest:"):
        (folder := work / "items").mkdir()
    else:
        folder = write_bundle(work / "bundle", make_nets())
    try:
        attack.act(folder, canary)
    except (RlsdError, InputError) as error:
        refused, message = True, str(error)
    if canary.opened() and attack.aims:
        return "the canary was opened"
    if SECRET.decode() in message:
        return f"the message repeats what was read: {message}"
    return None if refused else "it was not refused"


def main() -> int:
    escapes = 0
    with tempfile.TemporaryDirectory() as work:
        everything = attacks()
        for i, attack in enumerate(everything):
            how = verdict(attack, Path(work) / str(i))
            escapes += how is not None
            print(f"{attack.name}: {how or 'refused'}")
    print(f"{len(everything)} attacks, {escapes} escapes")
    return int(escapes > 0)


if __name__ == "__main__":
    sys.exit(main())
