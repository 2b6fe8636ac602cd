"""The grid picture of an item: input, measurement, particles, mean and deviation side by side, labelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from rlsd.pipeline.picture import FAINT, INK, PAPER, enlarged, font

SMALL_CELL, LARGE_CELL, WIDEST = 140, 240, 1900  # pixels
GAP, MARGIN, TITLE, LABELS = 10, 14, 30, 36


@dataclass(frozen=True)
class Cell:
    """One picture with its label, and a smaller second line."""

    image: Image.Image
    label: str
    detail: str = ""


def draw_grid(title: str, cells: Sequence[Cell]) -> Image.Image:
    """All cells under a title, in as few rows as fit the width, all about as long."""
    side = SMALL_CELL if max(max(cell.image.size) for cell in cells) <= SMALL_CELL else LARGE_CELL
    count = -(-len(cells) * (side + GAP) // (WIDEST - 2 * MARGIN + GAP))
    per_row = -(-len(cells) // count)
    rows = [cells[start : start + per_row] for start in range(0, len(cells), per_row)]
    width = 2 * MARGIN + per_row * (side + GAP) - GAP
    height = TITLE + 2 * MARGIN + len(rows) * (side + LABELS + GAP) - GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, font(17))
    for index, row in enumerate(rows):
        top = MARGIN + TITLE + index * (side + LABELS + GAP)
        for column, cell in enumerate(row):
            _draw_cell(sheet, draw, cell, (MARGIN + column * (side + GAP), top), side)
    return sheet


def _draw_cell(sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, corner: tuple[int, int], side: int) -> None:
    left, top = corner
    draw.text((left, top), cell.label, INK, font(14))
    draw.text((left, top + 17), cell.detail, FAINT, font(12))
    shown = enlarged(cell.image.convert("RGB"), side)
    # smaller pictures stand in the middle of their cell
    sheet.paste(shown, (left + (side - shown.width) // 2, top + LABELS + (side - shown.height) // 2))


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other, on one sheet of paper."""
    sheet = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), PAPER)
    top = 0
    for each in sheets:
        sheet.paste(each, (0, top))
        top += each.height
    return sheet
