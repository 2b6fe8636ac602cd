"""A user's own forward operator: the documented example as it stands there, and what is wrong with others."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import checkpoints  # noqa: E402
import onnx_ir as ir  # noqa: E402

from rlsd.engine import Engine, Job, Params  # noqa: E402
from rlsd.export import CheckError, export_checkpoint  # noqa: E402
from rlsd.export.check import run  # noqa: E402
from rlsd.export.onnx_graph import to_onnx  # noqa: E402
from rlsd.export.operator_graphs import DataLoss, LossAndGradient  # noqa: E402
from rlsd.export.own import load_own  # noqa: E402
from rlsd.export.pullback import split  # noqa: E402
from rlsd.export.trace import to_aten  # noqa: E402
from rlsd.models.fashion import PATH as FASHION  # noqa: E402
from rlsd.pipeline import cli  # noqa: E402

PAGE = Path(__file__).parent.parent / "docs" / "own-operators.md"


def example(folder: Path) -> Path:
    """The file that the page shows."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert code is not None
    (folder / "camera.py").write_text(code[1])
    return folder / "camera.py"


def test_the_documented_operator_runs_in_the_engine(tmp_path: Path) -> None:
    file = example(tmp_path)
    checkpoint = checkpoints.stable_diffusion(tmp_path / "sd", text=False)
    bundle = export_checkpoint(
        checkpoint, tmp_path / "bundle", size="32", batches=[2], operators=["hdr", f"{file}:Vignette"]
    )
    x = np.random.default_rng(0).uniform(-1, 1, (1, 3, 32, 32)).astype(np.float32)
    with Engine(bundle) as engine:
        assert set(engine.operators) == {"hdr", "vignette"}
        assert engine.operators["vignette"].params == {"strength": (1,)}
        strengths = [np.array([value], np.float32) for value in (0.0, 2.0)]
        _, operator = load_own(f"{file}:Vignette", (3, 32, 32))
        jobs = []
        for strength in strengths:
            y = engine.measure("vignette", x, strength=strength)[0]
            want = operator(torch.from_numpy(x), torch.from_numpy(strength)[None])[0]
            assert np.allclose(y, want, atol=1e-6)
            jobs.append(Job(y, "vignette", {"strength": strength}, particles=2, params=Params(steps=3)))
        first, second = (result.particles for result in engine.reconstruct(jobs))  # in one batch
    assert np.isfinite(first).all() and not np.array_equal(first, second)


WRONG = """
import torch
from torch import nn

class Square(nn.Module):
    linear = True
    def __init__(self, image): super().__init__()
    def forward(self, x): return x * x

class Blind(nn.Module):
    def __init__(self, image): super().__init__()
    def forward(self, x): return x.detach()

class Flat(nn.Module):
    def __init__(self, image): super().__init__()
    def forward(self, x): return x.mean()

class Empty(nn.Module):
    def __init__(self, image): super().__init__()
    def forward(self, x): return x[..., :0]

class Reshaped(nn.Module):
    def __init__(self, image): super().__init__()
    def forward(self, x): return x.reshape(3, 7)

class Unnamed(nn.Module):
    def __init__(self, image): self.size = undefined

number = lambda image: 3
mirror = nn.Identity()
"""


@pytest.mark.parametrize(
    "word, error, text",
    [
        ("Square", CheckError, "says it is linear"),
        ("Blind", CheckError, "no gradient"),
        ("Flat", CheckError, r"must give a real tensor \[B, ...\]"),
        ("Empty", CheckError, r"measures nothing: torch.float64 \[2, 1, 8, 0\]"),
        ("Reshaped", ValueError, r"RuntimeError: shape .* \(wrong.py, line 24\)"),
        ("Unnamed", ValueError, r"NameError: name 'undefined' is not defined \(wrong.py, line 27\)"),
        ("number", ValueError, "is a int, not a torch.nn.Module"),
        ("Missing", ValueError, "defines no Missing"),
        ("not-a-name", ValueError, "FILE.py:NAME"),
    ],
)
def test_what_is_wrong_with_an_operator_is_said(tmp_path: Path, word: str, error: type, text: str) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(WRONG)
    with pytest.raises(error, match=text):
        load_own(f"{file}:{word}", (1, 8, 8))


@pytest.mark.parametrize(
    "code, text", [("def", r"SyntaxError: .*line 1"), ("\nimport nowhere", "No module named 'nowhere'")]
)
def test_a_file_that_cannot_be_read_is_the_users(tmp_path: Path, capsys, code: str, text: str) -> None:
    (tmp_path / "wrong.py").write_text(code)
    photo = str(FASHION / "test_images" / "0001-pullover.png")
    command = [
        "reconstruct",
        "-m",
        "fashion",
        "--operator",
        f"{tmp_path}/wrong.py:X",
        "-i",
        photo,
        "-o",
        str(tmp_path / "o"),
    ]
    assert cli.run(command) == 2
    assert re.search(text, " ".join(capsys.readouterr().err.split()))


def test_a_module_that_is_ready_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(WRONG)
    name, operator = load_own(f"{file}:mirror", (1, 8, 8))
    assert name == "mirror" and isinstance(operator, torch.nn.Identity)
    with pytest.raises(ValueError, match="with a file that is there"):
        load_own(f"{tmp_path}/none.py:mirror", (1, 8, 8))


class Coarse(torch.nn.Module):
    """Four levels a unit, with the straight-through gradient as the page says."""

    rounds = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + ((4 * x).round() / 4 - x).detach()


def test_a_detached_rounding_keeps_its_gradient(tmp_path: Path) -> None:
    loss = DataLoss(Coarse())
    x, y = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    parts = split(to_aten(loss, [x, y]), [x, y], ["x", "y"])
    _, gradient = LossAndGradient(parts, ["x", "y"])(x, y)
    torch.testing.assert_close(gradient, ((4 * x).round() / 4 - y) / 64)
    model = to_onnx(to_aten(Coarse(), [x]), [x], ["x"], ["y"])
    ir.save(model, tmp_path / "coarse.onnx")
    assert np.array_equal(run(tmp_path / "coarse.onnx", {"x": x})["y"], ((4 * x).round() / 4).numpy())


def test_ones_own_operator_without_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's first command as it stands there, but for the number of steps."""
    example(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copy(FASHION / "test_images" / "0001-pullover.png", "photo.png")
    np.save("strength.npy", np.array([0.5], np.float32))
    command = re.search(r"^    rlsd (reconstruct .*--operator .*)$", PAGE.read_text(), re.M)
    assert command is not None
    assert cli.run([*command[1].split(), "--steps", "3", "-n", "2"]) == 0
    with np.load("now/photo/arrays.npz") as arrays:
        assert arrays["y"].shape == (1, 32, 32) and arrays["param.strength"].tolist() == [0.5]
        assert np.isfinite(arrays["particles"]).all()
