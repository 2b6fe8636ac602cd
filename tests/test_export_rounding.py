"""The check of operators that round: an unlucky image fails no export, a wrong graph always does."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from rlsd.export.bundle import BundleWriter  # noqa: E402
from rlsd.export.check import CheckError, relative_error  # noqa: E402
from rlsd.export.operator_graphs import TRIES, OperatorGraphs  # noqa: E402
from rlsd.export.operators import default_parameters  # noqa: E402
from rlsd.export.operators_camera import Jpeg  # noqa: E402

IMAGE = (1, 32, 32)
UNLUCKY = 228  # a seed whose first image has a coefficient that float32 rounds the other way


def images() -> Tensor:
    return torch.rand(2, *IMAGE) * 2 - 1


def test_a_gray_priors_jpeg_passes_whatever_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = Jpeg(IMAGE)
    with BundleWriter(tmp_path / "bundle", "jpeg", "rlsd tests", "cpu", "fp32") as writer:
        graphs = OperatorGraphs(writer, images(), [])
        traced = graphs._traced("jpeg", operator, graphs.x, default_parameters(operator, IMAGE, 2))
        monkeypatch.setattr(graphs, "_traced", lambda *_: traced)
        for seed in range(UNLUCKY - 8, UNLUCKY + 2):
            torch.manual_seed(seed)
            graphs.x = images()
            graphs.operator("jpeg", operator)

        wrong = Jpeg(IMAGE)
        wrong.rows[3, 3] *= 1.02  # one row of one block
        for seed in range(3):
            torch.manual_seed(seed)
            with pytest.raises(CheckError, match=r"operator\.jpeg\.forward, output y: relative error"):
                graphs.operator("jpeg", wrong)


def test_a_number_that_is_not_finite_is_not_spared() -> None:
    want = torch.ones(1000)
    got = want.clone()
    got[3] = 2.0
    assert relative_error(got, want, rounds=True) == 0 < relative_error(got, want)
    got[3] = torch.nan
    assert not relative_error(got, want, rounds=True) <= 1


@pytest.mark.parametrize("rounds, unlucky, passes", [(True, TRIES - 1, True), (True, TRIES, False), (False, 1, False)])
def test_other_images_are_tried_where_an_operator_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: bool, unlucky: int, passes: bool
) -> None:
    seen: list[Tensor] = []

    def errors(graphs: object, operator: nn.Module, x: Tensor, given: object) -> tuple[float, float]:
        seen.append(x)
        if len(seen) <= unlucky:
            raise CheckError("unlucky")
        return 1e-7, 1e-7

    operator = nn.Identity()
    operator.rounds = rounds  # type: ignore[assignment]
    with BundleWriter(tmp_path / "bundle", "one", "rlsd tests", "cpu", "fp32") as writer:
        graphs = OperatorGraphs(writer, images(), [])
        monkeypatch.setattr(graphs, "_traced", lambda *_: {"operator.one.forward": tmp_path})
        monkeypatch.setattr(graphs, "_errors", errors)
        if passes:
            graphs.operator("one", operator)
        else:
            with pytest.raises(CheckError, match="unlucky"):
                graphs.operator("one", operator)
    assert len(seen) == min(unlucky + 1, TRIES if rounds else 1)
    assert len({x.sum().item() for x in seen}) == len(seen)
