"""The paper's Figure 2 for our tasks: rows are methods, columns are particles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from rlsd.bench.quality.items import Item
from rlsd.bench.quality.problem import Array
from rlsd.pipeline.fit import Frame
from rlsd.pipeline.items import Item as PipelineItem
from rlsd.pipeline.picture import INK, PAPER, enlarged, font, measurement_picture, picture
from rlsd.pipeline.settings import settings_for
from rlsd.pipeline.tasks import TASKS

CELL, GAP, LABEL, SHOWN, MOST = 64, 3, 210, 2, 8


def figure(task: str, items: Sequence[Item], particles: Mapping[str, Array], frame: Frame) -> Image.Image:
    """The first SHOWN items beside each other: the photo, what was measured, and the particles of every method.

    particles: [n, N, 1, 32, 32] of each method, by its name.
    """
    count = min(MOST, max(p.shape[1] for p in particles.values()))
    block = (count + 2) * (CELL + GAP) + 4 * GAP
    sheet = Image.new("RGB", (LABEL + SHOWN * block, 22 + len(particles) * (CELL + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, (name, drawn) in enumerate(particles.items()):
        top = 22 + row * (CELL + GAP)
        draw.text((6, top + CELL / 2), name, INK, font(14), "lm")
        for column, (item, images) in enumerate(zip(items[:SHOWN], drawn)):
            left = LABEL + column * block
            cells = [picture(frame.crop(item.truth)), measured(task, item, frame)] if row == 0 else [None, None]
            for i, cell in enumerate([*cells, *(picture(frame.crop(image)) for image in images[:count])]):
                if cell is not None:
                    shown = enlarged(cell.convert("RGB"), CELL)
                    sheet.paste(shown, (left + i * (CELL + GAP) + (CELL - shown.width) // 2, top))
    for column in range(SHOWN):
        for i, label in enumerate(("photo", "measured", "particles")):
            draw.text((LABEL + column * block + i * (CELL + GAP), 4), label, INK, font(12))
    return sheet.quantize(128)


def measured(task: str, item: Item, frame: Frame) -> Image.Image:
    """The measurement as the pipeline shows it."""
    of_task = TASKS[task]
    shown = PipelineItem(item.index, "", of_task, settings_for(of_task, "fashion", {}), item.y, item.params)
    return measurement_picture(shown, frame)[0]
