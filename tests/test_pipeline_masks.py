"""Masks and kernels: coverage relative to the image's size, and randomness that depends on (seed, item) alone."""

import numpy as np
import pytest

from rlsd.pipeline import masks
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.presets import FAMILIES, family_of
from rlsd.pipeline.tasks import TASKS, find_task

SHAPES = [(1, 32, 32), (1, 64, 48), (1, 512, 512)]


def mask_of(name: str, shape: tuple, seed: int = 0, item: int = 0) -> np.ndarray:
    return TASKS[name].parameters({"mask": shape}, seed, item, {}, measured=False)["mask"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "name, missing",
    [("half", 1 / 2), ("half-bottom", 1 / 2), ("box", 1 / 4), ("small-visible", 1 - (3 / 8) ** 2), ("random", 0.8)],
)
def test_share_of_missing_pixels(name, missing, shape):
    mask = mask_of(name, shape)
    assert mask.shape == shape and mask.dtype == np.float32
    assert set(np.unique(mask)) == {0, 1}
    assert abs((1 - mask.mean()) - missing) <= 0.5 / (shape[1] * shape[2]) + 1e-6


@pytest.mark.parametrize(
    "name, rows, columns",
    [
        ("half-face", (150, 450), (250, 450)),
        ("full-face", (150, 450), (150, 375)),
        ("small-box", (200, 300), (300, 400)),
    ],
)
def test_published_rectangles_at_512_and_scaled(name, rows, columns):
    missing = 1 - mask_of(name, (1, 512, 512))[0]
    assert missing[rows[0] : rows[1], columns[0] : columns[1]].all()
    assert missing.sum() == (rows[1] - rows[0]) * (columns[1] - columns[0])
    small = 1 - mask_of(name, (1, 32, 32))[0]
    assert small.sum() == pytest.approx(missing.sum() / 256, rel=0.25)


def test_jpeg_and_levels_are_what_their_summaries_say():
    given = {"seed": 0, "item": 0, "given": {}, "measured": True}
    tables = TASKS["jpeg"].parameters({"tables": (2, 8, 8)}, **given)["tables"]
    assert "quality 10" in TASKS["jpeg"].summary and np.array_equal(tables, masks.jpeg_tables((2, 8, 8), 10))
    levels = TASKS["quantise"].parameters({"levels": (1,)}, **given)["levels"]
    assert "4 levels" in TASKS["quantise"].summary and levels.tolist() == [4]


def test_which_half_is_missing():
    assert mask_of("half", (1, 32, 32))[0, :, :16].max() == 0
    assert mask_of("half-bottom", (1, 32, 32))[0, 16:].max() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_strokes_cover_10_to_20_percent(shape):
    shares = [1 - masks.missing_strokes(shape, 3, item).mean() for item in range(40 if shape[1] < 512 else 8)]
    assert min(shares) >= 0.10 and max(shares) <= 0.20
    assert max(shares) - min(shares) > 0.02


@pytest.mark.parametrize("name", ["random", "freeform"])
def test_random_masks_depend_on_seed_and_item_alone(name):
    first = mask_of(name, (1, 32, 32), seed=2**64 - 1, item=5)
    assert np.array_equal(first, mask_of(name, (1, 32, 32), seed=2**64 - 1, item=5))
    assert not np.array_equal(first, mask_of(name, (1, 32, 32), seed=2**64 - 1, item=6))
    assert not np.array_equal(first, mask_of(name, (1, 32, 32), seed=0, item=5))


def test_random_masks_are_the_same_for_ever():
    """A resumed run has to draw the masks that it drew before, with any later NumPy."""
    assert np.flatnonzero(masks.missing_pixels((1, 4, 4), 1, 2)).tolist() == [0, 3, 7]
    assert int(masks.missing_strokes((1, 32, 32), 1, 2).sum()) == 833
    assert np.flatnonzero(masks.motion_kernel((9, 9), 1, 2) > 0.05).tolist() == [33, 34, 38, 39, 40, 41, 47, 48]


@pytest.mark.parametrize("size", [9, 61, 121])
def test_motion_kernels(size):
    kernels = [masks.motion_kernel((size, size), 0, item) for item in range(10)]
    for kernel in kernels:
        assert kernel.shape == (size, size) and kernel.dtype == np.float32
        assert kernel.min() >= 0 and kernel.sum() == pytest.approx(1, abs=1e-5)
        centre = [(kernel.sum(axis) * np.arange(size)).sum() for axis in (0, 1)]
        assert centre == pytest.approx([(size - 1) / 2] * 2, abs=0.05)
        assert np.count_nonzero(kernel) >= size / 2  # a path, not a point
    assert np.array_equal(kernels[3], masks.motion_kernel((size, size), 0, 3))
    assert not np.array_equal(kernels[3], kernels[4])


def test_every_task_has_settings_in_every_family():
    for settings in FAMILIES.values():
        assert set(settings) == set(TASKS)
    assert family_of((1, 32, 32)) == "fashion" and family_of((3, 512, 512)) == "sd512"


def test_published_settings():
    half, phase = FAMILIES["sd512"]["half-face"], FAMILIES["sd512"]["phase-retrieval"]
    assert half == (999, 0.07, 0.15, 0.4, 0.8, 4, 50, 0.001, 4e-8)
    assert phase == (999, 0.07, 0.02, 0.6, 0.6, 6, 30, 0.001, 6e-8)


def test_find_task():
    assert find_task("half", {"inpainting": None}).operator == "inpainting"
    assert find_task("mine", {"mine": None}).operator == "mine"
    with pytest.raises(InputError, match=r"task 'what' is not known: choose one of half"):
        find_task("what", {"inpainting": None})
    with pytest.raises(InputError, match="needs the operator superres4, which this bundle lacks"):
        find_task("sr4", {"inpainting": None})


def test_a_measurement_needs_the_parameters_that_are_drawn():
    shapes = {"mask": (1, 32, 32)}
    assert TASKS["half"].parameters(shapes, 0, 0, {}, measured=True)["mask"].mean() == 0.5
    with pytest.raises(InputError, match="give it with --mask FILE"):
        TASKS["random"].parameters(shapes, 0, 0, {}, measured=True)
    with pytest.raises(InputError, match="give it with --param kernel=FILE"):
        TASKS["motion-blur"].parameters({"kernel": (9, 9)}, 0, 0, {}, measured=True)
