"""Forward operators f: x -> y as torch modules of a few lines. Any differentiable module can stand beside them.

An operator maps images x [B, C, H, W] in [-1, 1] and its parameters (inputs too, one set an item) to
measurements y [B, ...]. Separable linear maps are written as products with small matrices: their pull-back is the
transposed product, in torch as in ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rlsd.export.operators_base import Operator
from rlsd.export.operators_camera import BLOCK, Jpeg, Luminance, NonlinearBlur, Quantisation


class Inpainting(Operator):
    """y = mask * x. mask: [B, 1, H, W], 1 where a pixel is observed, 0 where it is missing."""

    def parameters_of(self, image: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        return {"mask": (1, *image[1:])}

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask


class Separable(Operator):
    """y = R x C^T with a matrix R for the rows and C for the columns."""

    def __init__(self, rows: Tensor, columns: Tensor):
        super().__init__()
        self.register_buffer("rows", rows.float())
        self.register_buffer("columns_t", columns.float().T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return self.rows @ x @ self.columns_t


class MotionBlur(Operator):
    """Convolution with one k x k kernel an item (summing to 1), reflected at the border.

    kernel: [B, k, k], the point spread function: the image of one bright pixel, as scipy.ndimage.convolve takes it.
    """

    def __init__(self, image: Sequence[int], size: int):
        super().__init__()
        self.size = size
        self.register_buffer("pad_rows", reflect_matrix(image[1], size // 2).float())
        self.register_buffer("pad_columns_t", reflect_matrix(image[2], size // 2).float().T.contiguous())

    def parameters_of(self, image: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        return {"kernel": (self.size, self.size)}

    def forward(self, x: Tensor, kernel: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        padded = self.pad_rows @ x @ self.pad_columns_t
        turned = kernel.flip(1, 2)  # which makes a convolution of what conv2d does
        if x.dtype == torch.float64:
            return correlated(padded, turned, height, width)
        each = turned[:, None].expand(batch, channels, self.size, self.size)
        groups = batch * channels
        blurred = nn.functional.conv2d(
            padded.reshape(1, groups, *padded.shape[2:]), each.reshape(groups, 1, self.size, self.size), groups=groups
        )
        return blurred.reshape(batch, channels, height, width)


class PhaseRetrieval(Operator):
    """y = |F((x + 1) / 2)|: magnitude of the centred orthonormal Fourier transform of the zero-padded image.

    A quarter of the image's size is added on each side: 128 at 512, as in the paper, whose code calls it oversampling
    2; there are 1.5 times the samples on each axis. The transform is a product with two real matrices a side, which is
    exact, real and differentiable everywhere but at magnitude 0, where the gradient is taken as 0.
    """

    linear = False

    def __init__(self, image: Sequence[int]):
        super().__init__()
        for name, size in (("rows", image[1]), ("columns", image[2])):
            cos, sin = fourier_matrices(size, size // 4)
            self.register_buffer(f"{name}_cos", cos.float())
            self.register_buffer(f"{name}_sin", sin.float())

    def forward(self, x: Tensor) -> Tensor:
        image = (x + 1) / 2
        cos, sin = self.rows_cos @ image, self.rows_sin @ image
        real = cos @ self.columns_cos.T - sin @ self.columns_sin.T
        imaginary = cos @ self.columns_sin.T + sin @ self.columns_cos.T
        return (real**2 + imaginary**2 + 1e-20).sqrt()


class Hdr(Operator):
    """y = clip(2 x, -1, 1): an exposure twice too long."""

    linear = False

    def forward(self, x: Tensor) -> Tensor:
        return (2 * x).clamp(-1, 1)


class Chain(Operator):
    """y = second(first(x)); the parameters of the two are first_NAME and second_NAME."""

    def __init__(self, first: nn.Module, second: nn.Module, image: Sequence[int], between: Sequence[int]):
        super().__init__()
        self.first, self.second = first, second
        self.linear = all(getattr(each, "linear", False) for each in (first, second))  # type: ignore[misc]
        self.rounds = any(getattr(each, "rounds", False) for each in (first, second))  # type: ignore[misc]
        self.shapes = {"first": tuple(image), "second": tuple(between)}

    def parameters_of(self, image: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        return {
            f"{which}_{name}": shape
            for which, seen in self.shapes.items()
            for name, shape in parameters_of(getattr(self, which), seen).items()
        }

    def example(self, image: Sequence[int], batch: int) -> Mapping[str, Tensor]:
        return {
            f"{which}_{name}": value
            for which, seen in self.shapes.items()
            for name, value in default_parameters(getattr(self, which), seen, batch).items()
        }

    def forward(self, x: Tensor, *given: Tensor, **named: Tensor) -> Tensor:
        values = dict(zip(self.parameters_of(()), given)) | named
        for which in self.shapes:
            words = {name.removeprefix(f"{which}_"): v for name, v in values.items() if name.startswith(f"{which}_")}
            x = getattr(self, which)(x, **words)
        return x


def operators(image: Sequence[int]) -> dict[str, Operator]:
    """All operators for images (C, H, W), by name; those that do not fit its size or channels are left out."""
    channels, height, width = image
    blur = gaussian(3.0 * min(height, width) / 256 + 0.7)
    motion = MotionBlur(image, motion_size(min(height, width)))
    found: dict[str, Operator] = {
        "inpainting": Inpainting(),
        "gaussian_blur": Separable(blur_matrix(height, blur), blur_matrix(width, blur)),
        "motion_blur": motion,
        "nonlinear_blur": NonlinearBlur(motion),
        "phase_retrieval": PhaseRetrieval(image),
        "hdr": Hdr(),
        "quantisation": Quantisation(),
    }
    if channels == 3:
        found["luminance"] = Luminance()
    if channels in (1, 3) and height % BLOCK == 0 and width % BLOCK == 0:
        found["jpeg"] = Jpeg(image)
    for factor in (4, 8):
        if height % factor == 0 and width % factor == 0:
            found[f"superres{factor}"] = Separable(mean_matrix(height, factor), mean_matrix(width, factor))
            found[f"bicubic{factor}"] = Separable(bicubic_matrix(height, factor), bicubic_matrix(width, factor))
    return found


def chain(names: str, image: Sequence[int]) -> tuple[str, Chain]:
    """The operators of "first+second", one after the other, and what a bundle calls it: first-second.

    ValueError if there is no such operator for these images, or none for the first one's measurements.
    """
    words = names.split("+")
    if len(words) != 2:
        raise ValueError(f"operator {names!r} is not allowed: a chain has two parts, as superres4+jpeg")
    first = _among(operators(image), words[0], image)
    with torch.no_grad():
        between = first(torch.zeros(1, *image), **default_parameters(first, image, 1)).shape[1:]
    return "-".join(words), Chain(first, _among(operators(between), words[1], between), image, between)


def _among(found: Mapping[str, Operator], name: str, image: Sequence[int]) -> Operator:
    if name not in found:
        size = " x ".join(map(str, image))
        raise ValueError(f"operator {name!r} is not known for images {size}: {', '.join(sorted(found))}")
    return found[name]


def correlated(padded: Tensor, kernel: Tensor, height: int, width: int) -> Tensor:
    """The same sums as conv2d's by Fourier transforms, for the checks in float64.

    There, torch's own would unfold the image once for each tap: 30 GB at 512 x 512.
    """
    size = padded.shape[2:]
    taps = torch.fft.rfft2(kernel[:, None], s=size)
    return torch.fft.irfft2(torch.fft.rfft2(padded) * taps.conj(), s=size)[..., :height, :width]


def motion_size(side: int) -> int:
    """Taps of the motion kernel: 121 at 512 pixels, as published; odd and in proportion elsewhere, at least 9."""
    return max(9, 2 * round(side * 60 / 512) + 1)


def gaussian(sigma: float) -> Tensor:
    """Taps of a Gaussian of standard deviation `sigma` pixels, cut at 3 sigma, summing to 1."""
    radius = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    return taps / taps.sum()


def reflect_matrix(size: int, pad: int) -> Tensor:
    """[size + 2 pad, size]: reflection padding, the border pixel itself not repeated."""
    period = max(2 * (size - 1), 1)
    index = (torch.arange(-pad, size + pad).abs()) % period
    index = torch.where(index >= size, period - index, index)
    return nn.functional.one_hot(index, size).double()


def blur_matrix(size: int, taps: Tensor) -> Tensor:
    """[size, size]: convolution with `taps`, reflected at the border."""
    padded = reflect_matrix(size, len(taps) // 2)
    return sum(tap * padded[i : i + size] for i, tap in enumerate(taps))  # type: ignore[return-value]


def mean_matrix(size: int, factor: int) -> Tensor:
    """[size / factor, size]: mean over each run of `factor` pixels."""
    return torch.eye(size // factor, dtype=torch.float64).repeat_interleave(factor, 1) / factor


def bicubic_matrix(size: int, factor: int) -> Tensor:
    """[size / factor, size]: antialiased bicubic reduction (Keys' kernel, a = -1/2, stretched), reflected border."""
    radius = 2 * factor
    rows = torch.zeros(size // factor, size, dtype=torch.float64)
    padded = reflect_matrix(size, radius)
    for row in range(size // factor):
        centre = (row + 0.5) * factor - 0.5
        first = math.floor(centre) - radius + 1
        weights = torch.tensor([keys((first + i - centre) / factor) for i in range(2 * radius)], dtype=torch.float64)
        rows[row] = weights / weights.sum() @ padded[first + radius : first + 3 * radius]
    return rows


def keys(t: float, a: float = -0.5) -> float:
    """Keys' cubic convolution kernel (IEEE TASSP 29, 1981)."""
    t = abs(t)
    if t < 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def fourier_matrices(size: int, pad: int) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the centred orthonormal DFT after padding by `pad` a side: [size + 2 pad, size]."""
    total = size + 2 * pad
    frequency = torch.arange(total, dtype=torch.float64) - total // 2
    position = torch.arange(size, dtype=torch.float64) + pad - total // 2
    angle = -2 * math.pi * frequency[:, None] * position / total
    return angle.cos() / math.sqrt(total), angle.sin() / math.sqrt(total)


def parameters_of(operator: nn.Module, image: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
    """The shapes of an item's parameters, by name; none for a module that does not say."""
    shapes: Callable[[Sequence[int]], Mapping[str, tuple[int, ...]]] = getattr(
        operator, "parameters_of", lambda image: {}
    )
    return shapes(image)


def default_parameters(operator: nn.Module, image: Sequence[int], batch: int) -> dict[str, Tensor]:
    """Random parameters of the right shapes, for tracing and checking: masks of 0 and 1, kernels that sum to 1.

    A module with values of its own kind gives examples: `example(image, batch)`.
    """
    examples: Mapping[str, Tensor] = operator.example(image, batch) if isinstance(operator, Operator) else {}
    values = {}
    for name, shape in parameters_of(operator, image).items():
        value = torch.rand(batch, *shape)
        random = (value > 0.5).float() if name == "mask" else value / value.sum((-2, -1), keepdim=True)
        values[name] = examples.get(name, random)
    return values
