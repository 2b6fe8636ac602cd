"""What atheris found interesting in images and manifests so far, once more and without atheris."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
import warnings
from pathlib import Path

import pytest

from rlsd.pipeline.errors import InputError

FUZZ = Path(__file__).parent / "fuzz"


@pytest.fixture(name="fuzz_files")
def fuzz_files_fixture(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module of the fuzzer, whose functions do not need atheris."""
    stand_in = types.SimpleNamespace(instrument_imports=lambda include: contextlib.nullcontext())
    monkeypatch.setitem(sys.modules, "atheris", stand_in)
    spec = importlib.util.spec_from_file_location("fuzz_files", FUZZ / "fuzz_files.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", ["images", "rows"])
def test_each_input_is_taken_or_refused(fuzz_files, tmp_path, target):
    taken = refused = 0
    for path in sorted((FUZZ / "corpus" / target).iterdir()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                getattr(fuzz_files, target)(tmp_path / "items.csv", path.read_bytes())
            taken += 1
        except InputError as error:
            assert str(error).isprintable()
            refused += 1
    assert taken > 5 and refused > 5
