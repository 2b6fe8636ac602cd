"""The particles of an item laid out by similarity: those that look alike lie side by side."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt

import numpy as np
from PIL import Image, ImageDraw

from rlsd.pipeline.picture import FAINT, INK, PAPER, enlarged, font

MOST = 64  # thumbnails; more cannot be told apart
ROOM = 2.0  # cells for each thumbnail, so that groups stay apart
SIDE, GAP, MARGIN, TITLE, LABEL = 64, 14, 14, 30, 15  # pixels
LONGEST = 14  # of a label, in characters
ACCENT = (47, 95, 158)


def embedding(phi: np.ndarray) -> np.ndarray:
    """[N, 2]: the two principal components of phi [N, D], which is classical scaling of its distances.

    Each axis points to where its value of largest size is positive, so that the layout is one of its mirror images.
    """
    centred = phi.astype(np.float64) - phi.mean(0, dtype=np.float64)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    found = np.zeros((len(phi), 2))
    found[:, : min(2, len(s))] = (u * s)[:, :2]
    largest = found[np.abs(found).argmax(0), [0, 1]]
    return found * np.where(largest < 0, -1, 1)


def cells(points: np.ndarray) -> np.ndarray:
    """A cell of a grid, int [N, 2] (column, row), for each point [N, 2]: all different, near where the points lie.

    The sum of squared distances between points, scaled to the grid, and their cells is the least possible.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    side = max(2, ceil(sqrt(ROOM * len(points))))
    low, extent = points.min(0), max(float(np.ptp(points, axis=0).max()), 1e-12)
    scaled = (points - low) / extent * (side - 1)
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)
    _, chosen = linear_sum_assignment(((scaled[:, None] - grid) ** 2).sum(-1))
    found: np.ndarray = grid[chosen]
    return found - found.min(0)


def draw_layout(
    title: str, pictures: Sequence[Image.Image], phi: np.ndarray, labels: Sequence[str], marked: int | None = None
) -> Image.Image:
    """Thumbnails with a label each, placed by their features phi [N, D]; `marked` has a frame. At most MOST."""
    where = cells(embedding(phi))
    columns, rows = where.max(0) + 1
    size = (2 * MARGIN + columns * (SIDE + GAP) - GAP, 2 * MARGIN + TITLE + rows * (SIDE + LABEL + GAP) - GAP)
    sheet = Image.new("RGB", (max(size[0], 300), size[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, font(14))
    for index, ((column, row), image, label) in enumerate(zip(where.tolist(), pictures, labels)):
        left, top = MARGIN + column * (SIDE + GAP), MARGIN + TITLE + row * (SIDE + LABEL + GAP)
        shown = enlarged(image.convert("RGB"), SIDE)
        corner = (left + (SIDE - shown.width) // 2, top + (SIDE - shown.height) // 2)
        sheet.paste(shown, corner)
        if index == marked:
            draw.rectangle(
                (corner[0] - 3, corner[1] - 3, corner[0] + shown.width + 2, corner[1] + shown.height + 2),
                None,
                ACCENT,
                3,
            )
        draw.text((left, top + SIDE + 1), label[:LONGEST], ACCENT if index == marked else FAINT, font(11))
    return sheet
