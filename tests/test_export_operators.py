"""Every forward operator: adjoint dot test, gradient by finite differences, and what its name promises."""

import math

import numpy as np
import pytest
from scipy import ndimage

torch = pytest.importorskip("torch")

from rlsd.export import operators as ops  # noqa: E402
from rlsd.export.operator_graphs import DataLoss  # noqa: E402

IMAGES = [(1, 32, 32), (3, 24, 40)]
CASES = [(image, name) for image in IMAGES for name in ops.operators(image)]


def _case(image: tuple[int, ...], name: str):
    torch.manual_seed(0)
    operator = ops.operators(image)[name].double()
    given = [value.double() for value in ops.default_parameters(operator, image, 2).values()]
    return operator, given, torch.rand(2, *image, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("image,name", CASES)
def test_linear_operators_have_their_adjoint(image, name):
    operator, given, x = _case(image, name)
    y = operator(x.requires_grad_(True), *given)
    v = torch.randn_like(y)
    (pulled,) = torch.autograd.grad(y, x, v)
    linear = abs((y * v).sum() - (x * pulled).sum()) <= 1e-10 * y.norm() * v.norm()
    assert linear == operator.linear


@pytest.mark.parametrize("image,name", [case for case in CASES if not ops.operators(case[0])[case[1]].rounds])
def test_gradient_of_the_loss_by_finite_differences(image, name):
    operator, given, x = _case(image, name)
    y = operator(x, *given) + 0.1 * torch.randn_like(operator(x, *given))
    loss = DataLoss(operator)
    x = x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(x, y, *given).sum(), x)
    direction = torch.randn_like(x)
    h = 1e-6
    with torch.no_grad():
        ahead, behind = loss(x + h * direction, y, *given).sum(), loss(x - h * direction, y, *given).sum()
    slope = (gradient * direction).sum()
    assert abs((ahead - behind) / (2 * h) - slope) <= 1e-5 * (1e-3 + abs(slope))


def test_area_mean_and_bicubic_keep_constants_and_reduce():
    for image in IMAGES:
        for name in ("superres4", "bicubic4", "superres8", "bicubic8"):
            factor = int(name[-1])
            y = ops.operators(image)[name](torch.full((1, *image), 0.3))
            assert y.shape == (1, image[0], image[1] // factor, image[2] // factor)
            assert torch.allclose(y, torch.full_like(y, 0.3), atol=1e-6)
    x = torch.randn(1, 1, 32, 32)
    assert torch.allclose(ops.operators((1, 32, 32))["superres4"](x), torch.nn.functional.avg_pool2d(x, 4), atol=1e-6)


def test_bicubic_agrees_with_torch_antialiased_inside():
    x = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    ours = ops.bicubic_matrix(64, 4) @ x @ ops.bicubic_matrix(64, 4).T
    theirs = torch.nn.functional.interpolate(x, scale_factor=0.25, mode="bicubic", antialias=True)
    assert torch.allclose(ours[..., 3:-3, 3:-3], theirs[..., 3:-3, 3:-3], atol=1e-6)


def test_blurs_agree_with_a_padded_convolution():
    x = torch.randn(2, 1, 32, 32)
    found = ops.operators((1, 32, 32))
    taps = ops.gaussian(3.0 * 32 / 256 + 0.7).float()
    pad = len(taps) // 2
    padded = torch.nn.functional.pad(x, (pad,) * 4, mode="reflect")
    want = torch.nn.functional.conv2d(padded, (taps[:, None] * taps)[None, None])
    assert torch.allclose(found["gaussian_blur"](x), want, atol=1e-5)

    wide = ops.operators((1, 32, 64))["gaussian_blur"]  # as of its shorter side
    torch.testing.assert_close(wide.rows, ops.blur_matrix(32, taps).float())
    torch.testing.assert_close(wide.columns_t.T, ops.blur_matrix(64, taps).float())

    kernel = torch.rand(2, 9, 9)
    padded = torch.nn.functional.pad(x, (4,) * 4, mode="reflect")
    turned = kernel.flip(1, 2)
    want = torch.cat([torch.nn.functional.conv2d(padded[i : i + 1], turned[i][None, None]) for i in range(2)])
    assert torch.allclose(found["motion_blur"](x, kernel), want, atol=1e-5)


def test_the_kernel_of_a_blur_is_the_image_of_a_point():
    kernel = torch.zeros(1, 9, 9)
    kernel[0, 4, 4], kernel[0, 0, 1] = 0.75, 0.25
    x = torch.zeros(1, 1, 32, 32)
    x[..., 16, 16] = 1
    for found in (x, x.double()):
        y = ops.operators((1, 32, 32))["motion_blur"].to(found.dtype)(found, kernel.to(found.dtype))
        seen = ndimage.convolve(found[0, 0].numpy(), kernel[0].numpy(), mode="mirror")
        np.testing.assert_allclose(y[0, 0].numpy(), seen, atol=1e-6)
        assert y[0, 0, 12, 13] == pytest.approx(0.25, abs=1e-6)


def test_phase_retrieval_is_the_oversampled_fourier_magnitude():
    x = torch.rand(1, 1, 32, 32, dtype=torch.float64) * 2 - 1
    y = ops.operators((1, 32, 32))["phase_retrieval"].double()(x)
    padded = torch.nn.functional.pad((x + 1) / 2, (8,) * 4)
    want = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(padded, dim=(-2, -1)), norm="ortho"), dim=(-2, -1))
    assert torch.allclose(y, want.abs(), atol=1e-6)
    assert ops.operators((3, 512, 512))["phase_retrieval"](torch.zeros(1, 3, 512, 512)).shape[-2:] == (768, 768)


def test_motion_kernel_has_the_published_size_at_512():
    assert ops.motion_size(512) == 121
    assert ops.motion_size(32) == 9


def test_operators_that_do_not_fit_are_left_out():
    assert "superres8" not in ops.operators((1, 28, 28))
    assert math.isclose(float(ops.gaussian(1.3).sum()), 1.0)
