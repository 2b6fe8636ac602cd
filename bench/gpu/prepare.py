"""Checkpoints and bundles for the benchmark, made once and kept under build/gpu.

    python -m rlsd.bench.gpu.prepare fashion sd15 sd21-base

sd15 and sd21-base are Stable Diffusion's architectures at full size with random weights and DINO's (ViT-S/16), whose
class token has the paper's 384 features; fashion is the shipped prior. Needs no GPU but to learn its architecture.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from rlsd.bench.gpu import LeftOut
from rlsd.bench.gpu.agreement import OPERATORS
from rlsd.export.checkpoint import load
from rlsd.models.fashion import PATH as FASHION

KEPT = Path(__file__).resolve().parents[2] / "build" / "gpu"
NETWORKS = ("fashion", "sd15", "sd21-base")
BATCHES = (1, 2, 4, 8)
EXPORT_BYTES = 12 << 30  # of memory for one: 6.6 GB were seen (docs/cuda-export.md)
SIZE = {"sd15": (512, 512), "sd21-base": (512, 512)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", choices=NETWORKS)
    names = parser.parse_args().networks
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what is begun ends, too, and is cleared away
    if len(names) > 1 and roomy(len(names)):
        sys.exit(0 if side_by_side([start([name]) for name in names]) else 1)
    for name in names:
        checkpoint_of(name)
        bundle_of(name)


def side_by_side(makers: list[subprocess.Popen]) -> bool:
    """Whether all of them ended well; waits for all, since what is exported counts though another one fails."""
    try:
        return not any([maker.wait() for maker in makers])
    finally:  # a signal, with some unfinished
        for maker in makers:
            maker.terminate()


def roomy(exports: int) -> bool:
    """Whether so many exports fit side by side, and leave processors to what is timed meanwhile."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (os.cpu_count() or 1) >= 4 * exports and memory >= exports * EXPORT_BYTES


def start(names: list[str]) -> subprocess.Popen:
    """Makes what is missing in another process; a second one waits for the first, and then finds it made."""
    # Tracing is work for one processor; a team of threads for each small tensor takes it from the others.
    few = {"OMP_NUM_THREADS": "2"} | os.environ
    return subprocess.Popen([sys.executable, "-m", "rlsd.bench.gpu.prepare", *names], env=few)


def wait(name: str, maker: subprocess.Popen, seconds: float) -> None:
    """Until the bundle is there. RuntimeError when its maker ended without one, LeftOut after so many seconds."""
    end = time.monotonic() + seconds
    while not bundle_path(name).is_dir():
        if maker.poll() is not None and not bundle_path(name).is_dir():
            raise RuntimeError(f"the export of {name} failed with status {maker.returncode}")
        if time.monotonic() > end:
            raise LeftOut(f"the export of {name} was not done in time; the next run finds it done")
        time.sleep(0.5)


def checkpoint_path(name: str) -> Path:
    """Where the checkpoint lies or will lie."""
    return FASHION / "checkpoint" if name == "fashion" else KEPT / name


def bundle_path(name: str) -> Path:
    """Where the bundle lies or will lie: one for each architecture of GPUs."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return KEPT / f"{name}.sm{10 * major + minor}"


def checkpoint_of(name: str) -> Path:
    """The checkpoint, written first where it is missing."""
    path = checkpoint_path(name)
    with Alone(name):
        if not path.is_dir():
            from transformers import ViTConfig, ViTModel

            from rlsd.export.random_checkpoint import drawn, write

            half_done = path.with_suffix(".part")
            shutil.rmtree(half_done, ignore_errors=True)
            half_done.mkdir(parents=True)
            write(name, half_done)
            small = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
            features = drawn(lambda: ViTModel(small, add_pooling_layer=False), np.random.PCG64(1))
            features.save_pretrained(half_done / "features")
            half_done.rename(path)
    return path


def bundle_of(name: str) -> Path:
    """The bundle for this machine's GPU, exported first where it is missing."""
    from rlsd.export.cuda import package_cuda

    path = bundle_path(name)
    with Alone(name):
        if not path.is_dir():
            architecture = int(path.suffix.removeprefix(".sm"))
            operators = OPERATORS if name == "fashion" else ("inpainting",)
            networks = load(checkpoint_path(name), SIZE.get(name), list(operators), None)
            package_cuda(networks, path, name=name, architectures=[architecture], batches=BATCHES)
    return path


def compile_seconds(name: str, particles: int, given: float | None = None) -> float:
    """What torch.compile's max-autotune may take here, `given` if the user says, less with its cache. Guesses: with
    Stable Diffusion 1.5, N = 8, it was not done after 6 minutes on 16 processors and an H100."""
    usual = 60 if _note(name, particles).is_file() else 600
    return usual if given is None else given


def keep_compiled() -> None:
    """From now on torch.compile keeps under build/gpu, as it goes, what it made and timed: of use to the next run, even
    where this one is ended first. To be called after PyTorch is imported, which may name a folder of its own."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(KEPT / "inductor")


def note_compiled(name: str, particles: int) -> None:
    """From now on torch.compile finds its work in its cache."""
    KEPT.mkdir(parents=True, exist_ok=True)
    _note(name, particles).touch()


def _note(name: str, particles: int) -> Path:
    return bundle_path(name).with_suffix(f".{particles}.compiled")


class Alone:
    """Only one process at a time makes the files of a name."""

    def __init__(self, name: str):
        KEPT.mkdir(parents=True, exist_ok=True)
        self.file = open(KEPT / f"{name}.lock", "w")  # noqa: SIM115 (closed on exit)

    def __enter__(self) -> None:
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *error: object) -> None:
        self.file.close()


if __name__ == "__main__":
    main()
