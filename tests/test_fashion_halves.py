"""A whole reconstruction in halves: the graphs of a bundle for CUDA, lowered to a CPU, under the reference loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from rlsd.engine import Params
from rlsd.engine.reference import rlsd
from rlsd.export import checkpoint, cuda
from rlsd.export.check import open_session
from rlsd.export.lower import lower
from rlsd.models.fashion import PATH

N, STEPS = 4, 50
PARAMS = Params(steps=STEPS, rho=0.1, lr_x=0.1, lr_z=0.05, gamma=5.0)  # the fashion prior's own, fewer steps
M, P = 256, 1024


class Measured:
    """The left half of an image, without noise: half the mean squared residual of its pixels."""

    def __init__(self, image: np.ndarray):
        self.mask = np.zeros((32, 32))
        self.mask[:, :16] = 1
        self.mask, self.y = self.mask.ravel(), image * self.mask.ravel()

    def data_gradient(self, x: np.ndarray) -> np.ndarray:
        return self.mask * (self.mask * x - self.y) / P


class Exact(Measured):
    """The networks in float32, by torch."""

    def __init__(self, networks: checkpoint.Networks, image: np.ndarray):
        super().__init__(image)
        self.net, self.context = networks, networks.null_context.expand(N, 1, 64)

    def denoise(self, z_t: np.ndarray, t: int) -> np.ndarray:
        with torch.no_grad():
            return self.net.denoiser(latents(z_t), torch.full((N,), t), self.context).numpy().reshape(N, M)

    def decode(self, z: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.net.decoder(latents(z)).numpy().reshape(N, P)

    def decode_pull(self, z: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        source = latents(z).requires_grad_()
        image = self.net.decoder(source)
        (pulled,) = torch.autograd.grad(image, source, torch.from_numpy(cotangent).float().reshape(N, 1, 32, 32))
        return pulled.numpy().reshape(N, M)


class Halves(Measured):
    """The bundle's graphs: rounded to halves wherever a GPU would store one."""

    def __init__(self, bundle: Path, folder: Path, image: np.ndarray):
        super().__init__(image)
        self.sessions = {
            name: session(bundle, folder, name) for name in ("context", "denoiser", "decoder", "decoder_pull")
        }
        context = np.fromfile(bundle / "null_context.f32", np.float32).reshape(1, 1, 64).repeat(N, 0)
        self.context = self.run("context", {"context": context})
        lines = [line.split() for line in (bundle / "manifest.txt").read_text().splitlines()]
        self.scale = next(float(line[2]) for line in lines if line[:2] == ["cotangent_scale", "decoder"])

    def run(self, name: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = self.sessions[name]
        feed = {node.name: given[node.name] for node in session.get_inputs()}
        names = [node.name for node in session.get_outputs()]
        return dict(zip(names, session.run(names, feed)))

    def denoise(self, z_t: np.ndarray, t: int) -> np.ndarray:
        given = {"z_t": halves(z_t, 4, 8, 8), "t": np.full(N, t), **self.context}
        return self.run("denoiser", given)["eps"].reshape(N, M)

    def decode(self, z: np.ndarray) -> np.ndarray:
        self.seen = self.run("decoder", {"z": halves(z, 4, 8, 8)})
        return self.seen["image"].reshape(N, P)

    def decode_pull(self, z: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        given = {**self.seen, "z": halves(z, 4, 8, 8), "cotangent": halves(cotangent * P * self.scale, 1, 32, 32)}
        return self.run("decoder_pull", given)["z_cotangent"].reshape(N, M) / (P * self.scale)


def latents(z: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(z).float().reshape(N, 4, 8, 8)


def halves(values: np.ndarray, *shape: int) -> np.ndarray:
    return values.reshape(N, *shape).astype(np.float16).astype(np.float32)


def session(bundle: Path, folder: Path, name: str) -> onnxruntime.InferenceSession:
    lower(bundle / f"{name}.b{N}.onnx", folder / f"{name}.onnx")
    return open_session(folder / f"{name}.onnx", optimized=False)


def psnr(x: np.ndarray, image: np.ndarray) -> float:
    return float(10 * np.log10(4 / np.mean((x.clip(-1, 1) - image) ** 2)))


@pytest.mark.parametrize("name", ["0002-trouser", "0013-dress"])
def test_halves_reconstruct_as_well_as_float32(name: str, tmp_path: Path) -> None:
    pixels = np.asarray(Image.open(PATH / "test_images" / f"{name}.png"), float) / 127.5 - 1
    image = np.pad(pixels, 2, constant_values=-1).ravel()
    networks = checkpoint.load(PATH / "checkpoint", None, ["inpainting"], None)
    abar = networks.alphas_cumprod.double().numpy()
    run = lambda net: rlsd(net, abar, M, P, N, PARAMS, 7, 0, 1, "latent")  # noqa: E731
    want = run(Exact(networks, image))
    bundle = cuda.package_cuda(networks, tmp_path / "bundle", name="fashion", architectures=[], batches=[N])
    graphs = [line.split() for line in (bundle / "manifest.txt").read_text().splitlines() if " nodes " in line]
    assert not any(line[4] in ("rlsd.GroupNorm", "rlsd.GroupNormPull", "Conv", "ConvTranspose") for line in graphs)
    got = run(Halves(bundle, tmp_path, image))
    assert not np.array_equal(got, want)  # the halves must show somewhere
    assert abs(psnr(got.mean(0), image) - psnr(want.mean(0), image)) <= 0.1
    each = [np.mean([psnr(x, image) for x in particles]) for particles in (got, want)]
    assert abs(each[0] - each[1]) <= 0.1
