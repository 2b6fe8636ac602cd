"""Nothing is reported to anyone: ONNX Runtime's official builds would, and leave an identifier in the user's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OPENED = (
    "from rlsd.engine import Engine; from rlsd.models.fashion import PATH; Engine(PATH / 'bundle', threads=1).close()"
)


def left_behind(home: Path, program: str, **variables: str) -> list[str]:
    """What a Python program writes below a home of its own, in an environment of nothing else."""
    home.mkdir()
    given = {"HOME": str(home), "PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", program], env=given | variables, check=True, timeout=300)
    return sorted(file.name for file in home.rglob("*") if file.is_file())


@pytest.fixture(scope="module", autouse=True)
def reporting_build(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("onnxruntime")
    if not left_behind(tmp_path_factory.mktemp("bare") / "home", "import onnxruntime"):
        pytest.skip("this build of ONNX Runtime reports nothing")


def test_an_engine_reports_nothing_unless_the_user_wants_it(tmp_path: Path) -> None:
    assert left_behind(tmp_path / "quiet", OPENED) == []
    assert left_behind(tmp_path / "wanted", OPENED, ORT_DISABLE_TELEMETRY="0") != []


@pytest.mark.parametrize("room", ["export", "bench"])
def test_rooms_that_import_onnxruntime_report_nothing(tmp_path: Path, room: str) -> None:
    pytest.importorskip("torch")
    assert left_behind(tmp_path / "home", f"import rlsd.{room}, onnxruntime") == []
