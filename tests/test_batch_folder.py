"""The output folder of `rlsd batch`, where a crash or somebody has spoilt what was finished."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from batch_case import batch, bundle, contents, here  # noqa: F401


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]"])
def test_an_item_that_cannot_be_read_is_named_and_done_again(capsys: pytest.CaptureFixture[str], content) -> None:
    assert batch() == 0
    wanted = contents(Path("out"))
    Path("out/items/000003-3/item.json").write_bytes(content)
    capsys.readouterr()
    assert batch() == 2
    said = capsys.readouterr().err
    assert said.startswith("rlsd: out/items/000003-3/item.json cannot be read") and said.count("\n") == 1
    assert "remove the folder out/items/000003-3 and" in said
    shutil.rmtree("out/items/000003-3")
    assert batch() == 0 and contents(Path("out")) == wanted
