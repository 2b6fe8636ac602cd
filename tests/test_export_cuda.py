"""The export for CUDA, without a GPU: exact rewrites, few nodes, halves that stay close to float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import checkpoints
import onnx
import pytest
import torch
from torch import nn

from rlsd.engine import Engine, RlsdError
from rlsd.export import CheckError, census, checkpoint, cuda
from rlsd.export.onnx_graph import to_onnx
from rlsd.export.precompute import precompute
from rlsd.export.pullback import RECOMPUTED_ON_CUDA, split
from rlsd.export.tabulate import tabulate
from rlsd.export.trace import CUDA_REWRITES, REWRITES, to_aten

ALL = [*REWRITES, *CUDA_REWRITES]
EACH = [[], *([name] for name in ("no_ops", "attention", "geglu", "linear", "channels_last")), ALL]


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> checkpoint.Networks:
    folder = checkpoints.stable_diffusion(tmp_path_factory.mktemp("sd"), text=False)
    checkpoints.vision_transformer(folder / "features")
    return checkpoint.load(folder, (64, 64), ["inpainting"], folder / "features")


@pytest.mark.parametrize("rewrites", EACH, ids=["none", *(r[0] for r in EACH[1:-1]), "all"])
def test_rewrites_leave_the_decoder_and_its_pull_back_as_they_are(
    networks: checkpoint.Networks, rewrites: list[str]
) -> None:
    decoder = networks.decoder.double()
    z = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    parts = split(to_aten(decoder, [z], rewrites), [z], ["z"], recomputed=RECOMPUTED_ON_CUDA)
    source = z.clone().requires_grad_()
    y = decoder(source)
    cotangent = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, source, cotangent)
    got, *kept = parts.forward(z)
    known = {"z": z, **dict(zip(parts.kept, kept))}
    assert torch.allclose(got, y, rtol=0, atol=1e-12)
    assert torch.allclose(parts.pull(cotangent, *(known[n] for n in parts.pull_inputs))[0], want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rewrites", EACH, ids=["none", *(r[0] for r in EACH[1:-1]), "all"])
def test_rewrites_leave_the_denoiser_as_it_is(networks: checkpoint.Networks, rewrites: list[str]) -> None:
    denoiser = networks.denoiser.double()
    args = [torch.randn(2, 4, 8, 8).double(), torch.tensor([3, 998]), torch.randn(2, 77, checkpoints.WIDTH).double()]
    with torch.no_grad():
        want = denoiser(*args)
    graph = to_aten(denoiser, args, rewrites)
    assert torch.allclose(graph(*args), want, rtol=0, atol=1e-11)
    tabulate(graph, 1, 1000, {})
    context, graph = precompute(graph, 2)
    assert torch.allclose(graph(*args[:2], *context(args[2]))[0], want, rtol=0, atol=1e-11)


def kinds(module: nn.Module, args: list[torch.Tensor], inputs: list[str], outputs: list[str]) -> dict[str, int]:
    return census.node_kinds(to_onnx(module, args, inputs, outputs))


def test_decoder_has_few_nodes_and_no_stray_ones(networks: checkpoint.Networks) -> None:
    z = torch.randn(1, 4, 8, 8).half()
    decoder = networks.decoder.half()
    convolutions = sum(isinstance(module, nn.Conv2d) for module in decoder.modules())
    norms = sum(isinstance(module, nn.GroupNorm) for module in decoder.modules())
    parts = split(to_aten(decoder, [z], ALL), [z], ["z"], recomputed=RECOMPUTED_ON_CUDA)
    found = kinds(parts.forward, [z], ["z"], ["image", *parts.kept])
    assert found["com.microsoft.NhwcConv"] == convolutions and found["rlsd.GroupNormNhwc"] == norms
    assert found["com.microsoft.MultiHeadAttention"] == 1
    assert found["Transpose"] == 2 and found["Reshape"] == 2 and "Cast" not in found  # the border; attention's tokens
    given = [torch.zeros(1, 3, 64, 64).half(), *(torch.zeros(v.shape, dtype=v.dtype) for v in parts.kept_values)]
    assert len(parts.pull_inputs) == len(parts.kept)
    pull = kinds(parts.pull, given, ["cotangent", *parts.pull_inputs], ["z_cotangent"])
    assert pull["com.microsoft.NhwcConv"] == convolutions and pull["rlsd.GroupNormPullNhwc"] == norms
    assert pull["Transpose"] <= 6 and pull["Reshape"] == 2
    assert pull["Cast"] == 2 and pull["ReduceSum"] == 1  # the sum in the pull-back of softmax, in float32


def test_denoiser_has_no_stray_nodes_and_its_context_is_computed_apart(networks: checkpoint.Networks) -> None:
    denoiser = networks.denoiser.half()
    args = [torch.randn(1, 4, 8, 8).half(), torch.tensor([5]), torch.randn(1, 77, checkpoints.WIDTH).half()]
    graph = to_aten(denoiser, args, ALL)
    tabulate(graph, 1, 1000, {})
    context, graph = precompute(graph, 2)
    given = [*args[:2], *context(args[2])]
    names = [f"context_{i}" for i in range(len(given) - 2)]
    found = kinds(graph, given, ["z_t", "t", *names], ["eps"])
    blocks = len(names) // 2
    assert found["com.microsoft.MultiHeadAttention"] == 2 * blocks and found["com.microsoft.BiasSplitGelu"] == blocks
    assert found["Transpose"] == 2 and "Cast" not in found and "Sin" not in found
    assert kinds(context, [args[2]], ["context"], names) == {"MatMul": 2 * blocks}


def test_a_bundle_for_cuda(networks: checkpoint.Networks, tmp_path: Path) -> None:
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
    denoiser = onnx.load(bundle / "denoiser.b2.onnx", load_external_data=False)
    kinds_of_input = {value.type.tensor_type.elem_type for value in denoiser.graph.input}
    assert kinds_of_input == {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    with pytest.raises(RlsdError, match="target 'cuda'"):
        Engine(bundle)


def test_lowered_graphs_round_to_halves(networks: checkpoint.Networks) -> None:
    z = torch.randn(1, 4, 8, 8).half()
    graph = to_aten(networks.decoder.half(), [z], ALL)
    traced = cuda.Traced("decoder", graph, [z], ["z"], ["image"])
    image = cuda.run_lowered(to_onnx(graph, [z], ["z"], ["image"]), traced, {"z": z})["image"]
    assert torch.equal(image, image.half().float())


class Loud(nn.Module):
    """A decoder with a value that no half can hold on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 3, 1, bias=False)
        nn.init.constant_(self.up.weight, 3e4)
        nn.init.constant_(self.down.weight, 1e-6)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(nn.functional.interpolate(z, scale_factor=8.0)))


def test_a_value_that_overflows_halves_is_refused(networks: checkpoint.Networks, tmp_path: Path) -> None:
    loud = replace(networks, decoder=Loud(), features=None)
    with pytest.raises(CheckError, match=r"decoder.*half"):
        cuda.package_cuda(loud, tmp_path / "b", name="loud", architectures=[90], batches=[1])
    assert list(tmp_path.iterdir()) == []


def test_memory_and_work_of_stable_diffusions_decoder() -> None:
    from rlsd.export.random_checkpoint import build_vae

    decoder = checkpoint.Decoder(build_vae()).half()
    z = torch.zeros(1, 4, 64, 64).half()
    plain = to_aten(decoder, [z], [name for name in ALL if name != "upsampling"])
    assert census.operations(plain) == pytest.approx(2.515e12, rel=0.01)  # ALGORITHM.md's count, before folding
    parts = split(to_aten(decoder, [z], ALL), [z], ["z"], recomputed=RECOMPUTED_ON_CUDA)
    assert census.operations(parts.forward) < 0.9 * census.operations(plain)
    assert sum(v.numel() * v.element_size() for v in parts.kept_values) <= 1.1e9


def test_an_unknown_architecture_is_named(networks: checkpoint.Networks, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="arch 70 is not known: 80, 86"):
        cuda.package_cuda(networks, tmp_path / "b", name="old", architectures=[80, 70])
    assert list(tmp_path.iterdir()) == []
