"""The command line on the shipped prior with the real engine, in its own process where that matters."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tifffile
from PIL import Image
from rich.console import Console

from rlsd.engine import Engine
from rlsd.models.fashion import PATH
from rlsd.pipeline import cli
from rlsd.pipeline.items import Plan, Source
from rlsd.pipeline.run import run_plans
from rlsd.pipeline.settings import settings_for
from rlsd.pipeline.tasks import TASKS

pytestmark = pytest.mark.skipif(
    not (PATH / "bundle" / "manifest.txt").is_file(), reason="models/fashion/bundle is not there: `make bundle`"
)
GRAY = {name: task for name, task in TASKS.items() if task.channels != 3}
IMAGE = PATH / "test_images" / "0001-pullover.png"


def reconstruct(out, *words, task="half", source=IMAGE, steps=8, particles=3) -> int:
    options = ["-m", "fashion", "-t", task, "-i", source, "-o", out, "--steps", steps, "-n", particles, *words]
    return cli.run(["reconstruct", *map(str, options)])


def arrays(folder) -> dict:
    with np.load(folder / "arrays.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """One reconstruction that several tests look at."""
    out = tmp_path_factory.mktemp("half") / "out"
    assert reconstruct(out, "--threads", "1") == 0
    return out


def test_every_task_runs(tmp_path):
    with Engine(PATH / "bundle") as engine:
        plans = [
            Plan(task, settings_for(task, "fashion", {"steps": 3, "particles": 2}), [Source(IMAGE, 0, name)])
            for name, task in GRAY.items()
        ]
        finished = run_plans(engine, plans, tmp_path / "out", overwrite=False, console=Console(quiet=True))
    assert len(finished.report["items"]) == len(GRAY) and not finished.report["failed"]
    for name in GRAY:
        found = arrays(tmp_path / "out" / name)
        assert found["particles"].shape == (2, 1, 32, 32) and np.isfinite(found["particles"]).all()


def test_a_chain_is_added_to_the_bundle_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert reconstruct(tmp_path / "a", task="sr4+quantise", steps=3) == 0
    (extended,) = (tmp_path / "cache" / "rlsd" / "bundles").iterdir()
    made = (extended / "manifest.txt").stat().st_mtime_ns
    assert reconstruct(tmp_path / "b", task="sr4+quantise", steps=3) == 0
    assert (extended / "manifest.txt").stat().st_mtime_ns == made
    found = arrays(tmp_path / "a" / IMAGE.stem)
    assert found["y"].shape == (1, 8, 8) and found["param.second_levels"].tolist() == [4]
    assert found["particles"].tobytes() == arrays(tmp_path / "b" / IMAGE.stem)["particles"].tobytes()


OWN = """
import torch

class Halved(torch.nn.Module):
    linear = True
    def __init__(self, image): super().__init__()
    def forward(self, x): return x[..., ::2, :] / 2
"""


def test_an_operator_of_ones_own_needs_no_export(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "own.py").write_text(OWN)
    options = ["-m", "fashion", "-i", IMAGE, "-o", tmp_path / "out", "--steps", 3, "-n", 2]
    assert cli.run(["reconstruct", "--operator", f"{tmp_path}/own.py:Halved", *map(str, options)]) == 0
    assert arrays(tmp_path / "out" / IMAGE.stem)["y"].shape == (1, 16, 32)
    for words, said in (
        (["--operator", f"{tmp_path}/own.py:Missing"], "defines no Missing"),
        (["--operator", "nothing.py:Halved"], "with a file that is there"),
        (["--operator", f"{tmp_path}/own.py:Halved", "-t", "half"], "either --task or --operator"),
        (["-t", "sr8+jpeg"], "not known for images 1 x 4 x 4"),
        (["-t", "colour"], "is for images of 3 channels"),
        (["-t", "sr4+nothing"], "or two of them as sr4+jpeg"),
    ):
        assert cli.run(["reconstruct", *words, *map(str, options), "--overwrite"]) == 2
        assert said in capsys.readouterr().err


def test_report(half):
    report = json.loads((half / "report.json").read_text())
    (item,) = report["items"]
    assert 0 < item["psnr"]["mean"] < 60 and len(item["ssim"]["particles"]) == 3
    assert -1 <= item["feature_similarity"] <= 1
    assert report["time"]["particle_steps"] == 3 * 7 and report["time"]["threads"] == 1
    assert all(report["time"]["thread_seconds"][phase] > 0 for phase in ("denoiser", "decoder", "decoder_pull"))


def test_threads_and_company_change_no_byte(half, tmp_path):
    others = [PATH / "test_images" / name for name in ("0002-trouser.png", "0030-bag.png")]
    assert reconstruct(tmp_path / "out", "-i", *others, "--threads", "2") == 0
    assert (
        arrays(tmp_path / "out" / IMAGE.stem)["particles"].tobytes() == arrays(half / IMAGE.stem)["particles"].tobytes()
    )


def test_a_measurement_from_files_gives_the_same_as_its_simulation(half, tmp_path):
    simulated = arrays(half / IMAGE.stem)
    np.save(tmp_path / "y.npy", simulated["y"])
    np.save(tmp_path / "mask.npy", simulated["param.mask"])
    assert reconstruct(tmp_path / "out", "--measured", "--mask", tmp_path / "mask.npy", source=tmp_path / "y.npy") == 0
    assert arrays(tmp_path / "out" / "y")["particles"].tobytes() == simulated["particles"].tobytes()


def test_every_format_gives_the_same(half, tmp_path):
    pixels = np.asarray(Image.open(IMAGE))
    tifffile.imwrite(tmp_path / "a.tif", pixels.astype(np.uint16) * 257, photometric="minisblack")
    np.save(tmp_path / "b.npy", (pixels / 127.5 - 1).astype(np.float32))
    for name in ("a.tif", "b.npy"):
        assert reconstruct(tmp_path / name[0], source=tmp_path / name) == 0
        found = arrays(tmp_path / name[0] / name[0])["particles"]
        np.testing.assert_allclose(found, arrays(half / IMAGE.stem)["particles"], atol=1e-4)


def test_a_damaged_bundle_is_refused(tmp_path, capsys):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for file in (PATH / "bundle").iterdir():
        (bundle / file.name).write_bytes(file.read_bytes())
    data = bytearray((bundle / "weights.bin").read_bytes())
    data[1000] ^= 1
    (bundle / "weights.bin").write_bytes(data)
    assert cli.run(["info", str(bundle)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rlsd: ") and "weights.bin" in error and error.count("\n") == 1


def test_info_and_tasks(capsys):
    assert cli.run(["info", "fashion"]) == 0
    assert cli.run(["tasks", "-m", "fashion"]) == 0
    assert "ankle-boot" in capsys.readouterr().out
    with Engine(PATH / "bundle") as engine:
        assert {task.operator for task in GRAY.values()} <= set(engine.operators)


def test_demo(tmp_path, capsys):
    assert cli.run(["demo", "--out", str(tmp_path / "out"), "--steps", "3", "--particles", "2"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["items"]) == 9 and len(report["tasks"]) == 3
    for item in report["items"]:
        assert (tmp_path / "out" / item["name"] / "grid.png").is_file()
    assert (tmp_path / "out" / "overview.png").is_file()
    assert str(tmp_path / "out" / "report.html") in capsys.readouterr().out.replace("\n", "")


def command(*words) -> list[str]:
    """`rlsd WORDS`, whose exit code is 3 if torch was imported on the way."""
    code = (
        "from rlsd.pipeline.cli import run; code = run(sys.argv[1:]); sys.exit(3 if 'torch' in sys.modules else code)"
    )
    return [sys.executable, "-c", f"import sys; {code}", *map(str, words)]


def test_torch_is_not_imported(tmp_path):
    words = ("reconstruct", "-m", "fashion", "-t", "sr4", "-i", IMAGE, "-o", tmp_path / "out", "--steps", 3, "-n", 1)
    assert subprocess.run(command(*words), capture_output=True).returncode == 0


def heed_interrupts():
    """A job in the background of a shell, as the tests may be, inherits that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_control_c_stops_at_once_and_leaves_nothing(tmp_path):
    words = (
        "reconstruct",
        "-m",
        "fashion",
        "-t",
        "half",
        "-i",
        IMAGE,
        "-o",
        tmp_path / "out",
        "--steps",
        999,
        "-n",
        64,
    )
    process = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.strip() == "rlsd: interrupted"
    assert time.monotonic() - start < 20
    assert not (tmp_path / "out").exists()
