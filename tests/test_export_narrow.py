"""Convolutions with few channels on one side, rewritten for bundles for CUDA: the same functions, and where."""

from __future__ import annotations

import copy
from collections.abc import Callable

import checkpoints
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from diffusers import UNet2DConditionModel  # noqa: E402
from torch import fx, nn  # noqa: E402

from rlsd.export import census, checkpoint, cuda, islands  # noqa: E402
from rlsd.export.diffusers_unet import Denoiser  # noqa: E402
from rlsd.export.fused_narrow import fuse_narrow  # noqa: E402
from rlsd.export.fused_norms import fuse_layer_norms  # noqa: E402
from rlsd.export.fused_sums import fuse_pulled_sums  # noqa: E402
from rlsd.export.onnx_graph import to_onnx  # noqa: E402
from rlsd.export.package import Networks  # noqa: E402
from rlsd.export.pullback import split  # noqa: E402
from rlsd.export.tabulate import tabulate  # noqa: E402
from rlsd.export.trace import CUDA_REWRITES, REWRITES, to_aten  # noqa: E402

OURS = torch.ops.rlsd
ALL = [*REWRITES, *CUDA_REWRITES]


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    folder = tmp_path_factory.mktemp("sd")
    checkpoints.stable_diffusion(folder, text=False, block_out_channels=checkpoints.WIDE_END)
    return checkpoint.load(folder, (64, 64), ["inpainting"], None)


def found(graph: fx.GraphModule) -> list[int]:
    """How many convolutions from few channels, to few channels, and of the kind that both were."""
    targets = [node.target for node in graph.graph.nodes]
    to_few = targets.count(OURS.group_norm_taps.default) + targets.count(OURS.add_group_norm_taps.default)
    assert targets.count(OURS.sum_taps.default) == to_few
    return [targets.count(OURS.narrow_conv.default), to_few, targets.count(OURS.conv_nhwc.default)]


def test_the_decoder_and_its_pull_back_stay_as_they_are(networks: Networks) -> None:
    decoder, z = networks.decoder.double(), torch.randn(2, 4, 8, 8).double()
    parts = split(to_aten(decoder, [z], ALL), [z], ["z"])
    fuse_pulled_sums(parts.pull)
    image, *kept = parts.forward(z)
    known = {"z": z, **dict(zip(parts.kept, kept))}
    given = [torch.randn_like(image), *(known[name] for name in parts.pull_inputs)]
    pulled = parts.pull(*given)[0]
    others = [found(graph)[2] for graph in (parts.forward, parts.pull)]
    fuse_narrow(parts.forward)
    fuse_narrow(parts.pull)
    assert [found(parts.forward), found(parts.pull)] == [[1, 1, others[0] - 2], [1, 0, others[1] - 1]]
    for got, want in zip(parts.forward(z), [image, *kept], strict=True):
        assert torch.allclose(got, want, rtol=0, atol=1e-11)
    assert torch.allclose(parts.pull(*given)[0], pulled, rtol=0, atol=1e-11)
    planes = [n for n in parts.forward.graph.nodes if n.target == OURS.sum_taps.default]
    assert planes[0] in parts.forward.graph.find_nodes(op="output")[0].all_input_nodes  # nothing is transposed
    first = next(n for n in parts.pull.graph.nodes if n.target == OURS.narrow_conv.default)
    assert first.args[0].op == "placeholder" and first.args[3]


def test_the_denoiser_stays_as_it_is(networks: Networks) -> None:
    denoiser = networks.denoiser.double()
    args = [torch.randn(2, 4, 8, 8).double(), torch.tensor([3, 998]), torch.randn(2, 77, checkpoints.WIDTH).double()]
    graph = to_aten(denoiser, args, ALL)
    fuse_layer_norms(graph)
    want, (_, _, others) = graph(*args), found(graph)
    fuse_narrow(graph)
    assert found(graph) == [1, 0, others - 1]
    assert torch.allclose(graph(*args), want, rtol=0, atol=1e-11)


def test_a_denoiser_of_as_many_channels_as_the_published_ones() -> None:
    """Whose last convolution is rewritten, too."""
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(80, 80), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
        attention_head_dim=8, down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"), mid_block_type=None,
    ).double()  # fmt: skip
    denoiser = Denoiser(unet, torch.linspace(0.99, 0.01, 1000).double(), "epsilon")
    args = [torch.randn(2, 4, 8, 8).double(), torch.tensor([3, 998]), torch.randn(2, 5, 16).double()]
    graph = to_aten(denoiser, args, ALL)
    want, (_, _, others) = graph(*args), found(graph)
    fuse_narrow(graph)
    assert found(graph) == [1, 1, others - 2]
    tabulate(graph, 1, 1000, {})
    assert torch.allclose(graph(*args), want, rtol=0, atol=1e-11)


class Block(nn.Module):
    """A convolution from few channels, GroupNorm, SiLU, a convolution to few."""

    def __init__(self, narrow: int = 3, bias: bool = True, channels: int = 64, **options: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(narrow, channels, 3, padding=1, bias=bias)
        self.norm = nn.GroupNorm(4, channels)
        self.last = nn.Conv2d(channels, narrow, **({"kernel_size": 3, "padding": 1} | options), bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.silu(self.norm(self.first(x))))


class Branching(Block):
    """What is normalised goes to two places."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.silu(self.norm(self.first(x)))
        return self.last(y) + y.mean()


class Summed(Block):
    """The result is used where its channels are last, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return nn.functional.silu(y) + y


class Bare(Block):
    """No GroupNorm before the convolution to few channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


class Biased(Block):
    """Biases that are computed, which no kernel's constants can hold."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share, convolve = x.mean(), nn.functional.conv2d
        y = convolve(x, self.first.weight, self.first.bias * share, padding=1)
        return convolve(nn.functional.silu(self.norm(y)), self.last.weight, self.last.bias * share, padding=1)


@pytest.mark.parametrize(
    "make, wanted",
    [
        (Block, [1, 1, 0]),
        (Biased, [0, 0, 2]),
        (lambda: Block(1, bias=False), [1, 1, 0]),
        (lambda: Block(7, channels=128), [1, 1, 0]),
        (lambda: Block(7), [1, 0, 1]),  # its taps would be larger than what is normalised
        (lambda: Block(8, channels=256), [0, 0, 2]),
        (lambda: Block(channels=60), [0, 0, 2]),  # the kernels take multiples of 16
        (lambda: Block(kernel_size=1, padding=0), [1, 0, 1]),
        (lambda: Block(kernel_size=5, padding=2), [1, 0, 1]),
        (lambda: Block(padding=0), [1, 0, 1]),
        (lambda: Block(stride=2), [1, 0, 1]),
        (Branching, [1, 0, 1]),
        (Summed, [1, 1, 0]),
        (Bare, [1, 0, 1]),
    ],
)
def test_what_is_rewritten(make: Callable[[], nn.Module], wanted: list[int]) -> None:
    module = make().double()
    x = torch.randn(2, module.first.in_channels, 6, 8).double()
    graph = to_aten(module, [x], ALL)
    fuse_narrow(graph)
    assert found(graph) == wanted
    assert torch.allclose(graph(x), module(x), rtol=0, atol=1e-12)


def test_float32_stays() -> None:
    """In a module of it, and in an island among halves: a GroupNorm, or the convolution behind it."""
    x = torch.randn(2, 3, 6, 8)
    graph = to_aten(Block(), [x], ALL)
    fuse_narrow(graph)
    assert found(graph) == [0, 0, 2]
    module = Block()
    want = module(x)
    for target in (OURS.group_norm.default, OURS.conv_nhwc.default):
        graph = to_aten(copy.deepcopy(module).half(), [x.half()], ALL)
        large = [node.name for node in graph.graph.nodes if node.target == target][-1]
        islands.keep_precise(graph, frozenset({large}))
        fuse_narrow(graph)
        assert found(graph) == [1, 0, 1]
        got = graph(x.half()).float()
        assert (got - want).norm() <= 2e-3 * want.norm()


def test_taps_alone_ask_for_no_kernels_in_float32() -> None:
    x = torch.randn(2, 3, 6, 8).half()
    graph = to_aten(Block().half(), [x], ALL)
    fuse_narrow(graph)
    assert found(graph) == [1, 1, 0] and not any(map(cuda._wants_precise_kernel, graph.graph.nodes))


@pytest.mark.parametrize("make", [Block, lambda: Block(4, bias=False, channels=80), Summed])
def test_graphs_in_halves_do_it_on_a_cpu_too(make: Callable[[], nn.Module]) -> None:
    """What ONNX Runtime's CPU provider makes of the lowered graph: the module, to the rounding of halves."""
    module = make()
    x = torch.randn(2, module.first.in_channels, 6, 8)
    want = module(x)
    graph = to_aten(module.half(), [x.half()], ALL)
    fuse_narrow(graph)
    traced = cuda.Traced("block", graph, [x.half()], ["x"], ["y"])
    got = cuda.run_lowered(to_onnx(graph, [x.half()], ["x"], ["y"]), traced, {"x": x})["y"]
    assert (got - want).norm() <= 2e-3 * want.norm()


class Residual(Block):
    """A sum before the GroupNorm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(nn.functional.silu(self.norm(y + nn.functional.silu(y))))


def test_work_behind_a_sum() -> None:
    x = torch.randn(2, 3, 6, 8).double()
    graph = to_aten(Residual().double(), [x], ALL)
    want, work = graph(x), census.operations(graph)
    fuse_narrow(graph)
    assert [node for node in graph.graph.nodes if node.target == OURS.add_group_norm_taps.default]
    assert census.operations(graph) == work == 2 * 2 * 2 * 6 * 8 * 9 * 3 * 64
    assert torch.allclose(graph(x), want, rtol=0, atol=1e-12)


def test_work_and_bytes_by_hand() -> None:
    x, pixels = torch.randn(2, 3, 6, 8).half(), 2 * 6 * 8
    graph = to_aten(Block().half(), [x], ALL)
    work = census.operations(graph)
    fuse_narrow(graph)
    assert census.operations(graph) == work == 2 * 2 * pixels * 9 * 3 * 64
    halves, floats = 2, 4
    first = halves * (pixels * 3 + 32 * 64 + pixels * 64)  # the bias is the GroupNorm's
    taps = halves * (2 * pixels * 64 + 64 + 64 * 32) + floats * (2 * 64 + 2 * 2 * 4 + 27 * pixels)
    last = floats * 27 * pixels + halves * (3 + 3 * pixels)
    assert census.moved_bytes(graph) == first + taps + last
    # The taps beside what was normalised; nobody asks for mean and rstd.
    assert census.peak_bytes(graph) == halves * pixels * 64 + floats * 27 * pixels


def test_memory_is_given_out_as_onnx_runtime_plans_it() -> None:
    """The smallest gap that holds a value, else behind all; by hand, and for values that come and go."""
    held = [(0, 4, "a"), (8, 10, "b"), (13, 20, "c")]  # gaps of 4 and 3
    assert [census._smallest_gap(held, size) for size in (1, 3, 4, 5)] == [10, 10, 4, 20]

    class Halving(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = torch.cat([x, x])  # 8 floats, at 0
            second = first.sigmoid()  # 8, at 8; then first is free
            third = second[:4].exp()  # 4, in its place
            fourth = torch.cat([second, third[:2]])  # 10, behind all: neither gap holds it
            return fourth.sum() + third.sum()

    graph = to_aten(Halving(), [torch.randn(4)], ALL)
    assert census.peak_bytes(graph) == 4 * (8 + 8 + 10)
