"""Packages networks for NVIDIA GPUs: graphs in halves of few, fused nodes with their channels last, and cubins.

The graphs have static shapes. Beside those of a bundle for CPUs there is `context`: (context) -> the keys and values of
every cross-attention, computed once per job; the denoiser takes these, named context_0 and so on, in place of the
context. The pull-backs expect a cotangent of about unit size times `cotangent_scale`, and give theirs times it.

Nothing here needs a GPU. Decoder, pull-back and denoiser are checked at a small size of the same weights: the graph is
lowered to what ONNX Runtime has on a CPU, rounds to halves where the GPU does, and is compared with torch in float32.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from rlsd.export import census, islands
from rlsd.export.bundle import BundleWriter
from rlsd.export.check import CheckError, open_session
from rlsd.export.cubins import Cubins
from rlsd.export.fused_narrow import fuse_narrow
from rlsd.export.fused_norms import fuse_layer_norms
from rlsd.export.fused_sums import fuse_pulled_phases, fuse_pulled_sums
from rlsd.export.limits import check_norms
from rlsd.export.lower import lower
from rlsd.export.onnx_graph import to_onnx
from rlsd.export.package import VERSION, Networks, Packer, check_batches, check_noise, example_context, write_facts
from rlsd.export.precompute import precompute
from rlsd.export.pullback import RECOMPUTED_ON_CUDA, Split, split
from rlsd.export.tabulate import tabulate
from rlsd.export.trace import CUDA_REWRITES, CUDA_SAVINGS, REWRITES, all_but, plain_attention, to_aten
from rlsd.kernels.aot import ARCHITECTURES

LARGEST_ERROR, LEAST_COSINE = 2e-2, 0.999
# Savings whose kernels know no other layout.
ON_CHANNELS_LAST = ("group_norm", "upsampling", "sums", "biases", "narrow")
HEADROOM = 64  # how far below the largest half the largest value seen in a pull-back may lie


def package_cuda(
    networks: Networks,
    path: Path | str,
    *,
    name: str,
    architectures: Sequence[int],
    batches: Sequence[int] = (1, 4),
    without: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Exports `networks` to a new bundle for CUDA in halves at `path` and returns it.

    architectures: compute capabilities times 10, for the cubins; with none the bundle has no kernels of ours. batches:
    as for rlsd.export.package. without: which of rlsd.export.trace.CUDA_SAVINGS to leave out, to see what they bring;
    channels_last takes along what builds on it. The networks' weights are rounded to halves in place.
    Raises CheckError when a graph strays from its module, when an input or output of a graph does not fit into a half,
    or when a GroupNorm is not for the kernels; ValueError for an architecture or batches that are not known;
    RuntimeError when a kernel does not compile.
    """
    check_batches(batches)
    for arch in architectures:
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch {arch} is not known: {', '.join(map(str, ARCHITECTURES))}")
    chosen = all_but(CUDA_SAVINGS, [*without, *(ON_CHANNELS_LAST if "channels_last" in without else [])])
    with (
        torch.random.fork_rng(devices=[]),
        BundleWriter(Path(path), name, f"rlsd {VERSION}", "cuda", "fp16", overwrite) as bundle,
        Cubins(architectures) if architectures else contextlib.nullcontext() as cubins,
    ):
        torch.manual_seed(0)
        write_facts(networks, bundle)
        packer = CudaPacker(networks, bundle, chosen)
        packer.pack(sorted(batches))
        if cubins is not None:
            cubins.add(bundle, precise=packer.precise)
    return Path(path)


@dataclass(frozen=True)
class Traced:
    """A graph ready for ONNX, with what its inputs and outputs are called."""

    name: str
    graph: fx.GraphModule
    args: list[Tensor]
    inputs: list[str]
    outputs: list[str]


class CudaPacker:
    """Exports the graphs of a bundle for CUDA, first at a small size to check them, then for every batch."""

    def __init__(self, networks: Networks, bundle: BundleWriter, savings: Sequence[str]):
        self.networks, self.bundle, self.savings = networks, bundle, savings
        self.rewrites = [name for name in savings if name in REWRITES | CUDA_REWRITES]
        self.tables: dict[str, Tensor] = {}
        self.large: dict[str, frozenset[str]] = {}  # by network: nodes whose results do not fit into halves
        self.nodes: dict[str, list[str]] = {}  # and all nodes of the small graph
        self.precise = False  # whether one of our kernels gets float32

    def pack(self, batches: Sequence[int]) -> None:
        networks = self.networks
        # Not smaller: at 1 x 1, to which a UNet of four levels takes 8 x 8, a row for all pixels is an image.
        small = [networks.latent[0], *(min(side, 16) for side in networks.latent[1:])]
        self._denoiser(batches, small)
        self._with_pull("decoder", networks.decoder, "z", "image", networks.latent, batches, small)
        if networks.features is not None:
            self._with_pull("features", networks.features, "image", "phi", networks.image, batches, networks.image)
        for batch in batches:
            operators = Packer(networks, self.bundle, batch, "fp32", self.savings, {})
            for name, operator in networks.operators.items():
                operators.operator(name, operator)

    def _denoiser(self, batches: Sequence[int], small: Sequence[int]) -> None:
        module, networks = self.networks.denoiser.float().eval(), self.networks
        count = len(networks.alphas_cumprod)
        null = networks.null_context

        def inputs(batch: int, latent: Sequence[int]) -> list[Tensor]:
            given = [torch.randn(batch, *latent), torch.arange(batch) * (count // 2) % count]
            return given if null is None else [*given, example_context(null, batch)]

        example = inputs(2, small)
        with torch.no_grad(), plain_attention():
            want = module(*example)
        check_noise(want, example[0])
        halved = module.half()
        context, graph = self._trace_denoiser(halved, example)
        known = dict(zip(["z_t", "t", "context"], example))
        if context is not None:
            known |= self._check(context, {"context": example[2]}, {})
        self._check(graph, known, {"eps": want})
        self.tables.clear()  # known by nodes' names, which another size need not share: the bundle's are of its first
        for batch in batches:
            context, graph = self._trace_denoiser(halved, inputs(batch, networks.latent))
            self._add(graph, batch)
            if context is not None:
                self._add(context, batch)
                kept_bytes = sum(value.numel() * value.element_size() for value in graph.args[2:])
                self.bundle.fact("info", "kept", "context", batch, kept_bytes)

    def _trace_denoiser(self, module: nn.Module, example: list[Tensor]) -> tuple[Traced | None, Traced]:
        args = [x.half() if x.is_floating_point() else x for x in example]
        graph = self._to_aten("denoiser", module, args)
        if "rows" in self.savings:
            fuse_layer_norms(graph)
        if "narrow" in self.savings:
            fuse_narrow(graph)
        if "timesteps" in self.savings:
            tabulate(graph, 1, len(self.networks.alphas_cumprod), self.tables)
        if len(args) == 2 or "context" not in self.savings:
            return None, Traced("denoiser", graph, args, ["z_t", "t", "context"][: len(args)], ["eps"])
        before, graph = precompute(graph, 2)
        given = [node for node in graph.graph.nodes if node.op == "placeholder"][2:]
        names = [f"context_{i}" for i in range(len(given))]
        values = [torch.zeros(node.meta["val"].shape, dtype=torch.float16) for node in given]
        context = Traced("context", before, args[2:], ["context"], names)
        return context, Traced("denoiser", graph, [*args[:2], *values], ["z_t", "t", *names], ["eps"])

    def _to_aten(self, name: str, module: nn.Module, args: list[Tensor]) -> fx.GraphModule:
        """The graph in halves but for what is too large for them, looked for in the first call, which is small."""
        graph = to_aten(module, args, self.rewrites)
        first = name not in self.large
        nodes = [node.name for node in graph.graph.nodes]
        if first:
            self.large[name], self.nodes[name] = islands.too_large(graph, args), nodes
        elif self.large[name] and nodes != self.nodes[name]:
            raise CheckError(
                f"graph {name} has other nodes at full size than at the small one, where {len(self.large[name])} were "
                "seen that do not fit into halves"
            )
        kept = islands.keep_precise(graph, self.large[name])
        if first:
            for node in kept:
                self.bundle.fact("info", "float32", name, node)
        return graph

    def _with_pull(
        self, name: str, module: nn.Module, source: str, output: str,
        shape: Sequence[int], batches: Sequence[int], small: Sequence[int],
    ) -> None:  # fmt: skip
        module = module.float().eval().requires_grad_(False)
        x = torch.randn(1, *small) if source == "z" else torch.rand(1, *small) * 2 - 1
        y, pulled, cotangent = _pulled(module, x)
        halved = module.half()
        forward, pull, parts = self._trace_pull(name, halved, x, source, output)
        kept = self._check(forward, {source: x}, {output: y})
        known = {source: x, **kept}
        scale = self._scale(parts, [cotangent, *(known[n] for n in parts.pull_inputs)], name)
        self._check(pull, {**known, "cotangent": cotangent * scale}, {f"{source}_cotangent": pulled * scale})
        self.bundle.fact("cotangent_scale", name, float(scale))
        for batch in batches:
            forward, pull, parts = self._trace_pull(name, halved, torch.randn(batch, *shape), source, output)
            self._add(forward, batch)
            self._add(pull, batch)
            kept_bytes = sum(v.numel() * v.element_size() for v in parts.kept_values)
            self.bundle.fact("info", "kept", name, batch, kept_bytes)

    def _trace_pull(
        self, name: str, module: nn.Module, x: Tensor, source: str, output: str
    ) -> tuple[Traced, Traced, Split]:
        x = x.half()
        graph = self._to_aten(name, module, [x])
        recomputed = RECOMPUTED_ON_CUDA if "recompute" in self.savings else frozenset()
        parts = split(graph, [x], [source], recomputed=recomputed)
        if "sums" in self.rewrites:
            fuse_pulled_sums(parts.pull)
        if "phases" in self.savings:
            fuse_pulled_phases(parts.pull)
        if "rows" in self.savings:
            fuse_layer_norms(parts.forward)
        if "narrow" in self.savings:
            fuse_narrow(parts.forward)
            fuse_narrow(parts.pull)
        y = next(node for node in parts.forward.graph.nodes if node.op == "output").args[0][0].meta["val"]
        # Only their shapes count, and memory that nobody writes is not taken: with 8 samples they are 7 GB.
        known = {source: x} | {n: torch.empty(v.shape, dtype=v.dtype) for n, v in zip(parts.kept, parts.kept_values)}
        cotangent = torch.empty(y.shape, dtype=torch.float16)
        given = [cotangent, *(known[n] for n in parts.pull_inputs)]
        forward = Traced(name, parts.forward, [x], [source], [output, *parts.kept])
        names = ["cotangent", *parts.pull_inputs]
        return forward, Traced(f"{name}_pull", parts.pull, given, names, [f"{source}_cotangent"]), parts

    def _scale(self, parts: Split, args: list[Tensor], name: str) -> float:
        """The power of two that lifts the largest value of the pull-back to HEADROOM below the largest half."""
        largest = max(census.largest_values(parts.pull, args).values())
        if not 0 < largest < math.inf:
            raise CheckError(f"graph {name}_pull: its largest value is {largest}")
        return 2.0 ** math.floor(math.log2(islands.HALF_MAX / HEADROOM / largest))

    def _add(self, traced: Traced, batch: int) -> None:
        check_norms(traced.name, traced.graph)
        self.precise |= any(_wants_precise_kernel(node) for node in traced.graph.graph.nodes)
        model = to_onnx(traced.graph, traced.args, traced.inputs, traced.outputs)
        self.bundle.graph(traced.name, batch, model)
        for kind, count in census.node_kinds(model).items():
            self.bundle.fact("info", "nodes", traced.name, batch, kind, count)
        self.bundle.fact("info", "operations", traced.name, batch, census.operations(traced.graph))
        self.bundle.fact("info", "moved", traced.name, batch, census.moved_bytes(traced.graph))
        self.bundle.fact("info", "peak", traced.name, batch, census.peak_bytes(traced.graph))

    def _check(self, traced: Traced, known: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs the lowered graph, compares, notes the error in the manifest; returns all its outputs."""
        got = run_lowered(to_onnx(traced.graph, traced.args, traced.inputs, traced.outputs), traced, known)
        for word, value in got.items():
            if not bool(value.isfinite().all()):
                raise CheckError(f"graph {traced.name}, output {word}: a value does not fit into a half")
        for word, value in want.items():
            error = float((got[word] - value).norm() / value.norm())
            cosine = float(nn.functional.cosine_similarity(got[word].flatten(), value.flatten(), 0))
            if not (error <= LARGEST_ERROR and cosine >= LEAST_COSINE):
                raise CheckError(
                    f"graph {traced.name}, output {word}: relative error {error:.2e} (allowed {LARGEST_ERROR}), "
                    f"cosine {cosine:.5f} (at least {LEAST_COSINE}) against float32"
                )
            self.bundle.fact("check", traced.name, "halves", float(f"{error:.3g}"), float(f"{cosine:.6f}"))
        return got


def _wants_precise_kernel(node: fx.Node) -> bool:
    """Whether it is an operator of ours on float32: in an island, or where a module casts by itself."""
    ours = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "rlsd"
    ours = ours and node.target != torch.ops.rlsd.sum_taps.default  # taps are in float32 wherever they are
    value = node.args[0].meta.get("val") if ours and node.args and isinstance(node.args[0], fx.Node) else None
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _pulled(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, the cotangent of x by autograd in float32, and the random cotangent of y used."""
    x = x.clone().requires_grad_(True)
    with plain_attention():
        y = module(x)
    cotangent = torch.randn(y.shape)
    (pulled,) = torch.autograd.grad(y, x, cotangent)
    return y.detach(), pulled, cotangent


def run_lowered(model: ir.Model, traced: Traced, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of the graph in float32, rounded to halves as on a GPU, from ONNX Runtime's CPU provider."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "cuda.onnx", Path(folder) / "cpu.onnx"
        ir.save(model, source, external_data="cuda.bin")
        lower(source, target)
        session = open_session(target, optimized=False)  # an optimizer may drop roundings
        kinds = {name: arg.dtype for name, arg in zip(traced.inputs, traced.args)}
        feed: dict[str, np.ndarray] = {}
        for node in session.get_inputs():
            value = known[node.name]
            feed[node.name] = (value.to(kinds[node.name]).float() if value.is_floating_point() else value).numpy()
        return {n: torch.from_numpy(y) for n, y in zip(traced.outputs, session.run(traced.outputs, feed))}
