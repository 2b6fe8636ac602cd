"""Chains of two tasks: the parameters of both are what they would be alone, and the last mask is the measurement's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from rlsd.pipeline.errors import InputError
from rlsd.pipeline.fit import Frame, read_parameter
from rlsd.pipeline.items import check_kernels, observed
from rlsd.pipeline.tasks import TASKS, named_task

FRAME = Frame((1, 8, 8))


def test_a_chain_makes_the_parameters_of_both() -> None:
    shapes = {"first_kernel": (9, 9), "second_mask": (1, 8, 8)}
    made = named_task("motion-blur+box").parameters(shapes, 3, 5, {}, measured=False)
    alone = TASKS["motion-blur"].parameters({"kernel": (9, 9)}, 3, 5, {}, measured=False)
    assert np.array_equal(made["first_kernel"], alone["kernel"])
    assert made["second_mask"].mean() == 0.75


def test_a_chain_measures_what_its_last_part_measures() -> None:
    for name, pictorial in (("hdr+phase-retrieval", False), ("phase-retrieval+hdr", True), ("sr4+jpeg", True)):
        assert named_task(name).pictorial == pictorial
    assert named_task("colour+jpeg").channels == 3 and named_task("jpeg+colour").channels is None


def test_what_both_draw_differs() -> None:
    shapes = {"first_mask": (1, 32, 32), "second_mask": (1, 32, 32)}
    for seed in (0, 2**64 - 1):
        made = named_task("random+random").parameters(shapes, seed, 0, {}, measured=False)
        alone = TASKS["random"].parameters({"mask": (1, 32, 32)}, seed, 0, {}, measured=False)
        assert np.array_equal(made["first_mask"], alone["mask"])
        both = float((made["first_mask"] * made["second_mask"]).mean())
        assert 0.01 < both < 0.08  # 0.2 times 0.2, not 0.2


def test_what_lies_under_the_last_mask_is_no_measurement() -> None:
    y = np.full((1, 2, 2), 0.5, np.float32)
    hidden, seen = np.zeros((1, 2, 2), np.float32), np.ones((1, 2, 2), np.float32)
    assert not observed(y, {"first_mask": seen, "second_mask": hidden}).any()
    assert observed(y, {"first_mask": hidden, "second_mask": seen}).all()


def test_files_of_a_chain_are_read_as_what_they_are(tmp_path: Path) -> None:
    grey = np.full((8, 8), 90, np.uint8)
    grey[:, 4:] = 160
    Image.fromarray(grey).save(tmp_path / "grey.png")
    for name in ("mask", "first_mask", "second_mask"):
        mask = read_parameter(tmp_path / "grey.png", name, (1, 8, 8), FRAME)
        assert set(np.unique(mask[..., :4])) == {0} and set(np.unique(mask[..., 4:])) == {1}
    for name in ("kernel", "second_kernel"):
        assert read_parameter(tmp_path / "grey.png", name, (8, 8), FRAME).sum() == pytest.approx(1)
    np.save(tmp_path / "half.npy", np.full((1, 8, 8), 0.5, np.float32))
    with pytest.raises(InputError, match="values other than 0 and 1"):
        read_parameter(tmp_path / "half.npy", "first_mask", (1, 8, 8), FRAME)


@pytest.mark.parametrize("task", ["motion-blur", "nonlinear-blur", "sr4+motion-blur"])
def test_kernels_for_a_bundle_that_turns_them_are_refused(task: str) -> None:
    """rlsd 0.1 correlated: what is drawn is as good either way, a kernel that was measured is not."""
    name = "second_kernel" if "+" in task else "kernel"
    old, new = (SimpleNamespace(describe=lambda v=v: {"producer": [f"rlsd {v}"]}) for v in ("0.1.0", "0.2.0"))
    with pytest.raises(InputError, match=r"made by rlsd 0\.1\.0, whose blurs take kernels turned by 180 degrees"):
        check_kernels(old, named_task(task), [name])
    check_kernels(old, named_task(task), [])
    check_kernels(new, named_task(task), [name])
    check_kernels(old, TASKS["half"], ["mask"])
