"""docs/embedding.md: every command on it, as it stands there, and that what its programs write is the engine's own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlsd.engine import Engine, Job, Params, find_onnxruntime

ROOT = Path(__file__).parent.parent
BUNDLE = ROOT / "models" / "fashion" / "bundle"
SECTIONS = {
    part.partition("\n")[0]: re.findall(r"```sh\n(.*?)```", part, re.S)
    for part in (ROOT / "docs" / "embedding.md").read_text().split("\n## ")
}
INSTALL, RUNTIME = SECTIONS["Install"]
OPENCV = subprocess.run(["pkg-config", "--exists", "opencv4"]).returncode == 0 if shutil.which("pkg-config") else False
needs_opencv = pytest.mark.skipif(
    not OPENCV, reason="OpenCV is not installed (Debian: apt-get install --no-install-recommends libopencv-dev)"
)
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "CMAKE_BUILD_TYPE": "None",  # no optimisation: that is most of the time, and the networks are ONNX Runtime's
    "OMP_NUM_THREADS": "1",
}


def run(*scripts: str, folder: Path) -> str:
    """What bash prints when it runs the scripts one after the other; it stops at the first command that fails."""
    command = ["bash", "-e", "-o", "pipefail", "-c", "\n".join(scripts)]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def failed(program: Path, words: str, message: str) -> None:
    """Runs a program that must say this and fail."""
    environment = ENVIRONMENT | {"RLSD_ONNXRUNTIME": str(find_onnxruntime())}
    done = subprocess.run([program, *words.split()], env=environment, capture_output=True, text=True)
    assert done.returncode in (1, 2) and message in done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's folder as after a clone, with the library built and installed as the page says."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("CMakeLists.txt", "engine", "examples", "models"):
        (folder / name).symlink_to(ROOT / name)
    run(INSTALL, folder=folder)
    return folder


def grey(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), np.float32)


def as_grey(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] as programs write them."""
    return np.clip(127.5 * (images + 1), 0, 255)


def reconstructions(y: np.ndarray, mask: np.ndarray, particles: int, steps: int, item: int = 0) -> np.ndarray:
    """What the engine makes of the same measurement, called from here: [N, 32, 32] in [-1, 1]."""
    params = Params(steps=steps, rho=0.1, gamma=5, lr_x=0.1, lr_z=0.05)
    job = Job(y[None], "inpainting", {"mask": mask[None]}, particles=particles, item=item, params=params)
    with Engine(BUNDLE, threads=1) as engine:
        (result,) = engine.reconstruct([job])
    return result.particles[:, 0]


def test_installed_folder_may_be_moved(checkout: Path) -> None:
    moved = checkout / "moved"
    shutil.copytree(checkout / "build" / "prefix", moved, symlinks=True)
    flags = run(f"PKG_CONFIG_PATH={moved}/lib/pkgconfig pkg-config --cflags --libs rlsd", folder=checkout).split()
    include, library = (Path(flag[2:]).resolve() for flag in flags[:2])
    assert include == moved / "include" and library == moved / "lib"
    assert (include / "rlsd.h").read_text() == (ROOT / "engine" / "include" / "rlsd.h").read_text()


@pytest.fixture(scope="module")
def build(checkout: Path) -> Path:
    """The folder of what the section on C builds and writes."""
    run(RUNTIME, *SECTIONS["C"], folder=checkout)
    return checkout / "build"


def test_c(build: Path) -> None:
    mask = (grey(ROOT / "examples/data/right-half.pgm") > 127).astype(np.float32)
    y = (grey(ROOT / "examples/data/bag.pgm") * np.float32(2 / 255) - 1) * mask
    np.testing.assert_allclose(grey(build / "bag-measured.pgm"), as_grey(y), atol=0.51)
    wanted = reconstructions(y, mask, 4, 60)
    found = np.stack([grey(build / f"bag-{i}.pgm") for i in range(4)])
    np.testing.assert_allclose(found, as_grey(wanted), atol=2)
    np.testing.assert_allclose(grey(build / "bag-mean.pgm"), as_grey(wanted.mean(0)), atol=2)
    apart = np.abs(found[0] - found[1])
    assert apart[:, :16].mean() > 5 * apart[:, 16:].mean()  # they differ in the half that was not seen
    assert grey(build / "again-0.pgm").shape == (32, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "usage"),
        ("/nowhere IMAGE OUT", "/nowhere"),
        ("BUNDLE /nowhere OUT --op superres4", "/nowhere: No such file"),
        ("BUNDLE BUNDLE/manifest.txt OUT --op superres4", "is not a binary PGM"),
        ("BUNDLE IMAGE OUT --op superres4 --input measured", "is 32 x 32; it has to be 8 x 8"),
        ("BUNDLE IMAGE OUT --op phase_retrieval --input measured --mask IMAGE", "phase_retrieval measures is 48 x 48"),
        ("BUNDLE IMAGE OUT", "needs input 'mask'"),
        ("BUNDLE IMAGE OUT --op zoom", "operator zoom"),
        ("BUNDLE IMAGE OUT --op superres4 --particles 0", "particles is 0"),
        ("BUNDLE IMAGE OUT --op superres4 --steps 2.5", "--steps is 2.5"),
        ("BUNDLE IMAGE /nowhere/out --op superres4 --steps 2 --particles 1", "/nowhere/out-0.pgm: No such file"),
    ],
)
def test_c_says_what_is_wrong(build: Path, tmp_path: Path, words: str, message: str) -> None:
    for name, path in {"BUNDLE": BUNDLE, "IMAGE": ROOT / "examples/data/bag.pgm", "OUT": tmp_path / "out"}.items():
        words = words.replace(name, str(path))
    failed(build / "c" / "rlsd_pgm", words, message)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def stream(checkout: Path) -> str:
    """What the program of the section on C++ prints; it is built there."""
    return run(RUNTIME, *SECTIONS["C++ and OpenCV"], folder=checkout)


@needs_opencv
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "usage"),
        ("BUNDLE FRAMES OUT 0 0 14 29", "the hidden part does not lie in 28 x 28 pixels"),
        ("BUNDLE FRAMES OUT 0 0 14 28 --particles 0", "--particles is 0"),
        ("BUNDLE /nowhere/%02d.png OUT 0 0 14 28", "cannot open the stream /nowhere"),
        ("/nowhere FRAMES OUT 0 0 14 28", "manifest.txt"),
        ("BUNDLE FRAMES /nowhere 0 0 14 28 --steps 2 --particles 1", "/nowhere/0000.png"),
    ],
)
def test_cpp_says_what_is_wrong(stream: str, checkout: Path, tmp_path: Path, words: str, message: str) -> None:
    build = checkout / "build"
    for name, path in {"BUNDLE": BUNDLE, "FRAMES": build / "frames" / "%02d.png", "OUT": tmp_path}.items():
        words = words.replace(name, str(path))
    failed(build / "cpp" / "rlsd_stream", words, message)
    assert not list(tmp_path.iterdir())


@needs_opencv
def test_cpp(stream: str, checkout: Path) -> None:
    assert "4 frames, at most 4 at once" in stream
    frames = sorted((checkout / "build" / "frames").iterdir())
    written = sorted((checkout / "build" / "reconstructed").iterdir())
    assert [path.name for path in written] == [f"{i:04d}.png" for i in range(len(frames))]
    mask = np.ones((32, 32), np.float32)
    mask[2:30, 2:16] = 0
    for frame, strip in zip(frames, written):
        np.testing.assert_array_equal(grey(strip)[:, 14:28], grey(frame)[:, 14:])
    y = (np.pad(grey(frames[3]), 2) * np.float32(1 / 127.5) - 1) * mask
    wanted = reconstructions(y, mask, 2, 60, item=3)[:, 2:30, 2:30]
    seen, mean, *found = np.split(grey(written[3]), 4, axis=1)
    np.testing.assert_allclose(seen, as_grey(y)[2:30, 2:30], atol=0.51)
    np.testing.assert_allclose(found, as_grey(wanted), atol=2)
    np.testing.assert_allclose(mean, as_grey(wanted.mean(0)), atol=2)


def test_python(checkout: Path) -> None:
    printed = run(RUNTIME, *SECTIONS["Python, without the pipeline"], folder=checkout)
    assert len(re.findall(r"^item \d: 2 reconstructions in [\d.]+ s$", printed, re.M)) == 3
    garments = np.load(ROOT / "examples/data/garments.npy").astype(np.float32) / 127.5 - 1
    with np.load(checkout / "build" / "garments.npz") as found:
        assert found["particles"].shape == (3, 2, 1, 32, 32) and found["y"].shape == (3, 1, 8, 8)
        blocks = garments.reshape(3, 1, 8, 4, 8, 4).mean((3, 5))
        noise = found["y"] - blocks
        assert 0.015 < noise.std() < 0.025
        errors = [
            np.sqrt(np.mean((each - garments) ** 2)) for each in (found["mean"], blocks.repeat(4, 2).repeat(4, 3))
        ]
        assert errors[0] < errors[1]  # better than the measurement's own pixels, enlarged
