"""The API reference is what the sources say, and its examples run and print what they claim."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest

from rlsd.engine import find_onnxruntime, library_path

DOCS = Path(__file__).parent.parent / "docs"
SNIPPETS = DOCS / "api" / "snippets"


@pytest.fixture
def docs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator's modules can be imported."""
    monkeypatch.syspath_prepend(str(DOCS))


def test_pages_are_current(docs: None) -> None:
    import reference

    written = {path.name: path.read_text() for path in reference.API.glob("*.md")}
    assert written == reference.pages(), "write them again: python docs/reference.py"


def test_every_declaration_of_the_header_is_on_its_page(docs: None) -> None:
    import abi

    page = (DOCS / "api" / "c.md").read_text()
    headings = re.findall(r"`(\w+)`", "".join(re.findall(r"^### .*$", page, re.M)))
    found = abi.from_table(abi.TABLE.read_text())
    enums = {name.partition(".")[0] for name in found.values}
    assert {*found.structs, *found.declared, *enums} <= set(headings)


def test_names_that_are_not_there_are_refused(docs: None) -> None:
    import reference_python

    with pytest.raises(ValueError, match="no nothing"):
        reference_python.page(DOCS.parent, {"engine.core": ["nothing"]})
    with pytest.raises(ValueError, match="no docstring"):
        reference_python.page(Path(__file__).parent, {"test_api_reference": ["bare"]})


def bare() -> None:
    raise NotImplementedError


@pytest.mark.parametrize("name", sorted(path.stem for path in SNIPPETS.glob("*.py")))
def test_python_examples(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = (SNIPPETS / f"{name}.py").read_text()
    runpy.run_path(str(SNIPPETS / f"{name}.py"))
    printed = capsys.readouterr().out.strip().splitlines()
    claimed = re.search(r"print\(.*\)  # (.+)\n\Z", code)
    if claimed:
        assert printed[-1] == claimed[1]
    else:
        figures = [float(value) for value in re.findall(r": ([\d.]+) dB", "\n".join(printed))]
        assert len(figures) == 2 and min(figures) > 12


def test_c_example(tmp_path: Path) -> None:
    library = library_path()
    include, program = DOCS.parent / "engine" / "include", tmp_path / "example"
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{include}", SNIPPETS / "c.c"]
    subprocess.run([*command, library, f"-Wl,-rpath,{library.parent}", "-o", program], check=True)
    environment = os.environ | {"RLSD_ONNXRUNTIME": str(find_onnxruntime()), "OMP_NUM_THREADS": "1"}
    bundle = DOCS.parent / "models" / "fashion" / "bundle"
    done = subprocess.run([program, bundle], env=environment, check=True, capture_output=True, text=True)
    assert re.fullmatch(r"29 steps, first pixels -?\d\.\d\d -?\d\.\d\d\n", done.stdout)
    failed = subprocess.run([program, "/nowhere"], env=environment, capture_output=True, text=True)
    assert failed.returncode == 1 and "manifest.txt" in failed.stderr
