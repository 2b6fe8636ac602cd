"""The fashion prior for samplers written in Python: every network with its pull-back, by ONNX Runtime.

Our own exporter makes the graphs, and each is compared with torch's automatic differentiation in float64 before it is
used. A graph does BATCH samples at a time on one thread; what does not fill it is padded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime

from rlsd.bench.quality.problem import Array, Pull
from rlsd.engine import library_path
from rlsd.models.fashion import CHECKPOINT

BATCH = 16
NETWORKS = ("denoiser", "decoder", "encoder")


def prepare(work: Path) -> Path:
    """The folder with the exported graphs, made in the work folder if it is not there; needs torch and diffusers."""
    path = work / f"prior-{BATCH}-{checkpoint_digest()}"
    if not (path / "manifest.txt").is_file():
        export(path)
    return path


def checkpoint_digest() -> str:
    """What the prior's weights are told apart by: 12 digits of a SHA-256."""
    digest = hashlib.sha256()
    for file in sorted(CHECKPOINT.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def export(path: Path) -> None:
    """Exports the three networks with their pull-backs and checks each against float64; CheckError if one is wrong."""
    import torch

    from rlsd.export.bundle import BundleWriter
    from rlsd.export.checkpoint import load

    networks, encoder = load(CHECKPOINT, None, None, None), fashion_encoder()
    assert networks.null_context is not None
    context = networks.null_context.float().expand(BATCH, *networks.null_context.shape)
    with BundleWriter(path, "fashion", "rlsd", "cpu", "fp32") as bundle, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        z, x = torch.randn(BATCH, *networks.latent), torch.rand(BATCH, *networks.image) * 2 - 1
        t = torch.arange(BATCH) * (len(networks.alphas_cumprod) // BATCH)
        bundle.array("alphas_cumprod.f64", networks.alphas_cumprod.double().numpy())
        bundle.array("context.f32", networks.null_context.float().numpy())
        _add(bundle, "denoiser", networks.denoiser, {"z_t": z, "t": t, "context": context})
        _add(bundle, "decoder", networks.decoder, {"z": z})
        _add(bundle, "encoder", encoder, {"image": x})


def fashion_encoder():  # type: ignore[no-untyped-def]
    """E(x): the mean of the VAE's posterior, in the scale of the denoiser's latents, as a torch module."""
    import torch
    from diffusers import AutoencoderKL

    class Encoder(torch.nn.Module):
        def __init__(self, vae: AutoencoderKL):
            super().__init__()
            self.encoder, self.quant_conv = vae.encoder, vae.quant_conv or torch.nn.Identity()
            self.scale, self.channels = vae.config.scaling_factor, vae.config.latent_channels

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.quant_conv(self.encoder(image))[:, : self.channels] * self.scale

    return Encoder(AutoencoderKL.from_pretrained(CHECKPOINT / "vae", use_safetensors=True)).float().eval()


def _add(bundle, name: str, module, inputs: dict) -> None:  # type: ignore[no-untyped-def]
    """Adds NAME and NAME_pull, in the first of the inputs."""
    from rlsd.export import check
    from rlsd.export.onnx_graph import to_onnx
    from rlsd.export.pullback import split
    from rlsd.export.tabulate import tabulate
    from rlsd.export.trace import to_aten

    args, names = list(inputs.values()), list(inputs)
    y, pulled, cotangent = check.pulled_in_float64(module, *args)
    graph = to_aten(module, args)
    if "t" in names:
        tabulate(graph, names.index("t"), 1000, {})
    parts = split(graph, args, names)
    path = bundle.graph(name, BATCH, to_onnx(parts.forward, args, names, ["y", *parts.kept]))
    got = check.run(path, inputs)
    forward = check.compare(name, got, {"y": y})
    given = {"cotangent": cotangent, **{n: inputs.get(n, got.get(n)) for n in parts.pull_inputs}}
    import torch

    tensors = [v if isinstance(v, torch.Tensor) else torch.from_numpy(v) for v in given.values()]
    path = bundle.graph(f"{name}_pull", BATCH, to_onnx(parts.pull, tensors, list(given), ["pulled"]))
    back = check.compare(f"{name}_pull", check.run(path, given), {"pulled": pulled})
    bundle.fact("check", name, float(f"{forward:.3g}"), float(f"{back:.3g}"))


class Network:
    """One network with its pull-back in the first input."""

    def __init__(self, folder: Path, name: str):
        self.forward = _session(folder / f"{name}.b{BATCH}.onnx")
        self.pull = _session(folder / f"{name}_pull.b{BATCH}.onnx")
        self.inputs = [node.name for node in self.forward.get_inputs()]
        self.outputs = [node.name for node in self.forward.get_outputs()]
        self.wanted = [node.name for node in self.pull.get_inputs()]

    def __call__(self, *args: Array, keep: bool) -> tuple[Array, Pull]:
        """y of samples [n, ...], and what takes a cotangent of y to one of the first argument, if it is kept."""
        names, count = self.outputs if keep else self.outputs[:1], len(args[0])
        parts = []
        for first in range(0, count, BATCH):
            feed = {n: _padded(value[first : first + BATCH]) for n, value in zip(self.inputs, args)}
            parts.append((feed, dict(zip(names, self.forward.run(names, feed)))))
        y = np.concatenate([got["y"] for _, got in parts])[:count]

        def pull(cotangent: Array) -> Array:
            pulled = []
            for i, (feed, got) in enumerate(parts):
                given = {**feed, **got, "cotangent": _padded(cotangent[i * BATCH : (i + 1) * BATCH])}
                pulled.append(self.pull.run(["pulled"], {n: given[n] for n in self.wanted})[0])
            return np.concatenate(pulled)[:count]

        return y, pull


@dataclass
class FashionPrior:
    """The networks of an exported folder; what they did is counted in samples."""

    folder: Path
    abar: Array = field(init=False)
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.abar = np.fromfile(self.folder / "alphas_cumprod.f64", np.float64)
        self.context = np.fromfile(self.folder / "context.f32", np.float32).reshape(1, 1, -1)
        self.networks = {name: Network(self.folder, name) for name in NETWORKS}

    def eps(self, z_t: Array, t: int, keep: bool = True) -> tuple[Array, Pull]:
        """The noise in z_t [n, C, h, w] at timestep t, and its pull-back."""
        context = np.broadcast_to(self.context, (len(z_t), *self.context.shape[1:]))
        return self._run("denoiser", keep, z_t, np.full(len(z_t), t, np.int64), context)

    def decode(self, z: Array, keep: bool = True) -> tuple[Array, Pull]:
        """D(z) [n, 1, H, W], and its pull-back."""
        return self._run("decoder", keep, z)

    def encode(self, x: Array, keep: bool = True) -> tuple[Array, Pull]:
        """E(x) [n, C, h, w], and its pull-back."""
        return self._run("encoder", keep, x)

    def _run(self, name: str, keep: bool, *args: Array) -> tuple[Array, Pull]:
        y, pull = self.networks[name](*args, keep=keep)
        self._count(name, len(y))

        def counted(cotangent: Array) -> Array:
            self._count(f"{name}_pull", len(y))
            return pull(cotangent)

        return y, counted

    def _count(self, name: str, samples: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + samples


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.register_custom_ops_library(str(library_path()))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _padded(value: Array) -> Array:
    """[BATCH, ...]: the last sample again where there are fewer."""
    value = np.ascontiguousarray(value if value.dtype == np.int64 else value.astype(np.float32, copy=False))
    missing = BATCH - len(value)
    return value if missing == 0 else np.concatenate([value, np.repeat(value[-1:], missing, 0)])
