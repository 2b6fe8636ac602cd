"""The export for CUDA, without a GPU: exact rewrites, few nodes, halves that stay close to float32."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from pathlib import Path

import checkpoints
import onnx
import pytest
import torch
from diffusers.models.activations import GEGLU
from taken_apart import ALL, kinds, taken_apart
from torch import nn

from rlsd.engine import Engine, RlsdError
from rlsd.export import CheckError, census, checkpoint, cuda, islands
from rlsd.export.diffusers_vae import Decoder
from rlsd.export.extractors import Penultimate
from rlsd.export.fused_norms import fuse_layer_norms
from rlsd.export.fused_sums import fuse_pulled_sums
from rlsd.export.limits import check_norms
from rlsd.export.onnx_graph import to_onnx
from rlsd.export.package import Networks
from rlsd.export.precompute import precompute
from rlsd.export.pullback import RECOMPUTED_ON_CUDA, split
from rlsd.export.tabulate import tabulate
from rlsd.export.trace import to_aten
from rlsd.models.fashion.classifier import Classifier

EACH = [
    [],
    *([name] for name in ("no_ops", "attention", "geglu", "rows", "linear", "channels_last")),
    ["no_ops", "group_norm", "channels_last", "sums"],
    ["no_ops", "group_norm", "upsampling", "linear", "channels_last", "biases"],
    ALL,
]
NAMES = ["none", *(r[-1] for r in EACH[1:-1]), "all"]


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    folder = checkpoints.stable_diffusion(tmp_path_factory.mktemp("sd"), text=False)
    checkpoints.vision_transformer(folder / "features")
    return checkpoint.load(folder, (64, 64), ["inpainting"], folder / "features")


@pytest.mark.parametrize("rewrites", EACH, ids=NAMES)
def test_rewrites_leave_the_decoder_and_its_pull_back_as_they_are(networks: Networks, rewrites: list[str]) -> None:
    decoder = networks.decoder.double()
    taken_apart(decoder, torch.randn(2, 4, 8, 8, dtype=torch.float64), rewrites, atol=1e-11)


@pytest.mark.parametrize("rewrites", EACH, ids=NAMES)
def test_rewrites_leave_the_denoiser_as_it_is(networks: Networks, rewrites: list[str]) -> None:
    denoiser = networks.denoiser.double()
    args = [torch.randn(2, 4, 8, 8).double(), torch.tensor([3, 998]), torch.randn(2, 77, checkpoints.WIDTH).double()]
    with torch.no_grad():
        want = denoiser(*args)
    graph = to_aten(denoiser, args, rewrites)
    assert torch.allclose(graph(*args), want, rtol=0, atol=1e-11)
    if "rows" in rewrites:
        fuse_layer_norms(graph)
        assert torch.allclose(graph(*args), want, rtol=0, atol=1e-11)
    tabulate(graph, 1, 1000, {})
    context, graph = precompute(graph, 2)
    assert torch.allclose(graph(*args[:2], *context(args[2]))[0], want, rtol=0, atol=1e-11)


def test_a_convolutional_extractor_has_its_channels_last_too() -> None:
    """Halving convolutions, one of an odd size among them, whose pull-back stays as it was."""
    for side, stray in ((32, 0), (20, 1)):  # 20, 10, 5
        extractor = Penultimate(Classifier((8, 16, 32), groups=4)).double()
        parts, _ = taken_apart(extractor, torch.randn(2, 1, side, side, dtype=torch.float64), ALL)
        plain = [node for node in parts.pull.graph.nodes if node.target == torch.ops.aten.convolution.default]
        assert len(plain) == stray
        assert_interleaves_fit(parts.pull)


def test_a_transformers_pull_back_has_few_nodes(networks: Networks) -> None:
    features = networks.features.double().eval().requires_grad_(False)
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    taken_apart(features, image, ["attention", "rows"])
    parts, given = taken_apart(features, image, ALL)
    norms = sum(isinstance(module, nn.LayerNorm) for module in features.modules())
    found = kinds(parts.pull, given, ["cotangent", *parts.pull_inputs], ["x_cotangent"])
    layers = found["rlsd.GeluPull"]
    assert layers >= 1 and found["rlsd.LayerNormPull"] == norms == 2 * layers + 1
    assert found["rlsd.SoftmaxPull"] == layers and found["com.microsoft.FusedMatMul"] == 5 * layers
    assert found["MatMul"] <= 6 * layers + 2  # its own pull-backs: nothing of the forward pass is made again
    assert not {"Erf", "Cast", "ReduceSum", "Exp", "Gelu", "rlsd.BiasResidual"} & found.keys()


def test_gates_between_convolutions_keep_the_channels_last() -> None:
    gated = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GELU(), nn.Conv2d(16, 16, 3), nn.GELU(), nn.Conv2d(16, 3, 3)).half()
    x = torch.randn(1, 3, 16, 16).half()
    found = kinds(to_aten(gated, [x], ALL), [x], ["x"], ["y"])
    assert found["Transpose"] == 2 and found["Gelu"] == 2


def test_kernels_for_float32_are_asked_for_where_a_module_casts() -> None:
    x = torch.randn(2, 4, 16).half()
    for module, wanted in ((nn.LayerNorm(16).half(), False), (InFloat32(), True)):
        graph = to_aten(module, [x], ALL)
        assert any(map(cuda._wants_precise_kernel, graph.graph.nodes)) == wanted


class InFloat32(nn.LayerNorm):
    def __init__(self) -> None:
        super().__init__(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


def assert_interleaves_fit(graph: torch.fx.GraphModule) -> None:
    """There are some, and the GPU's kernel takes their channels."""
    found = [node for node in graph.graph.nodes if node.target == torch.ops.rlsd.interleave.default]
    assert found and all(node.meta["val"].shape[3] % 16 == 0 for node in found)


def test_an_upsampling_to_few_channels_is_filled_up_with_zeros() -> None:
    layers = nn.Conv2d(4, 8, 3, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3, padding=1)
    up = nn.Sequential(*layers).double()
    parts, given = taken_apart(up, torch.randn(2, 4, 6, 5, dtype=torch.float64), ALL)
    assert_interleaves_fit(parts.forward)
    assert kinds(parts.pull, given, ["cotangent"], ["z_cotangent"])["rlsd.InterleavePullNhwc"] == 1


@pytest.mark.parametrize("channels, groups, fits", [(32, 4, True), (24, 3, False), (512, 2, False), (48, 3, True)])
def test_a_norm_that_is_not_for_the_kernels_is_refused(channels: int, groups: int, fits: bool) -> None:
    norm = nn.Sequential(nn.Conv2d(3, channels, 3), nn.GroupNorm(groups, channels)).half()
    graph = to_aten(norm, [torch.randn(1, 3, 8, 8).half()], ALL)
    refused = pytest.raises(CheckError, match=rf"graph f: a GroupNorm of {channels} channels in {groups} groups is not")
    with contextlib.nullcontext() if fits else refused:
        check_norms("f", graph)


@pytest.mark.parametrize("batch, fits", [(1024, True), (1025, False)])
def test_a_norm_with_too_many_partial_sums_is_refused(batch: int, fits: bool) -> None:
    norm = nn.Sequential(nn.Conv2d(1, 512, 1), nn.GroupNorm(512, 512)).half()
    graph = to_aten(norm, [torch.ones(batch, 1, 2, 2).half()], ALL)
    with contextlib.nullcontext() if fits else pytest.raises(CheckError, match="512 groups and a batch of 1025 need"):
        check_norms("f", graph)


def test_a_norm_without_a_pull_back_is_refused_there() -> None:
    norm, x = nn.Sequential(nn.Conv2d(3, 80, 3), nn.GroupNorm(8, 80), nn.SiLU()).half(), torch.randn(1, 3, 8, 8).half()
    parts = split(to_aten(norm, [x], ALL), [x], ["x"])
    check_norms("f", parts.forward)
    with pytest.raises(CheckError, match="in a pull-back divisors of 64"):
        check_norms("f_pull", parts.pull)


def test_decoder_has_few_nodes_and_no_stray_ones(networks: Networks) -> None:
    z = torch.randn(1, 4, 8, 8).half()
    decoder = networks.decoder.half()
    convolutions = sum(isinstance(module, nn.Conv2d) for module in decoder.modules())
    norms = sum(isinstance(module, nn.GroupNorm) for module in decoder.modules())
    parts = split(to_aten(decoder, [z], ALL), [z], ["z"], recomputed=RECOMPUTED_ON_CUDA)
    fuse_pulled_sums(parts.pull)
    found = kinds(parts.forward, [z], ["z"], ["image", *parts.kept])
    assert found["com.microsoft.NhwcConv"] == convolutions
    assert found["rlsd.GroupNormNhwc"] + found["rlsd.AddGroupNormNhwc"] == norms
    assert found["Add"] == 3 and found["rlsd.BiasResidual"] == 4  # queries, keys, values; residuals without a GroupNorm
    assert found["com.microsoft.MultiHeadAttention"] == 1
    assert found["Transpose"] == 2 and found["Reshape"] == 2 and "Cast" not in found  # the border; attention's tokens
    given = [torch.zeros(1, 3, 64, 64).half(), *(torch.zeros(v.shape, dtype=v.dtype) for v in parts.kept_values)]
    assert len(parts.pull_inputs) == len(parts.kept)
    pull = kinds(parts.pull, given, ["cotangent", *parts.pull_inputs], ["z_cotangent"])
    assert pull["com.microsoft.NhwcConv"] == convolutions and pull["rlsd.GroupNormPullNhwc"] == norms
    assert pull["Add"] <= 6
    assert pull["Transpose"] <= 6 and pull["Reshape"] == 2
    assert pull["rlsd.SoftmaxPull"] == 1 and not {"Cast", "ReduceSum"} & pull.keys()


def test_denoiser_has_no_stray_nodes_and_its_context_is_computed_apart(networks: Networks) -> None:
    denoiser = networks.denoiser.half()
    args = [torch.randn(1, 4, 8, 8).half(), torch.tensor([5]), torch.randn(1, 77, checkpoints.WIDTH).half()]
    graph = to_aten(denoiser, args, ALL)
    fuse_layer_norms(graph)
    tabulate(graph, 1, 1000, {})
    context, graph = precompute(graph, 2)
    given = [*args[:2], *context(args[2])]
    names = [f"context_{i}" for i in range(len(given) - 2)]
    found = kinds(graph, given, ["z_t", "t", *names], ["eps"])
    blocks = len(names) // 2
    assert found["com.microsoft.MultiHeadAttention"] == 2 * blocks
    assert found["rlsd.AddLayerNorm"] == 3 * blocks and "LayerNormalization" not in found
    assert found["Split"] == found["Gelu"] == blocks and "com.microsoft.BiasSplitGelu" not in found  # narrow: see below
    assert found["Transpose"] == 2 and "Cast" not in found and "Sin" not in found
    assert kinds(context, [args[2]], ["context"], names) == {"MatMul": 2 * blocks}


@pytest.mark.parametrize("width, fused", [(2560, True), (2048, False), (5120, True)])
def test_gates_are_fused_in_the_widths_that_the_gpu_has(width: int, fused: bool) -> None:
    gate, x = GEGLU(16, width // 2).half(), torch.randn(1, 3, 16).half()
    graph = to_aten(gate, [x], ALL)
    model = to_onnx(graph, [x], ["x"], ["y"])
    found = census.node_kinds(model)
    assert found == {"MatMul": 1, "com.microsoft.BiasSplitGelu": 1} if fused else "Gelu" in found
    y = cuda.run_lowered(model, cuda.Traced("gate", graph, [x], ["x"], ["y"]), {"x": x})["y"]
    torch.testing.assert_close(y, gate.float()(x.float()), rtol=4e-3, atol=2e-3)


class Attention(nn.Module):
    """Of q, k and v, each [B, L, C]; of x alone, where that is all."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        apart = [x.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for x in (given * 3)[:3]]
        y = torch.nn.functional.scaled_dot_product_attention(*apart)
        return y.transpose(1, 2).reshape(given[0].shape)


@pytest.mark.parametrize("heads, kept", [(1, [(2, 5, 5)]), (2, [])])
def test_probabilities_of_a_wide_head_are_kept_for_its_pull_back(heads: int, kept: list[tuple[int, ...]]) -> None:
    parts, given = taken_apart(Attention(heads), torch.randn(2, 5, 272).double(), ALL)
    assert [tuple(value.shape) for value in parts.kept_values] == kept
    found = kinds(parts.pull, given, ["cotangent", *parts.pull_inputs], ["x_cotangent"])
    assert found["com.microsoft.FusedMatMul"] == (4 if kept else 5) and ("Softmax" in found) == (not kept)


@pytest.mark.parametrize("heads, width, one", [(1, 256, True), (1, 272, False), (2, 512, True)])
def test_attention_of_wide_heads_is_two_products(heads: int, width: int, one: bool) -> None:
    given = [torch.randn(2, length, heads * width).half() for length in (5, 7, 7)]
    graph = to_aten(Attention(heads), given, ALL)
    model = to_onnx(graph, given, ["q", "k", "v"], ["y"])
    apart = {"com.microsoft.FusedMatMul": 2, "Softmax": 1}
    assert census.node_kinds(model) == ({"com.microsoft.MultiHeadAttention": 1} if one else apart)
    if not one:
        traced = cuda.Traced("attention", graph, given, ["q", "k", "v"], ["y"])
        y = cuda.run_lowered(model, traced, dict(zip("qkv", given)))["y"]
        q, k, v = (x.float() for x in given)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(y, want, rtol=4e-3, atol=2e-3)
        scores = 2 * 5 * 7 * 2  # bytes
        assert census.moved_bytes(graph) == sum(x.nbytes for x in given) + given[0].nbytes + 4 * scores


def test_a_bundle_for_cuda(networks: Networks, tmp_path: Path) -> None:
    bundle = cuda.package_cuda(networks, tmp_path / "b", name="toy", architectures=[90], batches=[2])
    lines = [line.split() for line in (bundle / "manifest.txt").read_text().splitlines()]
    graphs = {line[1] for line in lines if line[0] == "graph"}
    assert {"context", "denoiser", "decoder", "decoder_pull", "features", "features_pull"} < graphs
    checks = {line[1]: line[3:] for line in lines if line[:1] == ["check"] and line[2] == "halves"}
    assert checks.keys() == {"denoiser", "decoder", "decoder_pull", "features", "features_pull"}
    assert all(1e-5 < float(error) < 5e-3 for error, _ in checks.values())  # halves: neither exact nor far off
    kernels = [line for line in lines if line[0] == "kernel"]
    assert kernels and all((bundle / line[3]).read_bytes()[:4] == b"\x7fELF" for line in kernels)
    assert not [file for file in bundle.iterdir() if file.stat().st_size == 0]
    nodes = {(line[2], line[4]) for line in lines if line[:2] == ["info", "nodes"]}
    fused = {"com.microsoft.MultiHeadAttention"}  # of the vision transformer, too
    assert {(name, kind) for name in ("denoiser", "features") for kind in fused} <= nodes
    assert {("denoiser", "rlsd.AddGroupNormNhwc"), ("denoiser", "rlsd.AddLayerNorm")} <= nodes
    assert {("decoder", "rlsd.NarrowConv"), ("decoder_pull", "rlsd.GroupNormPullPhases")} <= nodes
    assert ("features", "rlsd.AddLayerNorm") in nodes and ("features", "Softmax") not in nodes
    assert any("BLOCK=64" in line for line in kernels)
    denoiser = onnx.load(bundle / "denoiser.b2.onnx", load_external_data=False)
    kinds_of_input = {value.type.tensor_type.elem_type for value in denoiser.graph.input}
    assert kinds_of_input == {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    with pytest.raises(RlsdError, match="exported for 'cuda'"):
        Engine(bundle, device="cpu")


def test_lowered_graphs_round_to_halves(networks: Networks) -> None:
    z = torch.randn(1, 4, 8, 8).half()
    graph = to_aten(networks.decoder.half(), [z], ALL)
    traced = cuda.Traced("decoder", graph, [z], ["z"], ["image"])
    image = cuda.run_lowered(to_onnx(graph, [z], ["z"], ["image"]), traced, {"z": z})["image"]
    assert torch.equal(image, image.half().float())


class Loud(nn.Module):
    """A decoder whose residual stream no half can hold; `volume` is what reaches the image."""

    def __init__(self, decoder: nn.Module, volume: float) -> None:
        super().__init__()
        self.decoder, self.volume = copy.deepcopy(decoder), volume

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(z) * self.volume


def loud(networks: Networks, volume: float = 1.0) -> Networks:
    decoder = Loud(networks.decoder.float(), volume)
    convolution = next(m for name, m in decoder.named_modules() if name.endswith("up_blocks.1.resnets.0.conv2"))
    convolution.weight.data *= 1e6
    return replace(networks, decoder=decoder, features=None, operators={})


def test_what_is_too_large_for_halves_stays_in_float32(networks: Networks, tmp_path: Path) -> None:
    bundle = cuda.package_cuda(loud(networks), tmp_path / "b", name="loud", architectures=[90], batches=[1])
    lines = [line.split() for line in (bundle / "manifest.txt").read_text().splitlines()]
    kept = [line for line in lines if line[:2] == ["info", "float32"]]
    assert {line[2] for line in kept} == {"decoder"}
    names = {line[1] for line in lines if line[0] == "kernel"}
    assert {"group_norm_apply_64_fp16", "group_norm_apply_64_fp32", "group_norm_pull_apply_64_fp32"} <= names
    decoder = onnx.load(bundle / "decoder.b1.onnx", load_external_data=False)
    casts = sum(node.op_type == "Cast" for node in decoder.graph.node)
    assert 2 <= casts <= 16 and len(kept) < 20 < len(decoder.graph.node)  # an island, not the whole graph


def test_islands_are_as_small_as_what_overflows(networks: Networks) -> None:
    z = torch.randn(1, 4, 8, 8).half()
    quiet = to_aten(networks.decoder.half(), [z], ALL)
    assert islands.too_large(quiet, [z]) == frozenset()
    decoder = loud(networks).decoder.half()
    precise = copy.deepcopy(decoder).float()
    graph = to_aten(decoder, [z], ALL)
    large = islands.too_large(graph, [z])
    assert large and not graph(z).isfinite().all()
    with pytest.raises(KeyError):
        islands.keep_precise(graph, ["no_such_node"])
    islands.keep_precise(graph, large)
    want = precise(z.float())
    assert (graph(z) - want).norm() <= 1e-2 * want.norm()


def test_an_image_that_overflows_halves_is_refused(networks: Networks, tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=r"decoder.*half"):
        cuda.package_cuda(loud(networks, 1e6), tmp_path / "b", name="loud", architectures=[90], batches=[1])
    assert list(tmp_path.iterdir()) == []


def test_memory_and_work_of_stable_diffusions_decoder() -> None:
    from rlsd.export.random_checkpoint import build_vae

    decoder = Decoder(build_vae()).half()
    z = torch.zeros(1, 4, 64, 64).half()
    plain = to_aten(decoder, [z], [name for name in ALL if name != "upsampling"])
    assert census.operations(plain) == pytest.approx(2.515e12, rel=0.01)  # ALGORITHM.md's count, before folding
    parts = split(to_aten(decoder, [z], ALL), [z], ["z"], recomputed=RECOMPUTED_ON_CUDA)
    assert census.operations(parts.forward) < 0.9 * census.operations(plain)
    assert sum(v.numel() * v.element_size() for v in parts.kept_values) <= 1.1e9
