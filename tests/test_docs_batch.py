"""The page on batches: its commands and code, as they stand there, on smaller settings."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from rlsd.models.fashion import PATH
from rlsd.pipeline import cli

PAGE = (Path(__file__).parent.parent / "docs" / "batch.md").read_text()
COMMANDS = re.findall(r"^    rlsd (.*)$", PAGE, re.M)
(TABLE,) = re.findall(r"```csv\n(.*?)```", PAGE, re.S)
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def test_every_command_does_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for file in sorted((PATH / "test_images").iterdir())[:3]:
        shutil.copy(file, "photos")
    Path("masks").mkdir()
    Image.new("L", (32, 32), 255).save("masks/a.png")
    Path("list.csv").write_text(TABLE)
    for command in COMMANDS:
        quick = ["--steps", "3", *(["--particles", "2"] if "--particles" not in command else []), "--threads", "1"]
        assert cli.run([*command.split(), *quick]) == 0, command
    assert sorted(file.name for file in Path("listed/items").iterdir()) == ["000002-0000-ankle-boot", "first", "second"]
    assert {file.name for file in Path("results").iterdir()} == {"run.json", "items", "items.csv"}
    assert "rlsd_batch_items_done_total 3" in Path("rlsd.prom").read_text() and Path("rlsd.jsonl").exists()
    capsys.readouterr()
    exec(compile(CODE, "batch.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[0] == "000000-0000-ankle-boot (1, 32, 32)"
