"""What lies in a bundle for CUDA beside its verified files: tuning.txt and lines that are only shown."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
from bundle_factory import write_bundle
from corrupted_bundles import lines_of, seal
from device_case import NETS, PARAMS, fake_fixture  # noqa: F401
from hosted import hosted_bundle
from path_attacks import Canary, working_in
from tiny import make_job

from rlsd.engine import Engine, Params, RlsdError
from rlsd.pipeline import cli


def tuning_for(bundle: Path) -> bytes:
    digest = (bundle / "manifest.txt").read_text().split()[-1]
    return f"rlsd-tuning 1\ndevice Fake GPU\nbundle {digest}\nbatch 1 2.5\n".encode()


def unix_socket(path: Path) -> None:
    with working_in(path.parent), socket.socket(socket.AF_UNIX) as made:  # its path must be short
        made.bind(path.name)


@pytest.fixture(name="original", scope="module")
def original_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return hosted_bundle(write_bundle(folder / "cpu", NETS, 1), folder / "cuda")


@pytest.fixture(name="copy")
def copy_fixture(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def tuned(bundle: Path) -> bool:
    with Engine(bundle) as engine:
        engine.reconstruct([make_job(NETS, particles=1, params=Params(**{**PARAMS, "steps": 2}))])
        return "tuned" in engine.describe()


def test_tuning_is_not_read_through_links(fake, copy, tmp_path):
    canary = Canary(tmp_path / "outside/tuning.txt")
    target = canary.holds(tuning_for(copy))
    (copy / "tuning.txt").symlink_to(target)
    assert not tuned(copy)
    assert not canary.opened()
    (copy / "tuning.txt").unlink()
    (copy / "tuning.txt").write_bytes(tuning_for(copy))
    assert tuned(copy)  # it was the link that kept the engine from it


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        os.mkdir,
        unix_socket,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("/dev/tty"),
        lambda path: path.symlink_to(path),
        lambda path: path.write_bytes(b"rlsd-tuning 1\n" * 10000),
        lambda path: path.write_bytes(b"\0" * 1000),
    ],
    ids=["pipe", "folder", "socket", "endless", "terminal", "loop", "large", "zeros"],
)
def test_something_else_in_the_place_of_tuning(fake, copy, make: Callable[[Path], object]):
    """It is as if nothing were there: no waiting, no error."""
    make(copy / "tuning.txt")
    assert not tuned(copy)


@pytest.mark.parametrize("there", [True, False])
def test_tune_does_not_write_through_links(fake, copy, tmp_path, there):
    target = tmp_path / "outside.txt"
    if there:
        target.write_bytes(b"mine")
    (copy / "tuning.txt").symlink_to(target)
    assert cli.run(["tune", str(copy)]) == 0
    assert target.read_bytes() == b"mine" if there else not target.exists()
    assert not (copy / "tuning.txt").is_symlink() and tuned(copy)
    assert not list(copy.glob(".tuning-*"))


@pytest.mark.parametrize("size", ["many", "", "-", "0x10 bytes", "\x1b[2J"])
def test_kept_bytes_that_are_no_number(fake, copy, capsys, size):
    """The engine only shows them: none. Where memory is counted from them, it is one sentence."""
    seal(copy, [*lines_of(copy), f"info kept decoder 1 {size}", "info kept features 1 20", "info"])
    with Engine(copy) as engine:
        assert engine.bytes_per_particle == 20
    assert cli.run(["info", str(copy), "--plan"]) == 2
    said = capsys.readouterr().err
    assert "allowed is 'info kept GRAPH BATCH BYTES'" in said.replace("\n", " ") and "\x1b[2J" not in said


def test_kept_bytes_of_a_batch_that_cannot_be(fake, copy, capsys):
    seal(copy, [*lines_of(copy), "info kept context 0 20"])
    with Engine(copy) as engine:
        assert engine.bytes_per_particle == 0
    assert cli.run(["info", str(copy), "--plan"]) == 2
    assert "'info kept context 0 20'" in capsys.readouterr().err


def pinned_floats(driver, shape: tuple[int, ...]) -> np.ndarray:
    """Page-locked memory, which copies of the device reach after they were asked for."""
    place = ctypes.c_uint64()
    size = int(np.prod(shape))
    assert driver.library.cuMemHostAlloc(ctypes.byref(place), ctypes.c_size_t(4 * size), ctypes.c_size_t(0)) == 0
    values = np.ctypeslib.as_array((ctypes.c_float * size).from_address(place.value)).reshape(shape)
    values[:] = np.nan
    return values


def test_results_of_a_step_that_failed_do_not_come_later(fake, original):
    """A batch has queued its results when a kernel of the next cannot be launched: outputs are zero, and stay so."""
    jobs = [
        make_job(NETS, each, particles=1, params=Params(**{**PARAMS, "steps": 2}))
        for each in ("inpainting", "saturate")
    ]
    with Engine(original) as engine, fake.context():
        engine.reconstruct(jobs)
        fake.fail("cuLaunchKernel", fake.count("cuLaunchKernel"), 2)
        shapes = [(1, *engine.image_shape), (1, *engine.latent_shape)] * len(jobs)
        places = [pinned_floats(fake, shape) for shape in shapes]
        for job, out, latents in zip(jobs, places[::2], places[1::2]):
            engine.submit(job, out=out, out_latents=latents)
        with pytest.raises(RlsdError, match="cannot launch kernel"):
            engine.run()
        engine.reconstruct(jobs[:1])
        assert not any(place.any() for place in places)
        for place in places:
            fake.library.cuMemFreeHost(ctypes.c_uint64(place.ctypes.data))
