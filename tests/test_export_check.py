"""The check in float64 of a network that is in memory once only, and the copy of it that is exported."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from rlsd.export import check  # noqa: E402
from rlsd.export.bundle import BundleWriter  # noqa: E402
from rlsd.export.check import float64  # noqa: E402
from rlsd.export.cuda import package_cuda  # noqa: E402
from rlsd.export.onnx_graph import to_onnx  # noqa: E402
from rlsd.export.package import Networks, Packer, package  # noqa: E402
from rlsd.export.trace import to_aten  # noqa: E402


class Reads(nn.Module):
    """Reads weights in every way: through layers, by itself, by rows, and asks for their type."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 1))
        self.linear, self.scale = nn.Linear(5, 5), nn.Parameter(torch.randn(1))
        self.register_buffer("table", torch.randn(10, 5))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        rows = self.linear(self.table[t].to(self.linear.weight.dtype))
        return self.layers(x) * self.scale + rows[:, None, None]


def test_float64_is_that_of_a_doubled_copy() -> None:
    torch.manual_seed(0)
    module, args = Reads().eval(), (torch.randn(3, 2, 4, 5).double(), torch.tensor([1, 9, 0]))
    with torch.no_grad():
        want = copy.deepcopy(module).double()(*args)
    got = float64(module)(*args)
    assert got.dtype == torch.float64 and torch.equal(got, want)
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("limit", [0, 1 << 32])
def test_a_graph_of_many_weights_is_run_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    torch.manual_seed(0)
    module, x = nn.Conv2d(2, 4, 3).half().float(), torch.randn(1, 2, 5, 5)
    opened = []
    monkeypatch.setattr(check, "LARGE", limit)
    open_session = check.open_session

    def watched(model: Path, optimized: bool) -> object:
        opened.append(optimized)
        return open_session(model, optimized)

    monkeypatch.setattr(check, "open_session", watched)
    with BundleWriter(tmp_path / "bundle", "check", "rlsd tests", "cpu", "fp32") as writer:
        model = writer.graph("conv", 1, to_onnx(to_aten(module, [x]), [x], ["x"], ["y"]))
        got = check.run(model, {"x": x})
    torch.testing.assert_close(torch.from_numpy(got["y"]), module(x).detach())
    assert opened == [limit > 0]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_exported_copy_shares_what_it_does_not_change(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    module = Reads()
    module.linear.half().float()  # its weights are halves already
    before = copy.deepcopy(module.state_dict())
    networks = Networks(module, nn.Identity(), torch.ones(1), (2, 4, 5), (2, 4, 5), {})
    with BundleWriter(tmp_path / "bundle", "check", "rlsd tests", "cpu", precision) as writer:
        copied = Packer(networks, writer, 1, precision, [], {})._rounded(module)
    for name, value in copied.state_dict().items():
        source = module.state_dict()[name]
        halves = precision == "fp16" and name != "table"  # a buffer: constants are not rounded
        rounds = halves and "linear" not in name and not torch.equal(source.half().float(), source)
        assert (value.data_ptr() == source.data_ptr()) is not rounds, name
        assert torch.equal(value, source.half().float() if halves else source), name
    copied.eval().requires_grad_(False)
    copied.double()
    assert module.training and all(each.requires_grad for each in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_number_that_is_not_finite_is_no_small_error() -> None:
    want = torch.ones(3)
    assert check.compare("f", {"y": want.numpy()}, {"y": want}) == 0
    for spoilt in (torch.nan, torch.inf, 1 + 2 * check.LIMIT):
        with pytest.raises(check.CheckError, match="graph f, output y: relative error"):
            check.compare("f", {"y": (want * spoilt).numpy()}, {"y": want})


class Shrinks(nn.Module):
    """Noise of one pixel less than its latents in height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 2)

    def forward(self, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.conv(z_t)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_noise_of_another_size_than_its_latents_is_refused(tmp_path: Path, target: str) -> None:
    networks = Networks(Shrinks().eval(), nn.Identity(), torch.linspace(0.9, 0.1, 5), (2, 4, 5), (2, 4, 5), {})
    given = {"name": "check", "batches": [1]}
    with pytest.raises(ValueError, match=r"the denoiser gives \[\d, 2, 3, 4\] for latents \[\d, 2, 4, 5\]"):
        if target == "cpu":
            package(networks, tmp_path / "bundle", **given)
        else:
            package_cuda(networks, tmp_path / "bundle", architectures=[], **given)
