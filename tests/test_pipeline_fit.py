"""Fitting pictures, masks and measurements to a bundle's shapes."""

import numpy as np
import pytest
from PIL import Image

from rlsd.pipeline.errors import InputError
from rlsd.pipeline.fit import Frame, centred_part, fit_image, read_measurement, read_parameter, resize_to_fill
from rlsd.pipeline.images import Picture
from rlsd.pipeline.tasks import TASKS, find_task

RNG = np.random.default_rng(0)
GRAY8 = RNG.integers(0, 256, (12, 20), np.uint8)
FRAME = Frame((1, 32, 32), (2, 2, 2, 2))


def test_content_gets_its_border_and_loses_it_again():
    image = RNG.uniform(-1, 1, (1, 28, 28)).astype(np.float32)
    fitted = fit_image(Picture(image), FRAME)
    assert fitted.values.shape == (1, 32, 32) and fitted.notes == ("black border added to 32x32",)
    assert (fitted.values[:, :2] == -1).all() and (fitted.values[..., 30:] == -1).all()
    np.testing.assert_array_equal(FRAME.crop(fitted.values), image)


def test_a_border_that_differs_on_each_side():
    frame = Frame((1, 10, 12), (1, 2, 3, 4))
    assert frame.content == (4, 8)
    padded = frame.pad(np.ones((1, 4, 8)))
    assert padded.shape == (1, 10, 12) and padded[0, 2, 1] == 1 and padded[0, 1, 1] == -1 and padded[0, 2, 0] == -1


def test_full_size_stays_and_others_are_resized():
    full = RNG.uniform(-1, 1, (1, 32, 32)).astype(np.float32)
    assert fit_image(Picture(full), FRAME).values is full
    photo = fit_image(Picture(np.full((3, 100, 50), 0.25, np.float32)), FRAME)
    assert photo.notes == (
        "colour turned to gray",
        "resized and cut from 50x100 to 28x28",
        "black border added to 32x32",
    )
    np.testing.assert_allclose(FRAME.crop(photo.values), 0.25, atol=1e-5)


def test_resize_keeps_the_centre():
    image = np.full((1, 60, 120), -1, np.float32)
    image[:, :, 30:90] = 1
    resized = resize_to_fill(image, (20, 20))
    np.testing.assert_array_equal(resized[..., 3:17], 1)  # at the edge the filter sees what was cut
    assert resized.min() > 0.8
    stripes = np.where(np.arange(60) % 6 < 3, -1, 1).astype(np.float32) * np.ones((1, 40, 1), np.float32)
    assert abs(resize_to_fill(stripes, (32, 48))).max() == 1  # where the filter swings beyond


@pytest.mark.parametrize("size", [(900, 1200), (1200, 900), (29, 50)])
def test_photos_of_any_size_are_fitted(size):
    assert resize_to_fill(np.zeros((1, *size), np.float32), (28, 28)).shape == (1, 28, 28)


def test_the_part_that_is_kept_lies_in_the_picture():
    sizes = [*range(1, 1300, 7), 900, 1024, 4000]
    for wanted in ((28, 28), (512, 512), (48, 64)):
        for height, width in ((h, w) for h in sizes for w in sizes):
            left, top, right, bottom = centred_part((height, width), wanted)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert (bottom - top) * wanted[1] == pytest.approx((right - left) * wanted[0])


def test_colour_and_gray():
    red = np.full((3, 32, 32), -1, np.float32)
    red[0] = 1
    assert fit_image(Picture(red), FRAME).values[0, 5, 5] == pytest.approx(2 * 0.299 - 1, abs=1e-6)
    gray = fit_image(Picture(red[:1]), Frame((3, 32, 32)))
    assert gray.values.shape == (3, 32, 32) and gray.notes == ("gray repeated in each channel",)


def test_measurements(tmp_path):
    path = tmp_path / "y.npy"
    for shape in ((1, 8, 8), (8, 8), (8, 8, 1)):
        np.save(path, np.full(shape, 1.5))
        assert read_measurement(path, (1, 8, 8), FRAME).shape == (1, 8, 8)
    np.save(path, np.full((28, 28), 0.5))
    assert read_measurement(path, (1, 32, 32), FRAME, pointwise=True)[0, 0, 0] == -1
    Image.fromarray(GRAY8).save(tmp_path / "y.png")
    np.testing.assert_allclose(
        read_measurement(tmp_path / "y.png", (1, 12, 20), FRAME), GRAY8[None] / 127.5 - 1, atol=1e-6
    )
    np.save(path, GRAY8)  # whole numbers are a picture's, whatever the file
    np.testing.assert_allclose(read_measurement(path, (1, 12, 20), FRAME), GRAY8[None] / 127.5 - 1, atol=1e-6)
    np.save(path, np.arange(5.0))
    assert read_measurement(path, (5,), FRAME).tolist() == [0, 1, 2, 3, 4]


def test_bad_measurements(tmp_path):
    path = tmp_path / "y.npy"
    np.save(path, np.zeros((9, 9)))
    with pytest.raises(InputError, match="has the shape 9 x 9; 1 x 8 x 8 is wanted"):
        read_measurement(path, (1, 8, 8), FRAME)
    np.save(path, np.zeros((28, 28)))  # of the content's size, where the measurement is of another
    with pytest.raises(InputError, match="has the shape 28 x 28; 1 x 8 x 8 is wanted"):
        read_measurement(path, (1, 8, 8), FRAME, pointwise=True)
    np.save(path, np.full((1, 8, 8), np.nan))
    with pytest.raises(InputError, match="NaN or infinite; a measurement must be finite"):
        read_measurement(path, (1, 8, 8), FRAME)
    Image.fromarray(GRAY8).save(tmp_path / "y.png")
    with pytest.raises(InputError, match="give it as floating-point NPY"):
        read_measurement(tmp_path / "y.png", (1, 12, 20), FRAME, pictorial=False)


def test_the_border_is_added_where_no_pixels_are_mixed(tmp_path):
    np.save(tmp_path / "y.npy", np.zeros((28, 28)))
    with pytest.raises(InputError, match="has the shape 28 x 28; 1 x 32 x 32 is wanted, measured with the prior's bla"):
        read_measurement(tmp_path / "y.npy", (1, 32, 32), FRAME)
    operators = [task.operator for task in TASKS.values()]
    operators += [f"{first}-{second}" for first in operators for second in operators]
    keep = {name for name in TASKS if find_task(name, operators).pointwise}
    masked = {name for name, task in TASKS.items() if task.operator == "inpainting"}
    assert keep == masked | {"hdr", "colour", "quantise"}
    for name, pointwise in (("half+hdr", True), ("half+jpeg", False), ("jpeg+half", False), ("mine", False)):
        assert find_task(name, [*operators, "mine"]).pointwise == pointwise


def test_masks_from_files(tmp_path):
    white = np.zeros((28, 28), np.uint8)
    white[:, 14:] = 255
    Image.fromarray(white).save(tmp_path / "m.png")
    mask = read_parameter(tmp_path / "m.png", "mask", (1, 32, 32), FRAME)
    assert mask[0, 5, 5] == 0 and mask[0, 5, 25] == 1 and mask[0, 0, 0] == 1  # the border is known to be black
    np.save(tmp_path / "m.npy", mask[0].astype(bool))
    np.testing.assert_array_equal(read_parameter(tmp_path / "m.npy", "mask", (1, 32, 32), FRAME), mask)
    np.save(tmp_path / "bad.npy", mask * 0.5)
    with pytest.raises(InputError, match="values other than 0 and 1"):
        read_parameter(tmp_path / "bad.npy", "mask", (1, 32, 32), FRAME)
    with pytest.raises(InputError, match="has the shape 1 x 32 x 32; 1 x 16 x 16 is wanted"):
        read_parameter(tmp_path / "bad.npy", "mask", (1, 16, 16), Frame((1, 16, 16)))


def test_a_mask_may_be_a_picture_of_0_and_1(tmp_path):
    wanted = np.zeros((1, 32, 32), np.float32)
    wanted[:, 16:] = 1
    for kind in (np.uint8, np.uint16):
        Image.fromarray(wanted[0].astype(kind)).save(tmp_path / "m.png")
        np.testing.assert_array_equal(read_parameter(tmp_path / "m.png", "mask", (1, 32, 32), FRAME), wanted)
    Image.fromarray(wanted[0].astype(np.uint8)[..., None].repeat(3, 2)).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_parameter(tmp_path / "m.png", "first_mask", (1, 32, 32), FRAME), wanted)


@pytest.mark.parametrize("size", [28, 32])
def test_a_mask_that_hides_everything_is_refused(tmp_path, size):
    np.save(tmp_path / "m.npy", np.pad(np.zeros((28, 28)), (size - 28) // 2, constant_values=1))
    Image.fromarray(np.full((size, size), 2, np.uint8)).save(tmp_path / "m.png")
    for name in ("m.npy", "m.png"):
        with pytest.raises(InputError, match=f"{name} hides every pixel; a mask is 1 or white where"):
            read_parameter(tmp_path / name, "mask", (1, 32, 32), FRAME)


def test_kernels_from_files(tmp_path):
    np.save(tmp_path / "k.npy", np.full((3, 3), 1 / 9))
    assert read_parameter(tmp_path / "k.npy", "kernel", (3, 3), FRAME).shape == (3, 3)
    np.save(tmp_path / "k.npy", np.ones((3, 3)))
    with pytest.raises(InputError, match="sums to 9; a blur kernel must sum to 1"):
        read_parameter(tmp_path / "k.npy", "kernel", (3, 3), FRAME)
    Image.fromarray(np.full((3, 3), 200, np.uint8)).save(tmp_path / "k.png")
    np.testing.assert_allclose(read_parameter(tmp_path / "k.png", "kernel", (3, 3), FRAME), 1 / 9, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("levels", [1], "whole numbers of 2 or more"),
        ("second_levels", [2.5], "whole numbers of 2 or more"),
        ("levels", [-4], "whole numbers of 2 or more"),
        ("tables", [0, 16], "whole numbers from 1 to 255"),
        ("first_tables", [-1, 16], "whole numbers from 1 to 255"),
        ("tables", [1.5, 16], "whole numbers from 1 to 255"),
        ("tables", [256, 16], "whole numbers from 1 to 255"),
    ],
)
def test_parameters_that_no_operator_takes(tmp_path, name, values, allowed):
    np.save(tmp_path / "p.npy", np.array(values, float))
    with pytest.raises(InputError, match=f"the parameter {name} cannot have; allowed are {allowed}"):
        read_parameter(tmp_path / "p.npy", name, (len(values),), FRAME)
    np.save(tmp_path / "p.npy", np.array([2.0, 255.0]))
    assert read_parameter(tmp_path / "p.npy", name, (2,), FRAME).tolist() == [2, 255]
