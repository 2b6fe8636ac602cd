"""A stand-in for rlsd.engine.Engine with the same interface and no networks: the pipeline's tests need no bundle."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from rlsd.engine import Job, OperatorInfo, Result, RlsdError, Status, normal
from rlsd.engine.files import read_regular

MANIFEST = "rlsd-bundle 1\nname fake\n"


def make_bundle(folder: Path) -> Path:
    """A folder that looks like a bundle from the outside."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.txt").write_text(MANIFEST)
    return folder


class FakeHandle:
    def __init__(self, job: Job, engine: FakeEngine):
        self.job, self.engine, self.step, self.error = job, engine, 0, None

    def info(self) -> SimpleNamespace:
        done = self.error is not None or self.step >= self.job.params.steps - 1
        return SimpleNamespace(state=3 if done else 2)

    def release(self) -> None:
        self.engine.handles = [handle for handle in self.engine.handles if handle is not self]

    def result(self) -> Result:
        if self.error is not None:
            raise self.error
        job, shape = self.job, self.engine.image_shape
        numbers = [normal(job.seed, job.item, i, 7, int(np.prod(shape))).reshape(shape) for i in range(job.particles)]
        trace = np.full((job.params.steps - 1, job.particles, 3), 0.5, np.float32) if job.trace else None
        return Result(np.tanh(np.stack(numbers)), np.zeros((job.particles, 2, 4, 4), np.float32), 0.5, trace)


class FakeEngine:
    """Particles are noise. broken: items that become non-finite. on_tick: called at the start of each tick."""

    def __init__(
        self, bundle, *, device=None, threads=0, log=None, padding=(2, 2, 2, 2), channels=1, broken=(), on_tick=None
    ):
        self.path, self.name = Path(bundle), "fake"
        self.image_shape, self.latent_shape = (channels, 32, 32), (2, 4, 4)
        self.context_shape, self.contexts, self.timesteps, self.feature_dim = (1, 4), ["cat", "dog"], 1000, 6
        self.bytes_per_particle, self.on_gpu = 1 << 20, False
        self.padding, self.broken, self.on_tick = padding, set(broken), on_tick
        self.handles, self.steps, self.cancelled, self.closed, self.jobs = [], 0, False, False, []
        c = channels
        self.operators = {
            "inpainting": OperatorInfo((c, 32, 32), {"mask": (1, 32, 32)}),
            "superres4": OperatorInfo((c, 8, 8), {}),
            "motion_blur": OperatorInfo((c, 32, 32), {"kernel": (9, 9)}),
            "phase_retrieval": OperatorInfo((c, 48, 48), {}),
            "sum": OperatorInfo((5,), {}),
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def describe(self):
        facts = {"precision": ["fp32"], "threads": ["2"], "file": ["denoiser.onnx 10 ab"]}
        if any(self.padding):
            facts["info"] = ["image_padding " + " ".join(map(str, self.padding))]
        facts |= {"graph": ["denoiser 1 denoiser.onnx"], "check": ["denoiser 1 2e-07"], "onnxruntime": ["1.32.0"]}
        return facts

    def file(self, name):
        try:
            return read_regular(self.path / name, 1 << 20)
        except OSError as error:
            raise RlsdError(Status.BAD_BUNDLE, f"bundle file {name}: cannot be read: {error.strerror}") from error

    def context(self, name):
        return np.full(self.context_shape, self.contexts.index(name), np.float32)

    def measure(self, operator, x, **params):
        if operator == "inpainting":
            return x * params["mask"]
        if operator == "superres4":
            return x.reshape(len(x), -1, 8, 4, 8, 4).mean((3, 5))
        if operator == "phase_retrieval":
            padded = np.pad((x + 1) / 2, ((0, 0), (0, 0), (8, 8), (8, 8)))
            return np.abs(np.fft.fftshift(np.fft.fft2(padded, norm="ortho"), axes=(2, 3))).astype(np.float32)
        return x.mean((1, 2, 3))[:, None].repeat(5, 1) if operator == "sum" else x

    def features(self, images):
        return images.reshape(len(images), -1)[:, :6].astype(np.float32)

    def submit(self, job):
        if job.params.steps > self.timesteps:
            raise RlsdError(Status.INVALID_ARGUMENT, f"steps is {job.params.steps}, allowed is 2 to {self.timesteps}")
        handle = FakeHandle(job, self)
        self.handles.append(handle)
        self.jobs.append(job)
        return handle

    def tick(self):
        if self.on_tick:
            self.on_tick(self)
        failed = None
        for handle in self.handles:
            handle.step += 1
            self.steps += handle.job.particles
            if handle.job.item in self.broken:
                failed = handle.error = RlsdError(
                    Status.NON_FINITE, f"item {handle.job.item} became NaN at step 1 of 9"
                )
        self.handles = [handle for handle in self.handles if handle.info().state != 3]
        if failed:
            raise failed
        time.sleep(0)
        return len(self.handles)

    def cancel(self):
        self.cancelled = True

    def stats(self):
        names = ("denoiser", "decoder", "decoder_pull", "features", "operators", "repulsion", "elementwise", "idle")
        return dict.fromkeys(names, 0.25) | {"particle_steps": self.steps, "wall": 2.0}
