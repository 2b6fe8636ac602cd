"""What `rlsd batch` takes for its inputs: patterns that match its own output, links that lead nowhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from batch_case import batch, bundle, contents, failures, here  # noqa: F401

from rlsd.pipeline.batch_list import list_inputs
from rlsd.pipeline.errors import InputError


def test_a_pattern_does_not_match_what_the_batch_has_written() -> None:
    Path("real").mkdir()
    Path("results").symlink_to("real")
    words = ["--pictures", "--log", "log"]
    assert batch(*words, source="**/*.png", out="results/a") == 0
    before = contents(Path("real/a"))
    os.unlink("real/a/items.csv")
    assert batch(*words, source="**/*.png", out="results/a") == 0
    assert contents(Path("real/a")) == before and len(os.listdir("real/a/items")) == 6
    with pytest.raises(InputError, match=r"matches no file outside of the output folder$"):
        list_inputs(["in/*.png"], None, (), Path())
    with pytest.raises(InputError, match=r"matches no file$"):
        list_inputs(["none/*.png"], None, (), Path("results/a"))


@pytest.mark.parametrize("source", ["in", "in/*.png"])
def test_links_that_lead_nowhere_are_items_that_fail(source: str) -> None:
    os.symlink("loop.png", "in/loop.png")
    os.rename("in/3.png", "kept.png")
    os.symlink("../gone.png", "in/3.png")
    os.mkdir("elsewhere")
    os.symlink("../elsewhere", "in/folder.png")
    assert batch(source=source) == 1
    found = failures(Path("out"))
    assert list(found) == ["000003-3", "000006-loop"]
    assert "does not exist" in found["000003-3"] and "levels of symbolic links" in found["000006-loop"]
    os.rename("kept.png", "gone.png")
    assert batch(source=source) == 1
    assert list(failures(Path("out"))) == ["000006-loop"] and len(os.listdir("out/items")) == 6


@pytest.mark.parametrize("more", [[], ["-i", "in/0.png"]])
def test_an_empty_word_is_not_the_current_folder(capsys: pytest.CaptureFixture[str], monkeypatch, more) -> None:
    monkeypatch.chdir("in")
    os.symlink("../bundle", "bundle")
    assert batch(*more, source="") == 2
    assert "rlsd: input is empty, as an unset variable" in capsys.readouterr().err and not Path("out").exists()
