"""Writes a bundle: a flat directory of ONNX graphs, one file of weights, and a manifest of plain lines.

The manifest names every other file with its size and SHA-256 and ends with the SHA-256 of itself, so that the
engine can verify each byte before ONNX Runtime sees it. The directory appears under its name when it is complete.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir

FORMAT = 1
WEIGHTS = "weights.bin"
ALIGNMENT = 64
BESIDE = 64  # how many times smaller than the weights of a bundle an array is that is added in its graph
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


class BundleWriter:
    """Collects the parts of a bundle; use it in a `with` block, whose clean end puts the bundle in place."""

    def __init__(
        self,
        path: Path,
        name: str,
        producer: str,
        target: str,
        precision: str,
        overwrite: bool = False,
        weights: Path | None = None,
    ):
        """weights: those of a bundle to start from, verified by the caller; they are not copied unless they grow."""
        self.path, self.target = Path(path), target
        if self.path.exists() and overwrite and not (self.path / "manifest.txt").is_file():
            raise FileExistsError(f"{self.path} is no bundle, which has a manifest.txt; only a bundle is overwritten")
        if self.path.exists() and not overwrite:
            raise FileExistsError(f"{self.path} exists already; name another folder or allow to overwrite a bundle")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}-", dir=self.path.parent))
        self._weights = WeightStore(self._folder / WEIGHTS, halve=target == "cpu", base=weights)
        self._lines = [f"rlsd-bundle {FORMAT}"]
        for key, value in (("name", name), ("target", target), ("precision", precision)):
            self.fact(key, check_name(key, value))
        self.fact("producer", *producer.split())

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def fact(self, key: str, *values: object) -> None:
        """Adds the line `key values...`; numbers are written so that they read back exactly."""
        line = " ".join([key, *(repr(v) if isinstance(v, float) else str(v) for v in values)])
        if not line.isprintable():
            raise ValueError(f"manifest line {line!r} has characters that cannot be printed")
        self._lines.append(line)

    def array(self, file: str, values: np.ndarray) -> None:
        """Writes `values` as raw little-endian numbers in row-major order."""
        data = np.ascontiguousarray(values)
        self.file(file, data.astype(data.dtype.newbyteorder("<")).tobytes())

    def file(self, name: str, content: bytes) -> None:
        """Writes a new file of the bundle."""
        with open(self._folder / check_name("file", name), "xb") as stream:
            stream.write(content)

    def graph(self, name: str, batch: int, model: ir.Model) -> Path:
        """Adds a graph for `batch` samples; its weights move to the file that all graphs share.

        Returns where the graph lies until the bundle is complete: it can be run from there.
        """
        file = f"{check_name('graph', name)}.b{batch}.onnx"
        self._weights.take(model)
        self.file(file, ir.serde.serialize_model(model).SerializeToString(deterministic=True))
        self.fact("graph", name, batch, file)
        return self._folder / file

    def _finish(self) -> None:
        self.fact("weights", WEIGHTS)
        for file in sorted(self._folder.iterdir()):
            self.fact("file", file.name, file.stat().st_size, sha256(file))
        text = "".join(line + "\n" for line in self._lines)
        text += f"end {hashlib.sha256(text.encode()).hexdigest()}\n"
        (self._folder / "manifest.txt").write_text(text)
        for file in self._folder.iterdir():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        self._folder.chmod(0o755)
        if self.path.exists():
            shutil.rmtree(self.path)
        os.rename(self._folder, self.path)


class WeightStore:
    """One file for the weights of all graphs, each distinct array once; with `halve`, exact halves as halves.

    base: weights to start from. They stay one file with those of the other bundle (a hard link, where the file system
    has them) until an array comes that is not small beside them; then they are copied and grow. Smaller arrays stay in
    their graphs: those of most operators are nothing beside a network's.
    """

    def __init__(self, path: Path, halve: bool, base: Path | None = None):
        self._path, self._halve, self._shared = path, halve, base is not None
        self._fewest = 16  # elements of an array that moves here
        self._offsets: dict[str, int] = {}
        if base is None:
            path.touch(exist_ok=False)
        else:
            link_or_copy(base, path)
            self._fewest = max(self._fewest, path.stat().st_size // (4 * BESIDE))

    def take(self, model: ir.Model) -> None:
        """Moves the floating-point initializers of `model` into the store, in place."""
        graph = model.graph
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
                continue
            if tensor.size < self._fewest:
                continue
            data = np.ascontiguousarray(tensor.numpy())
            half = _exact_half(data) if self._halve else None
            if half is None:
                value.const_value = self._stored(name, data)
                continue
            stored = self._stored(f"{name}.half", half)
            source = ir.Value(name=stored.name, shape=value.shape, type=ir.TensorType(stored.dtype), const_value=stored)
            cast = ir.node("Cast", [source], {"to": ir.DataType.FLOAT})
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])
            del graph.initializers[name]
            cast.outputs[0].name = name
            graph.register_initializer(source)
            graph.insert_before(graph[0], cast)

    def _stored(self, name: str, data: np.ndarray) -> ir.ExternalTensor:
        raw = data.tobytes()
        digest = hashlib.sha256(raw).hexdigest()
        if digest not in self._offsets:
            self._own_file()
            with open(self._path, "ab") as stream:
                stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
                self._offsets[digest] = stream.tell()
                stream.write(raw)
        return ir.ExternalTensor(
            WEIGHTS,
            self._offsets[digest],
            len(raw),
            ir.DataType.from_numpy(data.dtype),
            shape=ir.Shape(data.shape),
            name=name,
            base_dir=self._path.parent,
        )

    def _own_file(self) -> None:
        """Ends the sharing: what is written next must not reach the other bundle."""
        if self._shared:
            copy = self._path.with_suffix(".copy")
            shutil.copyfile(self._path, copy)
            os.replace(copy, self._path)
            self._shared = False


def check_name(field: str, value: str) -> str:
    """The value itself, if it may stand in a manifest: letters, digits, `_`, `-` and, not first, `.`."""
    if not NAME.fullmatch(value):
        raise ValueError(f"{field} {value!r} is not allowed: letters, digits, '_', '-' and, not first, '.'")
    return value


def link_or_copy(source: Path, path: Path) -> None:
    """Makes `path` the same file as `source`, or a copy where the file system or its rules allow no link."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _exact_half(values: np.ndarray) -> np.ndarray | None:
    if values.dtype != np.float32:
        return None
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), values) else None
