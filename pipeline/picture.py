"""Pictures of arrays: images, deviation maps, measurements. Small ones are enlarged by whole pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rlsd.pipeline import metrics
from rlsd.pipeline.fit import Frame
from rlsd.pipeline.items import Item

INK, FAINT, PAPER = (28, 32, 40), (110, 116, 128), (255, 255, 255)
MISSING = (93, 124, 168)  # where nothing was observed
_STOPS = np.array([(8, 8, 20), (66, 22, 104), (148, 40, 108), (222, 84, 76), (250, 160, 50), (252, 244, 176)], float)
_NICE = np.array([1, 1.5, 2, 3, 4, 5, 6, 8, 10])


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own typeface."""
    return ImageFont.load_default(size)


def to_bytes(image: np.ndarray) -> np.ndarray:
    """[C, H, W] in [-1, 1] (clipped) -> uint8 [H, W] for one channel, [H, W, 3] for three."""
    scaled = np.round((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)
    return scaled[0] if len(scaled) != 3 else np.moveaxis(scaled, 0, -1)


def picture(image: np.ndarray) -> Image.Image:
    """[C, H, W] in [-1, 1] as a gray or colour picture."""
    return Image.fromarray(np.ascontiguousarray(to_bytes(image)))


def heat(values: np.ndarray, top: float) -> Image.Image:
    """[H, W] from 0 (dark) to `top` (bright) in colours of growing lightness."""
    position = np.clip(values / top, 0, 1) * (len(_STOPS) - 1)
    colours = [np.interp(position, np.arange(len(_STOPS)), _STOPS[:, channel]) for channel in range(3)]
    return Image.fromarray(np.round(np.stack(colours, -1)).astype(np.uint8))


def nice_top(values: np.ndarray) -> float:
    """A round number that no value exceeds: the upper end of a scale."""
    largest = max(float(values.max(initial=0)), 1e-3)
    unit = 10 ** np.floor(np.log10(largest))
    return float(f"{unit * _NICE[_NICE * unit >= largest * (1 - 1e-9)][0]:.3g}")


def deviation_figure(values: np.ndarray, top: float) -> Image.Image:
    """The deviation map [H, W] with a bar that states its scale: 0 to `top`, in units of the images' [-1, 1]."""
    shown = enlarged(heat(values, top), 320)
    figure = Image.new("RGB", (max(shown.width, 220), shown.height + 44), PAPER)
    figure.paste(shown)
    draw = ImageDraw.Draw(figure)
    bar = heat(np.linspace(0, top, figure.width)[None].repeat(10, 0), top)
    figure.paste(bar, (0, shown.height + 6))
    for text, x, anchor in (
        ("0", 0, "la"),
        ("standard deviation", figure.width / 2, "ma"),
        (f"{top:g}", figure.width, "ra"),
    ):
        draw.text((x, shown.height + 22), text, INK, font(14), anchor)
    return figure


def measurement_picture(item: Item, frame: Frame) -> tuple[Image.Image, str]:
    """The measurement as a picture, and what is shown.

    Missing pixels are blue. A Fourier magnitude is shown as its logarithm; what is no picture is scaled from its
    least to its greatest value, and laid out as a rectangle if it has another number of axes.
    """
    y = item.y
    pictorial = item.task.pictorial and y.ndim == 3 and len(y) in (1, 3)
    if not pictorial:
        logarithmic = item.task.operator == "phase_retrieval"
        values = _as_rectangle(np.log(np.maximum(y, 1e-3)) if logarithmic else y)
        low, high = float(values.min()), float(values.max())
        shown = (values - low) / max(high - low, 1e-12) * 2 - 1
        return picture(shown), "log magnitude" if logarithmic else "measurement"
    mask = metrics.data_mask(y, item.operator_params)
    same_size = y.shape[1:] == frame.image[1:]
    shown = to_bytes(frame.crop(y) if same_size else y)
    if mask is None:
        return Image.fromarray(np.ascontiguousarray(shown)), "measurement"
    colour = shown if shown.ndim == 3 else shown[..., None].repeat(3, -1)
    known = frame.crop(mask)[0, ..., None] > 0.5
    return Image.fromarray(np.where(known, colour, np.array(MISSING, np.uint8))), "measurement"


def _as_rectangle(values: np.ndarray) -> np.ndarray:
    """[C, H, W] for any array: channels beside each other if there are not 1 or 3, other layouts folded."""
    if values.ndim == 3:
        return values if len(values) in (1, 3) else np.concatenate(list(values), 1)[None]
    if values.ndim == 2:
        return values[None]
    width = int(np.ceil(np.sqrt(values.size)))
    folded = np.full((-(-values.size // width), width), values.min(), values.dtype)
    folded.flat[: values.size] = values.ravel()
    return folded[None]


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """The picture with its longer side at most `side`: whole pixels repeated, or reduced if it is larger."""
    longest = max(image.size)
    if longest > side:
        size = (max(1, round(image.width * side / longest)), max(1, round(image.height * side / longest)))
        return image.resize(size, Image.Resampling.LANCZOS)
    times = side // longest
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
