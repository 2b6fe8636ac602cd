"""Savings of an export for CUDA, left out by name; and names that are not known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from rlsd.export import checkpoint, cuda  # noqa: E402
from rlsd.export.package import Networks  # noqa: E402
from rlsd.export.package import package as package_cpu  # noqa: E402


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    folder = tmp_path_factory.mktemp("sd")
    checkpoints.stable_diffusion(folder, text=False, block_out_channels=checkpoints.WIDE_END)
    return checkpoint.load(folder, (64, 64), ["inpainting"], None)


@pytest.mark.parametrize(
    "names", [["timesteps", "context", "recompute", "narrow", "phases"], ["attention", "no_ops", "channels_last"]]
)
def test_savings_can_be_left_out(networks: Networks, tmp_path: Path, names: list[str]) -> None:
    """The checks against float32 hold with and without it; what it is for is gone."""
    small = replace(networks, operators={})
    bundle = cuda.package_cuda(small, tmp_path / "b", name="b", architectures=[], batches=[1], without=names)
    lines = [line.split() for line in (bundle / "manifest.txt").read_text().splitlines()]
    nodes = {(line[2], line[4]) for line in lines if line[:2] == ["info", "nodes"]}
    graphs = {line[1] for line in lines if line[0] == "graph"}
    gone = {
        "timesteps": ("denoiser", "Sin") in nodes,
        "context": "context" not in graphs,
        "recompute": ("decoder_pull", "Softmax") not in nodes,
        "phases": ("decoder_pull", "rlsd.InterleavePullNhwc") in nodes,
        "narrow": not {"rlsd.NarrowConv", "rlsd.SumTaps"} & {kind for _, kind in nodes},
        "attention": ("decoder", "Softmax") in nodes,
        "no_ops": True,  # only that it still exports
        "channels_last": ("decoder", "Conv") in nodes,
    }
    assert all(gone[name] for name in names)
    first = {"rlsd.GroupNorm", "rlsd.GroupNormPull", "rlsd.Interleave", "rlsd.InterleavePull"}
    assert not first & {kind for _, kind in nodes}  # on a GPU there are only those with their channels last


def test_unknown_savings_are_named(networks: Networks, tmp_path: Path) -> None:
    for package in (cuda.package_cuda, package_cpu):
        extra = {"architectures": []} if package is cuda.package_cuda else {}
        with pytest.raises(ValueError, match="saving 'speed' is not known: no_ops, group_norm"):
            package(networks, tmp_path / "b", name="b", without=["speed"], **extra)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_architecture_is_named(networks: Networks, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="arch 70 is not known: 80, 86"):
        cuda.package_cuda(networks, tmp_path / "b", name="old", architectures=[80, 70])
    assert list(tmp_path.iterdir()) == []
