"""A short run of tests/nan_steps.py; its full run is in RELIABILITY.md."""

import dataclasses

import pytest

pytest.importorskip("onnx")
import nan_steps


def test_nan_is_found_within_its_step(tmp_path):
    """In the first step, one in the middle, and the last decoding, which no later step would notice."""
    verdicts = list(nan_steps.campaign(tmp_path, (0, 4, nan_steps.STEPS)))
    assert {verdict.output for verdict in verdicts} == set(nan_steps.OUTPUTS) and len(verdicts) > 25
    assert not [verdict for verdict in verdicts if verdict.fault]


def test_the_judge_notices(tmp_path):
    """Where no NaN comes, none is found, and that counts as a fault."""
    bundle = nan_steps.write_bundle(tmp_path / "bundle", nan_steps.NETS, nan_steps.BATCH)
    state = nan_steps.undisturbed(bundle, "rlsd")[2]
    elsewhere = dataclasses.replace(state, z=state.z + 1)
    verdict = nan_steps.judge(tmp_path / "never", "decoder.image", "rlsd", 2, elsewhere)
    assert verdict.found is None and verdict.fault.startswith("found in tick None")
