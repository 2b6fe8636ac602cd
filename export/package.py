"""Packages torch modules as a bundle. Nothing here is specific to Stable Diffusion.

Each pull-back is checked at export: run by ONNX Runtime and compared with torch's automatic differentiation of the
original module in float64. An export whose relative error exceeds the limit fails; the figures go in the manifest.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from rlsd.export import check
from rlsd.export.bundle import BundleWriter, check_name
from rlsd.export.onnx_graph import to_onnx
from rlsd.export.operator_graphs import OperatorGraphs, declare
from rlsd.export.pullback import split
from rlsd.export.tabulate import tabulate
from rlsd.export.trace import REWRITES, SAVINGS, all_but, to_aten

VERSION = "0.2.0"


@dataclass(frozen=True)
class Networks:
    """What a bundle is made of.

    denoiser(z_t [B, *latent], t int64 [B]) or (z_t, t, context [B, *context]) -> noise, like z_t.
    decoder(z [B, *latent]) -> image [B, *image] in [-1, 1]. encoder: the way back, optional.
    features(image) -> phi [B, D], optional. operators: name -> module(x, **parameters) -> y; a module with
    parameters has `parameters_of(image shape) -> {name: shape of one item's}`.
    alphas_cumprod: [T], the table abar. null_context: [*context]. class_head: [K, D + 1], a linear classifier on phi
    (weight, then bias) for the `classes`, so that the pipeline can say of which class an image is; optional.
    """

    denoiser: nn.Module
    decoder: nn.Module
    alphas_cumprod: Tensor
    latent: Sequence[int]
    image: Sequence[int]
    operators: Mapping[str, nn.Module]
    encoder: nn.Module | None = None
    features: nn.Module | None = None
    null_context: Tensor | None = None
    contexts: Mapping[str, Tensor] = field(default_factory=dict)
    steps_offset: int = 1
    info: Sequence[str] = ()
    class_head: Tensor | None = None
    classes: Sequence[str] = ()


def package(
    networks: Networks,
    path: Path | str,
    *,
    name: str,
    batches: Sequence[int] = (1,),
    precision: str = "fp32",
    without: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Exports `networks` to a new bundle for CPUs at `path` and returns it; rlsd.export.cuda has the one for GPUs.

    batches: every graph is made once for each of these numbers of samples; the engine chooses. precision "fp16"
    rounds the weights to halves (the CPU computes in float32 all the same). without: which of
    rlsd.export.trace.SAVINGS to leave out, to see what they bring; the results stay the same.
    Raises check.CheckError when a graph does not agree with its module, ValueError when the denoiser's noise
    is not like z_t.
    """
    if precision not in ("fp32", "fp16"):
        raise ValueError(f"precision {precision!r} is not allowed: fp32 or fp16")
    check_batches(batches)
    savings = all_but(SAVINGS, without)
    with (
        torch.random.fork_rng(devices=[]),
        BundleWriter(Path(path), name, f"rlsd {VERSION}", "cpu", precision, overwrite) as bundle,
    ):
        torch.manual_seed(0)  # the inputs of tracing and checking: equal exports give equal bundles
        write_facts(networks, bundle)
        tables: dict[str, Tensor] = {}
        for batch in sorted(batches):
            Packer(networks, bundle, batch, precision, savings, tables).pack()
    return Path(path)


def example_context(null: Tensor, batch: int) -> Tensor:
    """[batch, *context] to trace and check with: the null context, or random numbers where that says nothing: zeros."""
    shape = (batch, *null.shape)
    return null.float().expand(shape) if null.any() else torch.randn(shape)


def check_noise(eps: Tensor, z: Tensor) -> None:
    """Raises ValueError unless the denoiser's noise has the shape of its latents."""
    if eps.shape != z.shape:
        raise ValueError(f"the denoiser gives {list(eps.shape)} for latents {list(z.shape)}: the same is wanted")


def check_batches(batches: Sequence[int]) -> None:
    """Raises ValueError unless the batches are different numbers from 1 to 1024."""
    if not batches or len(set(batches)) != len(batches) or not all(1 <= batch <= 1024 for batch in batches):
        raise ValueError(f"batches {list(batches)} are not allowed: different numbers from 1 to 1024")


def write_facts(networks: Networks, bundle: BundleWriter) -> None:
    """All of the manifest that does not depend on the batch."""

    def array(key: str, file: str, values: Tensor) -> None:
        bundle.fact(key, file)
        bundle.array(file, values.detach().numpy())

    bundle.fact("latent", *networks.latent)
    bundle.fact("image", *networks.image)
    bundle.fact("timesteps", len(networks.alphas_cumprod))
    bundle.fact("steps_offset", networks.steps_offset)
    array("alphas_cumprod", "alphas_cumprod.f64", networks.alphas_cumprod.double())
    if networks.null_context is not None:
        bundle.fact("context", *networks.null_context.shape)
        array("null_context", "null_context.f32", networks.null_context.float())
    for label, context in networks.contexts.items():
        bundle.fact("named_context", label, f"context.{label}.f32")
        bundle.array(f"context.{label}.f32", context.detach().float().numpy())
    if networks.features is not None:
        with torch.no_grad():
            phi = copy.deepcopy(networks.features).float()(torch.zeros(1, *networks.image))
        bundle.fact("feature_dim", phi.shape[1])
    declare(networks.operators, networks.image, bundle)
    if networks.class_head is not None:
        write_class_head(networks.class_head, networks.classes, phi.shape[1] if networks.features else 0, bundle)
    for line in networks.info:
        bundle.fact("info", *line.split())


def write_class_head(head: Tensor, classes: Sequence[str], width: int, bundle: BundleWriter) -> None:
    """The classifier on the features as a file and the line `info class_head FILE CLASS...`; ValueError if unfit."""
    if len(classes) < 2 or len(set(classes)) != len(classes) or tuple(head.shape) != (len(classes), width + 1):
        raise ValueError(
            f"class_head is {list(head.shape)} for classes {list(classes)}; at least 2 different classes are wanted, "
            f"and for each a row of {width + 1} values: the weights of the features and a bias"
        )
    bundle.fact("info", "class_head", "class_head.f32", *(check_name("class", name) for name in classes))
    bundle.array("class_head.f32", head.detach().float().numpy())


class Packer(OperatorGraphs):
    """Exports and checks the graphs of one batch."""

    def __init__(
        self,
        networks: Networks,
        bundle: BundleWriter,
        batch: int,
        precision: str,
        savings: Sequence[str],
        tables: dict[str, Tensor],
    ):
        self.z = torch.randn(batch, *networks.latent)
        x = torch.rand(batch, *networks.image) * 2 - 1
        super().__init__(bundle, x, [name for name in savings if name in REWRITES])
        self.networks, self.precision, self.savings, self.tables = networks, precision, savings, tables

    def pack(self) -> None:
        """Adds every graph for this batch."""
        networks = self.networks
        inputs, names = [self.z, torch.arange(self.batch) % len(networks.alphas_cumprod)], ["z_t", "t"]
        if networks.null_context is not None:
            inputs.append(example_context(networks.null_context, self.batch))
            names.append("context")
        self._forward("denoiser", networks.denoiser, inputs, names, "eps")
        self._with_pull("decoder", networks.decoder, self.z, "z", "image")
        if networks.encoder is not None:
            self._forward("encoder", networks.encoder, [self.x], ["image"], "z")
        if networks.features is not None:
            self._with_pull("features", networks.features, self.x, "image", "phi")
        for name, operator in networks.operators.items():
            self.operator(name, operator)

    def _rounded(self, module: nn.Module) -> nn.Module:
        """A float32 copy of the module, its weights first rounded to halves if that is the precision asked for.

        Weights that this leaves as they are stay shared with the module.
        """
        found = (*module.parameters(), *module.buffers())
        return copy.deepcopy(module, {id(each): self._rounded_weight(each) for each in found})

    def _rounded_weight(self, weight: Tensor) -> Tensor:
        """Of parameters only: buffers are constants, such as an abar so near to 1 that a half would be 1."""
        value = weight.detach()
        learned = isinstance(weight, nn.Parameter)
        if value.is_floating_point():
            value = value.float()
            halved = value.half().float() if self.precision == "fp16" and learned else value
            value = value if torch.equal(halved, value) else halved
        return nn.Parameter(value, requires_grad=False) if learned else value

    def _forward(self, name: str, module: nn.Module, args: Sequence[Tensor], names: Sequence[str], output: str) -> None:
        module = self._rounded(module)
        graph = to_aten(module, args, self.rewrites)
        if "t" in names and "timesteps" in self.savings:
            tabulate(graph, names.index("t"), len(self.networks.alphas_cumprod), self.tables)
        model = to_onnx(graph, args, names, [output])
        want = check.float64(module)(*check.doubled(args))
        if output == "eps":
            check_noise(want, self.z)
        self._add(name, model, dict(zip(names, args)), {output: want})

    def _with_pull(self, name: str, module: nn.Module, x: Tensor, source: str, output: str) -> None:
        module = self._rounded(module)
        parts = split(to_aten(module, [x], self.rewrites), [x], [source])
        model = to_onnx(parts.forward, [x], [source], [output, *parts.kept])
        y, pulled, cotangent = check.pulled_in_float64(module, x)
        kept = self._add(name, model, {source: x}, {output: y})
        known = {source: x, **{n: torch.from_numpy(value) for n, value in kept.items()}}
        given = {"cotangent": cotangent, **{n: known[n] for n in parts.pull_inputs}}
        pull = to_onnx(parts.pull, list(given.values()), list(given), [f"{source}_cotangent"])
        self._add(f"{name}_pull", pull, given, {f"{source}_cotangent": pulled})
