"""Our Triton kernels as cubins of a bundle, compiled while its graphs are made."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rlsd.export.bundle import BundleWriter


class Cubins:
    """`with Cubins(architectures) as cubins:` compiles in a process of its own, which no interpreter mode reaches.

    architectures: compute capabilities times 10, one or more.
    """

    def __init__(self, architectures: Sequence[int]):
        self._architectures = ",".join(map(str, architectures))

    def __enter__(self) -> Cubins:
        self._folder = tempfile.TemporaryDirectory()
        self._errors = open(Path(self._folder.name) / "errors", "w+")
        self._compiler = self._start()
        return self

    def __exit__(self, *error: object) -> None:
        self._compiler.kill()
        self._compiler.wait()
        self._errors.close()
        self._folder.cleanup()

    def add(self, bundle: BundleWriter, precise: bool = False) -> None:
        """Adds them to the bundle once they are there. RuntimeError when one does not compile.

        precise: with those for float32, which graphs need that keep some of their values in float32.
        """
        self._wait()
        if precise:
            self._compiler = self._start("--precise")  # it finds the others in Triton's cache
            self._wait()
        for line in (Path(self._folder.name) / "kernels.txt").read_text().splitlines():
            file = line.split()[3]
            bundle.file(file, (Path(self._folder.name) / file).read_bytes())
            bundle.fact(*line.split())

    def _start(self, *options: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "rlsd.kernels.aot", "--arch", self._architectures, "--out", self._folder.name]
        return subprocess.Popen(
            [*command, *options],
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        )

    def _wait(self) -> None:
        if status := self._compiler.wait():
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or [f"the compiler ended with status {status}"]
            raise RuntimeError(f"the kernels do not compile: {said[-1]}")
