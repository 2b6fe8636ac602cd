"""Biases and sums of a graph for CUDA: where they go, what they move through memory, and at which sizes."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch
from torch import fx, nn

from rlsd.export import CheckError, census, checkpoint, cuda, islands
from rlsd.export.package import Networks
from rlsd.export.tabulate import tabulate
from rlsd.export.trace import CUDA_REWRITES, REWRITES, to_aten

ALL = [*REWRITES, *CUDA_REWRITES]


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    folder = checkpoints.stable_diffusion(tmp_path_factory.mktemp("sd"), text=False)
    return checkpoint.load(folder, (64, 64), ["inpainting"], None)


def moves_its_bias_alone(graph: fx.GraphModule) -> list[str]:
    """Products with a bias that what follows could have taken."""
    ours, aten = torch.ops.rlsd, torch.ops.aten
    takers = {ours.group_norm.default, ours.add_group_norm_nhwc.default, ours.interleave.default, aten.add.Tensor}
    products = (ours.conv_nhwc.default, ours.linear.default)
    found = []
    for node in graph.graph.nodes:
        if node.target in products and node.args[2] is not None:
            last = node
            while len(last.users) == 1 and next(iter(last.users)).target == aten.reshape.default:
                last = next(iter(last.users))
            found += [node.name] if len(last.users) == 1 and next(iter(last.users)).target in takers else []
    return found


def test_a_bias_costs_no_pass_over_memory(networks: Networks) -> None:
    """Every bias goes to what reads the convolution, but where that is none of ours; of the timestep's rows as well."""
    z = torch.randn(1, 4, 8, 8).half()
    decoder, denoiser = networks.decoder.half(), networks.denoiser.half()
    args = [z, torch.tensor([5]), torch.randn(1, 77, checkpoints.WIDTH).half()]
    for module, given, wanted in ((decoder, [z], {"x_bias", "interleave", "sum"}), (denoiser, args, {"x_bias"})):
        plain = to_aten(module, given, [name for name in ALL if name != "biases"])
        graph = to_aten(module, given, ALL)
        assert moves_its_bias_alone(plain) and not moves_its_bias_alone(graph)
        nodes = list(graph.graph.nodes)
        targets = [n.target for n in nodes]
        found = {"x_bias": any(n.target == torch.ops.rlsd.group_norm.default and len(n.args) == 8 for n in nodes)}
        found["interleave"] = any(n.target == torch.ops.rlsd.interleave.default and len(n.args) == 3 for n in nodes)
        found["sum"] = torch.ops.rlsd.bias_residual_nhwc.default in targets
        assert all(found[name] for name in wanted)
        assert census.moved_bytes(graph) < census.moved_bytes(plain)
    tabulate(graph, 1, 1000, {})
    sums = [n for n in graph.graph.nodes if n.target == torch.ops.aten.add.Tensor]
    assert not [n for n in sums if n.meta["val"].shape[1:3] == (1, 1)]  # bias and timestep: in the table


def test_phases_of_different_biases_keep_them() -> None:
    """Only an upsampling's four phases share theirs; an interleave may end other convolutions."""

    class Phases(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 64, 2, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.rlsd.interleave(self.conv(x))

    module, x = Phases().double(), torch.randn(1, 16, 3, 3).double()
    graph = to_aten(module, [x], ALL)
    (node,) = [n for n in graph.graph.nodes if n.target == torch.ops.rlsd.interleave.default]
    assert len(node.args) == 2
    assert torch.allclose(graph(x), module(x), rtol=0, atol=1e-12)


class Sums(nn.Module):
    """x + conv(x) on the graph's own input, whose channels come first there, and on one of another type."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.conv, self.wide = nn.Conv2d(16, 16, 3, padding=1), wide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() if self.wide else x) + self.conv(x)


@pytest.mark.parametrize("wide", [False, True])
def test_sums_of_any_layout_and_type_still_export(wide: bool) -> None:
    module, x = Sums(wide).half(), torch.randn(2, 16, 8, 8).half()
    graph = to_aten(module, [x], ALL)
    fused = [node for node in graph.graph.nodes if node.target == torch.ops.rlsd.bias_residual_nhwc.default]
    assert len(fused) == (not wide)
    assert torch.allclose(graph(x).float(), module(x).float(), rtol=2e-3, atol=2e-3)
    assert not islands.too_large(graph, [x])


class Halves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.split(2)
        return first + second


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1.1 * islands.LIMIT])
def test_one_of_several_results_may_be_too_large(value: float) -> None:
    x = torch.ones(4, 3).half()
    graph = to_aten(Halves(), [x], ALL)
    assert not islands.too_large(graph, [x])
    x[3] = value
    assert islands.too_large(graph, [x]) == {"getitem_1", "add"}


def test_the_small_graph_has_the_nodes_of_the_large_one(networks: Networks) -> None:
    """What must stay in float32 is looked for in the small graph, and found again by its name."""
    for module, second in ((networks.denoiser, True), (networks.decoder, False)):
        names = []
        for batch, side in ((2, 16), (4, 32)):
            args = [torch.randn(batch, 4, side, side).half()]
            args += [torch.arange(batch), torch.randn(batch, 77, checkpoints.WIDTH).half()] if second else []
            names.append([node.name for node in to_aten(module.half(), args, ALL).graph.nodes])
        assert names[0] == names[1]


def test_other_nodes_at_full_size_are_refused_where_it_matters(networks: Networks, tmp_path: Path) -> None:
    packer = cuda.CudaPacker(networks, None, cuda.CUDA_SAVINGS)  # type: ignore[arg-type]
    module, x = nn.Conv2d(16, 16, 1).half(), torch.randn(1, 16, 4, 4).half()
    packer._to_aten("decoder", module, [x])
    packer._to_aten("decoder", nn.Sequential(module, module), [x])  # all fits into halves: no matter
    packer.large["decoder"] = frozenset({packer.nodes["decoder"][-2]})
    with pytest.raises(CheckError, match="graph decoder has other nodes at full size"):
        packer._to_aten("decoder", nn.Sequential(module, module), [x])


def test_a_bias_needs_its_channels_last() -> None:
    x, v = torch.ones(1, 4, 3, 3), torch.ones(4)
    statistics, row = torch.ones(1, 2), torch.ones(1, 1, 1, 4)
    with pytest.raises(ValueError, match="x_bias is given, which is possible with channels_last only"):
        torch.ops.rlsd.group_norm(x, v, v, 2, 1e-5, True, False, row)
    with pytest.raises(ValueError, match="x_bias is given"):
        torch.ops.rlsd.group_norm_pull(x, x, statistics, statistics, v, v, 2, True, False, None, row)
    with pytest.raises(ValueError, match="bias is given"):
        torch.ops.rlsd.interleave(x, False, torch.ones(1))
    with pytest.raises(NotImplementedError, match="no gradient in bias"):
        torch.ops.rlsd.interleave(torch.ones(1, 3, 3, 4), True, torch.ones(1, requires_grad=True)).sum().backward()


def test_bytes_that_pass_through_memory() -> None:
    """By hand: x, weight and bias of a convolution, its result three times; then what a GroupNorm and a sum move."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.conv(x)
            return self.norm(y), y * 2

    x = torch.randn(2, 16, 4, 4).half()
    moved = census.moved_bytes(to_aten(Three().half(), [x], ALL))
    values, halves = 2 * 32 * 4 * 4, 2
    convolution = halves * (2 * 16 * 4 * 4 + 9 * 16 * 32 + 32 + 3 * values)
    norm = halves * 3 * values + 4 * 2 * 32  # weights in float32; nobody asks for the statistics
    assert moved == convolution + norm + halves * 2 * values
