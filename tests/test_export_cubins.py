"""Kernels that are compiled while a bundle is made."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from rlsd.export.bundle import BundleWriter
from rlsd.export.cubins import Cubins


def bundle(folder: Path) -> BundleWriter:
    return BundleWriter(folder / "bundle", "b", "test", "cuda", "fp16", False)


def test_a_kernel_that_does_not_compile_is_an_error(tmp_path: Path) -> None:
    with bundle(tmp_path) as target, Cubins([7]) as cubins, pytest.raises(RuntimeError, match="arch 7 is not known"):
        cubins.add(target)


def test_a_compiler_that_is_killed_is_an_error(tmp_path: Path) -> None:
    with bundle(tmp_path) as target, Cubins([90]) as cubins, pytest.raises(RuntimeError, match="do not compile"):
        cubins._compiler.kill()
        cubins.add(target)


def test_an_export_that_fails_ends_the_compiler() -> None:
    with pytest.raises(ValueError, match="export"), Cubins([90]) as cubins:
        folder, compiler = Path(cubins._folder.name), cubins._compiler
        raise ValueError("export")
    assert compiler.poll() == -signal.SIGKILL and not folder.exists()
