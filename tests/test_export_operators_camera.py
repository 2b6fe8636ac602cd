"""What cameras and files do to an image: against Pillow's JPEG, known answers, and the gradient they claim."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from rlsd.engine import Engine, Job, Params  # noqa: E402
from rlsd.export import operators as ops  # noqa: E402
from rlsd.export.extend import extend  # noqa: E402
from rlsd.export.onnx_graph import to_onnx  # noqa: E402
from rlsd.export.operators_camera import Jpeg, Luminance, NonlinearBlur, Quantisation  # noqa: E402
from rlsd.export.trace import to_aten  # noqa: E402
from rlsd.models.fashion import PATH  # noqa: E402
from rlsd.pipeline.images import read_image  # noqa: E402
from rlsd.pipeline.masks import jpeg_tables  # noqa: E402


def photo(channels: int) -> np.ndarray:
    """[channels, 32, 32] of whole numbers from 0 to 255, smooth with edges."""
    y, x = np.mgrid[:32, :32] / 32
    waves = [np.sin(7 * x + k) * np.cos(5 * y - k) + (x + y > 1) * 0.5 for k in range(channels)]
    return np.clip(np.round((np.stack(waves) + 1) * 100), 0, 255)


def by_pillow(pixels: np.ndarray, quality: int) -> np.ndarray:
    picture = Image.fromarray(np.moveaxis(pixels, 0, -1).astype(np.uint8).squeeze())
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality, subsampling=0)
    decoded = np.asarray(Image.open(stream), float)
    return decoded[None] if decoded.ndim == 2 else np.moveaxis(decoded, -1, 0)


@pytest.mark.parametrize("quality", [5, 10, 50, 90])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_what_pillow_makes_of_it(channels: int, quality: int) -> None:
    pixels = photo(channels)
    tables = torch.from_numpy(jpeg_tables((1 if channels == 1 else 2, 8, 8), quality))[None]
    ours = Jpeg((channels, 32, 32))(torch.from_numpy(pixels / 127.5 - 1)[None].float(), tables)
    ours = (ours[0].numpy() + 1) * 127.5
    theirs = by_pillow(pixels, quality)
    gaps = np.abs(ours - theirs).reshape(channels, 4, 8, 4, 8).max((2, 4))
    same = gaps <= (2 if channels == 1 else 3)  # libjpeg computes with whole numbers,
    assert same.mean() >= 0.87  # and may see a coefficient near an edge on its other side
    assert np.abs(ours - theirs).mean() < 0.3 < np.abs(pixels - theirs).mean()


def test_what_swings_beyond_black_and_white_is_clipped() -> None:
    pixels = 255.0 * (np.random.default_rng(0).random((1, 32, 32)) > 0.5)
    tables = torch.from_numpy(jpeg_tables((1, 8, 8), 30))[None]
    ours = Jpeg((1, 32, 32))(torch.from_numpy(pixels / 127.5 - 1)[None].float(), tables)
    assert ours.abs().max() <= 1 + 1e-6
    assert np.abs((ours[0].numpy() + 1) * 127.5 - by_pillow(pixels, 30)).mean() < 0.5


@pytest.mark.parametrize("quality", [1, 30, 75, 100])
def test_the_tables_are_libjpegs(quality: int) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG", quality=quality)
    theirs = Image.open(stream).quantization  # rows after Pillow 8.3
    for ours, table in zip(jpeg_tables((2, 8, 8), quality), theirs.values()):
        np.testing.assert_array_equal(ours.ravel(), table)


def test_levels_are_equal_steps_and_each_item_has_its_own() -> None:
    x = torch.tensor([-2.0, -1, -0.4, 0.3, 0.9, 5]).expand(2, 1, 1, 6)
    y = Quantisation()(x, torch.tensor([[2.0], [5.0]]))
    assert y[0, 0, 0].tolist() == [-1, -1, -1, 1, 1, 1]
    assert y[1, 0, 0].tolist() == [-1, -1, -0.5, 0.5, 1, 1]


def test_rounding_lets_the_gradient_through() -> None:
    x = (torch.rand(3, 1, 16, 16, dtype=torch.float64) * 2.4 - 1.2).requires_grad_(True)
    inside = (x.detach().abs() < 1).double()
    v = torch.randn(x.shape, dtype=torch.float64)
    levels = torch.tensor([[2.0], [4], [256]], dtype=torch.float64)
    (pulled,) = torch.autograd.grad(Quantisation()(x, levels), x, v)
    torch.testing.assert_close(pulled, v * inside)
    jpeg = Jpeg((1, 16, 16)).double()
    fine = torch.ones(3, 1, 8, 8, dtype=torch.float64)
    y = jpeg(x, fine)
    held = (y.detach().abs() < 1).double() * inside  # where neither x nor the decoded value was clipped
    (pulled,) = torch.autograd.grad(y, x, v * held)
    torch.testing.assert_close(pulled, v * held, atol=1e-6, rtol=0)  # DCT and its inverse cancel


def test_a_blur_in_linear_light_widens_highlights() -> None:
    operator = NonlinearBlur(ops.MotionBlur((1, 32, 32), 9)).double()
    kernel = torch.full((1, 9, 9), 1 / 81, dtype=torch.float64)
    for grey in (-1.0, -0.97, -0.8, 0.2, 1.0):  # on both sides of the curve's two bends
        flat = torch.full((1, 1, 32, 32), grey, dtype=torch.float64)
        torch.testing.assert_close(operator(flat, kernel), flat, atol=1e-6, rtol=0)
    edge = torch.where(torch.arange(32) < 16, -1.0, 1.0).double().expand(1, 1, 32, 32)
    middle = operator(edge, kernel)[0, 0, 16]
    linear = operator.blur(edge, kernel)[0, 0, 16]
    assert (middle >= linear - 1e-9).all() and float(middle[15] - linear[15]) > 0.2
    half = torch.tensor(0.5 - 0.5 / 9, dtype=torch.float64)  # light at the last dark column: 4 of 9 taps
    assert abs(float(middle[15]) - float(2 * (1.055 * half ** (1 / 2.4) - 0.055) - 1)) < 1e-6


def test_gray_keeps_what_the_eye_sees() -> None:
    x = torch.tensor([0.2, -0.4, 0.9]).reshape(1, 3, 1, 1)
    assert float(Luminance()(x)) == pytest.approx(0.299 * 0.2 - 0.587 * 0.4 + 0.114 * 0.9)
    assert "luminance" in ops.operators((3, 32, 32)) and "luminance" not in ops.operators((1, 32, 32))


def test_a_chain_is_one_after_the_other() -> None:
    image = (1, 32, 32)
    found = ops.operators(image)
    name, both = ops.chain("motion_blur+inpainting", image)
    assert name == "motion_blur-inpainting" and both.linear and not both.rounds
    assert both.parameters_of(image) == {"first_kernel": (9, 9), "second_mask": (1, 32, 32)}
    given = ops.default_parameters(both, image, 2)
    assert set(given["second_mask"].unique().tolist()) == {0, 1}
    x = torch.rand(2, *image)
    want = found["motion_blur"](x, given["first_kernel"]) * given["second_mask"]
    assert torch.equal(both(x, **given), want) and torch.equal(both(x, *given.values()), want)
    assert ops.chain("superres4+jpeg", image)[1].rounds and not ops.chain("superres4+jpeg", image)[1].linear


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("superres8+jpeg", "'jpeg' is not known for images 1 x 4 x 4"),  # smaller than a block
        ("nothing+jpeg", "'nothing' is not known for images 1 x 32 x 32"),
        ("hdr+hdr+hdr", "two parts"),
    ],
)
def test_chains_that_cannot_be(names: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ops.chain(names, (1, 32, 32))


def test_constants_that_the_exporter_forgets_are_there() -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.clamp(-1, 1) + 1, x.clamp(-1, 1) * x

    x = torch.randn(2, 3)
    model = to_onnx(to_aten(Twice(), [x]), [x], ["x"], ["a", "b"])
    there = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    there |= {value.name for node in model.graph for value in node.outputs}
    assert all(value is None or value.name in there for node in model.graph for value in node.inputs)


def test_an_engine_runs_a_chain_that_rounds(tmp_path: Path) -> None:
    name, both = ops.chain("hdr+quantisation", (1, 32, 32))
    bundle = extend(PATH / "bundle", tmp_path / "extended", {name: both})
    picture = sorted((PATH / "test_images").glob("*.png"))[0]
    x = np.pad(read_image(picture).values, ((0, 0), (2, 2), (2, 2)), constant_values=-1)[None].astype(np.float32)
    levels = np.array([4], np.float32)
    with Engine(bundle, threads=1) as engine:
        y = engine.measure(name, x, second_levels=levels[None])[0]
        assert len(np.unique(y.round(5))) <= 4
        job = Job(y, name, {"second_levels": levels}, 2, params=Params(steps=40, lr_x=0.2, lr_z=0.2))
        particles = engine.reconstruct([job])[0].particles
        gap = np.abs(engine.measure(name, particles, second_levels=levels[None]) - y).mean()
        random = np.abs(engine.measure(name, np.zeros_like(x), second_levels=levels[None])[0] - y).mean()
    assert gap < 0.2 * random
