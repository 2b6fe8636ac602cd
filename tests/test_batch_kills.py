"""A short campaign of kills; `python tests/batch_kills.py` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest
from batch_kills import WAYS, run


@pytest.mark.parametrize(("name", "ways", "kills"), [("tiny", ("time", *WAYS), 8), ("workers", ("worker", "time"), 2)])
def test_nothing_is_lost(tmp_path: Path, name: str, ways: tuple[str, ...], kills: int) -> None:
    campaign = run(name, tmp_path / name, 3, ways, kills)
    line = campaign.line()
    assert campaign.differences == [] and line["kills"] >= kills and line["unusable_snapshots"] == 0
    assert line["resumed_from_snapshot"] > 0 or name == "workers"


def test_a_difference_would_be_seen(tmp_path: Path) -> None:
    campaign = run("tiny", tmp_path / "tiny", 3, ("time",), 1)
    changed = tmp_path / "tiny/out/items/000004-04/item.json"
    changed.write_text(changed.read_text().replace("0.01", "0.02", 1))
    (tmp_path / "tiny/out/items/000005-05").rename(tmp_path / "tiny/out/items/else")
    campaign.finish()
    assert campaign.differences == ["items/000004-04/item.json"] or set(campaign.differences) >= {
        "items/000004-04/item.json", "items/else/item.json",
    }  # fmt: skip
