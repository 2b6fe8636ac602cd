"""Masks and blur kernels, relative to the size of the image, and JPEG's tables. NumPy only.

Masks are [1, H, W] float32, 1 where a pixel is observed and 0 where it is missing. What is random depends on
(seed, item) alone, through NumPy's Philox generator.
"""

from __future__ import annotations

import numpy as np

Shape = tuple[int, ...]
Span = tuple[float, float]

_MASK, _KERNEL = 1, 2  # separate streams of random numbers


def _generator(seed: int, item: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=[0, 0, 0, item]))


def missing_rectangle(shape: Shape, rows: Span, columns: Span) -> np.ndarray:
    """A mask of `shape` [1, H, W] that hides a rectangle; rows and columns are shares of the height and width."""
    mask = np.ones(shape, np.float32)
    top, bottom = (round(share * shape[1]) for share in rows)
    left, right = (round(share * shape[2]) for share in columns)
    mask[:, top:bottom, left:right] = 0
    return mask


def visible_rectangle(shape: Shape, rows: Span, columns: Span) -> np.ndarray:
    """The opposite of missing_rectangle: only the rectangle is observed."""
    return 1 - missing_rectangle(shape, rows, columns)


def missing_pixels(shape: Shape, seed: int, item: int, share: float = 0.8) -> np.ndarray:
    """A mask of `shape` [1, H, W] that hides `share` of the pixels, chosen independently of each other."""
    pixels = shape[1] * shape[2]
    order = np.argsort(_generator(seed, item, _MASK).random(pixels), kind="stable")
    mask = np.ones(pixels, np.float32)
    mask[order[: round(share * pixels)]] = 0
    return mask.reshape(shape)


def missing_strokes(shape: Shape, seed: int, item: int, least: float = 0.10, most: float = 0.20) -> np.ndarray:
    """A free-form mask of `shape` [1, H, W]: irregular strokes hide between `least` and `most` of the pixels.

    A stroke is a random walk of discs whose direction drifts; strokes are drawn until the share that was
    drawn for this item is reached. One disc hides less than 1 % of the image.
    """
    generator, (height, width) = _generator(seed, item, _MASK), shape[1:]
    side = min(height, width)
    aim = generator.uniform(least, most - 0.01) * height * width
    missing, count = np.zeros((height, width), bool), 0
    while count < aim:
        radius = side * generator.uniform(0.02, 0.04)
        row, column = generator.uniform(0, height), generator.uniform(0, width)
        angle = generator.uniform(0, 2 * np.pi)
        for _ in range(int(generator.integers(6, 25))):
            count += _disc(missing, row, column, max(radius, 0.6))
            if count >= aim:
                break
            angle += generator.normal(0, 0.5)
            row, column = row + radius * np.sin(angle), column + radius * np.cos(angle)
    return (~missing).astype(np.float32)[None]


def _disc(missing: np.ndarray, row: float, column: float, radius: float) -> int:
    """Sets the pixels whose centres lie in the disc; returns how many are new."""
    top, left = max(int(row - radius), 0), max(int(column - radius), 0)
    part = missing[top : max(int(row + radius) + 1, 0), left : max(int(column + radius) + 1, 0)]
    y, x = np.ogrid[: part.shape[0], : part.shape[1]]
    new = ((y + top + 0.5 - row) ** 2 + (x + left + 0.5 - column) ** 2 <= radius**2) & ~part
    part |= new
    return int(new.sum())


def motion_kernel(shape: Shape, seed: int, item: int, bend: float = 0.09) -> np.ndarray:
    """The point spread function of a shaking camera: `shape` [k, k], k odd, float32, non-negative, summing to 1.

    The camera moves along a path whose direction drifts: a random walk, `bend` radians per tap of 121. Its centre of
    mass lies in the middle, its farthest point three quarters of the way to the kernel's edge or more. (The published
    runs' generator has an intensity of 0.09 as well, of another kind: a bound on the angle of each step, which is not
    summed up. Its paths are straighter, and their length is random from 0 on.)
    """
    size, generator = shape[0], _generator(seed, item, _KERNEL)
    finest = 16  # points of the path per tap
    count = finest * size
    drift = np.cumsum(generator.normal(0, 1, count)) * bend * np.sqrt(121 / size) / np.sqrt(finest)
    angle = generator.uniform(0, 2 * np.pi) + drift
    speed = np.exp(0.5 * np.sin(np.linspace(0, 2 * np.pi, count) + generator.uniform(0, 2 * np.pi)))
    path = np.cumsum(np.stack([speed * np.sin(angle), speed * np.cos(angle)]), axis=1)
    path -= path.mean(axis=1, keepdims=True)
    reach = (size - 1) / 2 - 0.5  # bilinear splats must stay inside
    path *= generator.uniform(0.75, 1.0) * reach / np.abs(path).max()
    kernel = _splat(path + (size - 1) / 2, size)[::-1, ::-1]  # where the scene goes while the camera takes the path
    return (kernel / kernel.sum()).astype(np.float32)


def _splat(path: np.ndarray, size: int) -> np.ndarray:
    """[size, size] histogram of the points (rows, columns) [2, n], each shared bilinearly by its four pixels."""
    kernel = np.zeros((size, size))
    low = np.floor(path).astype(int)
    part = path - low
    for down in (0, 1):
        for right in (0, 1):
            weight = np.abs(1 - down - part[0]) * np.abs(1 - right - part[1])
            np.add.at(kernel, (np.minimum(low[0] + down, size - 1), np.minimum(low[1] + right, size - 1)), weight)
    return kernel


# ITU-T T.81, tables K.1 and K.2: what most programs scale by their quality.
_LUMA = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
_CHROMA = """17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99"""


def jpeg_tables(shape: Shape, quality: int) -> np.ndarray:
    """Quantisation tables of `shape` [1 or 2, 8, 8], luma and chroma: quality 1 to 100, scaled as libjpeg does."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    tables = np.array([_LUMA.split(), _CHROMA.split()], np.int64)[: shape[0]].reshape(shape)
    return np.clip((tables * scale + 50) // 100, 1, 255).astype(np.float32)
