"""Where the particles are put: similar ones near each other, none on another."""

import numpy as np
import pytest
from PIL import Image

from rlsd.pipeline.layout import ACCENT, MOST, SIDE, cells, draw_layout, embedding

RNG = np.random.default_rng(2)


def test_the_embedding_keeps_the_distances_of_what_is_flat():
    flat = RNG.normal(size=(9, 2))
    turned = flat @ np.linalg.qr(RNG.normal(size=(30, 30)))[0][:2] + 5
    found = embedding(turned.astype(np.float32))
    distances = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (flat, found)]
    np.testing.assert_allclose(distances[1], distances[0], atol=1e-4)
    assert (found[np.abs(found).argmax(0), [0, 1]] > 0).all()
    np.testing.assert_allclose(embedding(np.ones((3, 4))), 0, atol=1e-12)
    np.testing.assert_allclose(np.abs(embedding(np.array([[1.0], [3.0]]))), [[1, 0], [1, 0]], atol=1e-12)


@pytest.mark.parametrize("count", [2, 3, 10, MOST])
def test_cells_differ_and_groups_stay_together(count):
    half = count // 2
    points = RNG.normal(size=(count, 2))
    points[half:, 0] += 30
    found = cells(points)
    assert len({tuple(cell) for cell in found.tolist()}) == count and found.min() == 0
    assert found[:half, 0].mean() < found[half:, 0].mean()
    assert len({tuple(cell) for cell in cells(np.zeros((count, 2))).tolist()}) == count


def test_the_sheet_shows_every_thumbnail_once():
    colours = [(0, 40 * i, 250 - 40 * i) for i in range(6)]
    pictures = [Image.new("RGB", (28, 28), colour) for colour in colours]
    sheet = draw_layout("title", pictures, RNG.normal(size=(6, 4)), ["a label that is far too long"] * 6, marked=2)
    pixels = np.asarray(sheet)
    side = SIDE // 28 * 28
    for colour in colours:
        assert (pixels == colour).all(-1).sum() == side * side
    framed = (pixels == ACCENT).all(-1).sum()
    assert framed >= (side + 6) ** 2 - side**2 - 12
