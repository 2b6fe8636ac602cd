"""What only large images show of the forward operators: ties that are met now and then, memory of the checks."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from rlsd.export import operators as ops  # noqa: E402
from rlsd.export.check import pulled_in_float64  # noqa: E402
from rlsd.export.operator_graphs import DataLoss, around  # noqa: E402


def test_colours_half_way_between_two_levels_are_rounded_alike_in_both_precisions() -> None:
    """One pixel in a thousand has such a luma: one of 32 x 32 images hardly, hundreds of 512 x 512."""
    levels = torch.cartesian_prod(*[torch.arange(0, 256, 3)] * 3).double()
    luma = (levels * torch.tensor([299, 587, 114])).sum(1)
    ties = levels[luma % 1000 == 500][:192]
    assert len(ties) == 192
    x = ties.T.reshape(3, 3, 8, 8).transpose(0, 1) / 127.5 - 1
    tables = torch.ones(3, 2, 8, 8)
    jpeg = ops.operators((3, 8, 8))["jpeg"]
    single = jpeg(x.float(), tables)
    double = jpeg.double()(x, tables.double())
    assert (single - double).abs().max() < 1e-5


@pytest.mark.parametrize("image", [(1, 32, 32), (3, 24, 40)])
def test_motion_blur_is_the_same_convolution_in_both_precisions(image: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    blur = ops.operators(image)["motion_blur"]
    (kernel,) = ops.default_parameters(blur, image, 2).values()
    x = torch.rand(2, *image)
    single = blur(x, kernel)
    torch.testing.assert_close(blur.double()(x.double(), kernel.double()), single.double(), atol=1e-6, rtol=0)


def test_the_check_of_the_published_motion_blur_fits_into_memory() -> None:
    """121 taps at 512 x 512 in float64, as at export; a convolution that unfolds its image would take 30 GB."""
    image = (1, 512, 512)
    blur = ops.MotionBlur(image, ops.motion_size(512)).double()
    kernel = torch.zeros(1, 121, 121, dtype=torch.float64)
    kernel[0, 60, 60], kernel[0, 0, 120] = 0.75, 0.25
    x = torch.rand(1, *image, dtype=torch.float64)
    y = blur(x, kernel)
    torch.testing.assert_close(y[..., 60:-60, 60:-60], 0.75 * x[..., 60:-60, 60:-60] + 0.25 * x[..., 120:, :-120])


def test_the_loss_is_checked_around_what_the_graph_rounded_to() -> None:
    """A value that fell to an edge's other side changes the loss as it should, and the gradient where it stands."""
    torch.manual_seed(0)
    jpeg = ops.operators((1, 16, 16))["jpeg"].double()
    (tables,) = (value.double() for value in ops.default_parameters(jpeg, (1, 16, 16), 2).values())
    x = torch.rand(2, 1, 16, 16, dtype=torch.float64) * 2 - 1
    seen = jpeg(x, tables)
    y = seen + 0.1 * torch.randn_like(seen)
    want, gradient, _ = pulled_in_float64(DataLoss(jpeg), x, y, tables, cotangent=torch.ones(2))
    loss, pulled = around(jpeg, seen, x, y, tables)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(pulled, gradient)
    seen[0, 0, 0, 0] += 2
    loss, pulled = around(jpeg, seen, x, y, tables)
    assert float(loss[0]) == pytest.approx(float(0.5 * (seen[0] - y[0]).square().mean())) and loss[1] == want[1]
    assert (pulled - gradient).abs()[0, 0, :8, :8].max() > 1e-4 and torch.equal(pulled[1], gradient[1])
