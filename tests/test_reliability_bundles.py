"""A short run of tests/corrupted_bundles.py; its full run is in RELIABILITY.md."""

import pytest

pytest.importorskip("onnx")
import corrupted_bundles


def test_corrupted_bundles_are_refused_clearly(tmp_path):
    verdicts = list(corrupted_bundles.campaign(96, 1, tmp_path))
    assert {verdict.kind for verdict in verdicts} == {
        change.__name__ for change in (*corrupted_bundles.DAMAGE, *corrupted_bundles.LIES)
    }
    wrong = [f"{verdict.kind} {verdict.detail}: {verdict.fault}" for verdict in verdicts if verdict.fault]
    assert not wrong


def test_the_judge_notices(tmp_path):
    """What is not altered is not refused, and that counts as a fault."""
    source = corrupted_bundles.write_bundle(tmp_path / "tiny", corrupted_bundles.make_nets())
    verdict = corrupted_bundles.judge(source, tmp_path, lambda bundle, rng: "nothing", None)
    assert verdict.fault == "the answer is None"
