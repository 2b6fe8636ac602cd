"""The benchmark of the kernels: what its baselines are given. No figure here is one of a GPU."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from rlsd.bench.gpu.roof import Roof  # noqa: E402
from rlsd.bench.kernels import Case, narrow  # noqa: E402
from rlsd.bench.kernels import __main__ as kernels  # noqa: E402

CPU = torch.device("cpu")


def test_baselines_take_the_fastest_convolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN tries out what it has for what is timed, and not for the reference in float64."""
    seen = set()

    def plain(x: Any) -> Any:
        seen.add((x.dtype, torch.backends.cudnn.benchmark))
        return x + 1

    case = Case("some", lambda device: (torch.ones(3, device=device),), lambda x: x + 1, plain, 24, 3)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(kernels, "cases", lambda: [case])
    monkeypatch.setattr(kernels, "measured_roof", lambda *_, **__: Roof(1e12, 1e12, 1e9))
    given = Namespace(minutes=1, only="", rounds=1, without_compiled=True, beside=None, out=tmp_path / "lines")
    assert kernels.race(given, CPU) == 0
    assert seen == {(torch.float64, False), (torch.float32, True)}


def test_a_convolution_to_few_channels_is_beside_one_without_changes_of_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU PyTorch's GroupNorm makes its input contiguous; a kernel channels last would have it turned again."""
    given = narrow._to_few(CPU, 1, 32, 3, 4)
    ours = narrow._planes(*given)

    def contiguous(call: Any) -> Any:
        def checked(*values: Any, **options: Any) -> Any:
            assert all(each.is_contiguous() for each in values if isinstance(each, torch.Tensor))
            return call(*values, **options)

        return checked

    for name in ("group_norm", "conv2d"):
        monkeypatch.setattr(narrow, name, contiguous(getattr(narrow, name)))
    exact = narrow._plain_planes(*kernels.doubled(given))
    plain = narrow._plain_planes(*given)
    assert plain.shape == ours.shape and plain.is_contiguous()
    for result in (ours, plain):
        assert (result - exact).norm() <= 2e-3 * exact.norm()
