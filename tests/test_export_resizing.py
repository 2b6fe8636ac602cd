"""Pooling and interpolation as matrix products: torch's own values, and gradients that ONNX can express."""

from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from rlsd.export.pullback import split  # noqa: E402
from rlsd.export.resizing import AXES, plain_resizing  # noqa: E402
from rlsd.export.trace import to_aten  # noqa: E402


class Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def resized(**given: object) -> Callable[[Tensor], Tensor]:
    return lambda x: functional.interpolate(x, **given)


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: functional.avg_pool2d(x, 4),
    "mean of few": lambda x: functional.avg_pool2d(x, (3, 2), (2, 3), (1, 0), ceil_mode=True, count_include_pad=False),
    "mean of padding": lambda x: functional.avg_pool2d(x, 3, 2, 1, ceil_mode=True, divisor_override=7),
    "mean of three axes": lambda x: functional.avg_pool2d(x[:, 0], 4),
    "adaptive": lambda x: functional.adaptive_avg_pool2d(x, (5, 7)),
    "area": resized(size=(5, 8), mode="area"),
    "nearest": resized(scale_factor=0.4),
    "nearest-exact": resized(size=(9, 30), mode="nearest-exact"),
    "bilinear": resized(scale_factor=(0.37, 2), mode="bilinear"),
    "bilinear, corners": resized(size=(7, 31), mode="bilinear", align_corners=True),
    "bilinear, smooth": resized(scale_factor=0.5, mode="bilinear", antialias=True),
    "bicubic": resized(scale_factor=1.5, mode="bicubic"),
    "bicubic, smooth": resized(size=(5, 6), mode="bicubic", antialias=True),
    "bicubic, whole": resized(scale_factor=0.37, mode="bicubic", antialias=True, recompute_scale_factor=True),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_pull_back_are_torchs_own(case: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 20)
    graph_module = to_aten(Of(CASES[case]), [x])
    assert any(node.target in AXES for node in graph_module.graph.nodes)
    plain_resizing(graph_module)
    precise = x.double().requires_grad_()
    want = CASES[case](precise)
    v = torch.randn(want.shape)
    (pulled,) = torch.autograd.grad(want, precise, v.double())
    parts = split(graph_module, [x], ["x"])
    targets = {str(node.target) for half in (parts.forward, parts.pull) for node in half.graph.nodes}
    assert not any(word in target for target in targets for word in ("pool", "upsample"))
    assert (parts.forward(x)[0] - want).norm() <= 1e-6 * want.norm()
    assert (parts.pull(v)[0] - pulled).norm() <= 1e-6 * pulled.norm()
