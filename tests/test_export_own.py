"""A user's own forward operator: the documented example as it stands there, and what is wrong with others."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import checkpoints  # noqa: E402
import onnx_ir as ir  # noqa: E402

from rlsd.engine import Engine, Job, Params  # noqa: E402
from rlsd.export import CheckError, export_checkpoint  # noqa: E402
from rlsd.export.bundle import BundleWriter  # noqa: E402
from rlsd.export.check import run  # noqa: E402
from rlsd.export.checkpoint import choose  # noqa: E402
from rlsd.export.onnx_graph import to_onnx  # noqa: E402
from rlsd.export.operator_graphs import DataLoss, LossAndGradient, OperatorGraphs  # noqa: E402
from rlsd.export.own import load_own  # noqa: E402
from rlsd.export.package import Packer  # noqa: E402
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

class Normed(nn.Module):
    def forward(self, x): return x / x.abs().max()

class Centred(nn.Module):
    def forward(self, x): return x - x.mean(0)

class Noisy(nn.Module):
    def forward(self, x): return x + torch.randn_like(x)

class Negative(nn.Module):
    def forward(self, x): return x.log()

class Precise(nn.Module):
    def forward(self, x): return x.double()

class Single(nn.Module):
    def forward(self, x): return nn.functional.conv2d(x, torch.ones(1, 1, 3, 3))
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
        ("Normed", CheckError, "samples must not mix"),
        ("Centred", CheckError, "samples must not mix"),
        ("Noisy", CheckError, "nothing may be drawn at random"),
        ("Negative", CheckError, "not finite"),
        ("Precise", CheckError, "gives torch.float64 for images in float32"),
        ("Single", ValueError, r"line 48\); it is also run in float64: make constants with dtype=x.dtype"),
        ("not-a-name", ValueError, "FILE.py:NAME"),
    ],
)
def test_what_is_wrong_with_an_operator_is_said(tmp_path: Path, word: str, error: type, text: str) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(WRONG)
    with pytest.raises(error, match=text):
        load_own(f"{file}:{word}", (1, 8, 8))


def test_what_is_alike_in_all_large_images_is_seen_to_mix(tmp_path: Path) -> None:
    """The largest of 200 000 values drawn between -1 and 1 is 1 but for 1e-5: the second image has another range."""
    file = tmp_path / "wrong.py"
    file.write_text(WRONG)
    with pytest.raises(CheckError, match="samples must not mix"):
        load_own(f"{file}:Normed", (3, 256, 256))


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


RIGHT = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn
import beside

@dataclass
class Settings:
    gain: float = beside.GAIN

class Gain(nn.Module):
    def forward(self, x): return x * Settings().gain

class Blur(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel, self.inner = torch.ones(1, 1, 3, 3) / 9, nn.Module()
        self.inner.shift = torch.ones(1)
    def forward(self, x): return nn.functional.conv2d(x, self.kernel) + self.inner.shift
"""


def test_a_file_like_any_other(tmp_path: Path) -> None:
    """Dataclasses, an import from beside it, modules that take no argument, tensors that are plain attributes."""
    (tmp_path / "beside.py").write_text("GAIN = 2.0")
    (tmp_path / "right.py").write_text(RIGHT)
    x = torch.rand(1, 1, 8, 8)
    assert torch.equal(load_own(f"{tmp_path}/right.py:Gain", (1, 8, 8))[1](x), 2 * x)
    _, blur = load_own(f"{tmp_path}/right.py:Blur", (1, 8, 8))
    assert {name for name, _ in blur.named_buffers()} == {"kernel", "inner.shift"}
    assert str(tmp_path) not in sys.path


NEIGHBOURS = """
import torch
from torch import nn
from beside import GAIN

class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        from later import SHIFT
        self.gain, self.shift = torch.full((1,), GAIN), SHIFT
    def forward(self, x): return self.gain * x + self.shift
"""


def test_neighbours_of_two_files_may_have_one_name(tmp_path: Path) -> None:
    x = torch.rand(1, 1, 8, 8)
    for gain in (2.0, 3.0):
        folder = tmp_path / str(gain)
        folder.mkdir()
        for name, text in (("own", NEIGHBOURS), ("beside", f"GAIN = {gain}"), ("later", f"SHIFT = {gain}")):
            (folder / f"{name}.py").write_text(text)
        assert torch.equal(load_own(f"{folder}/own.py:Gain", (1, 8, 8))[1](x), gain * x + gain)
    assert not {"beside", "later"} & sys.modules.keys()


UNEXPORTABLE = """
import torch
from torch import nn

class Double(nn.Module):
    def forward(self, x):
        return nn.functional.conv2d(x.double(), torch.ones(1, 1, 3, 3, dtype=torch.float64)).to(x.dtype)

class Warped(nn.Module):
    def forward(self, x):
        grid = nn.functional.affine_grid(torch.eye(2, 3, dtype=x.dtype).expand(len(x), 2, 3), list(x.shape))
        return nn.functional.grid_sample(x, grid)

class Branching(nn.Module):
    def forward(self, x): return x if x[0].mean() > 9 else -x

class Hidden(nn.Module):
    gain = None
    def __init__(self):
        super().__init__()
        self.gain = torch.ones(1)
    def forward(self, x): return self.gain * x

kernel = torch.ones(1)

class Global(nn.Module):
    def forward(self, x): return x * kernel
"""


@pytest.mark.parametrize(
    "word, why",
    [
        ("Warped", "operator 'warped' cannot be exported: torch's grid_sampler_2d_backward has no form in ONNX"),
        ("Branching", "operator 'branching' cannot be exported: it decides by the values of an image"),
        ("Hidden", "cannot be exported: it uses a tensor in mul that is no buffer of its module"),
        ("Double", "cannot be exported: ONNX Runtime has no Conv for numbers of this type; compute in x's own"),
        ("Global", "cannot be exported: it uses a tensor in mul that is no buffer of its module"),
    ],
)
def test_what_cannot_be_a_graph_is_said_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, word: str, why: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "own.py").write_text(UNEXPORTABLE)
    photo = str(FASHION / "test_images" / "0001-pullover.png")
    own = ["--operator", f"{tmp_path}/own.py:{word}"]
    assert cli.run(["reconstruct", "-m", "fashion", *own, "-i", photo, "-o", str(tmp_path / "out")]) == cli.UNUSABLE
    said = capsys.readouterr().err
    assert why in " ".join(said.split()) and len(said) < 400


def test_the_export_of_a_checkpoint_says_it_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_forward", "_with_pull"):  # the networks' graphs
        monkeypatch.setattr(Packer, name, lambda *_: None)
    (tmp_path / "own.py").write_text(UNEXPORTABLE)
    command = ["export", "--checkpoint", str(FASHION / "checkpoint"), "--out", str(tmp_path / "bundle")]
    assert cli.run([*command, "--batch", "2", "--operators", f"{tmp_path}/own.py:Warped"]) == cli.UNUSABLE
    said = capsys.readouterr().err
    assert "torch's grid_sampler_2d_backward has no form in ONNX" in " ".join(said.split()) and len(said) < 400
    assert not (tmp_path / "bundle").exists()


NAMES = """
from torch import nn

class Blur(nn.Module):
    def forward(self, x): return x / 2

class LossParameter(nn.Module):
    def parameters_of(self, image): return {"loss": (1,)}
    def forward(self, x, loss): return x * loss[:, :, None, None]
"""


def test_names_are_checked_before_anything_is_exported(tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(NAMES + f"\nclass {'Long' * 21}(Blur): pass\n")
    image = (1, 8, 8)
    assert list(choose({}, [f"{tmp_path}/a.py:Blur"], image)) == ["blur"]
    for words, why in (
        (["a.py:Blur", "b.py:Blur"], "b.py:Blur' would be called blur, as one before it"),
        (["a.py:LossParameter"], "parameter 'loss' of operator 'loss_parameter' is not allowed"),
        (["a.py:" + "Long" * 21], "is longer than the 80 characters"),
    ):
        with pytest.raises(ValueError, match=why):
            choose({}, [f"{tmp_path}/{word}" for word in words], image)
    with pytest.raises(ValueError, match=r"a\.py:Blur' would be called blur, as one of ours"):
        choose({"blur": torch.nn.Identity()}, [f"{tmp_path}/a.py:Blur"], image)


class Sensor(torch.nn.Module):
    """Twelve bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 1) * 2047.5


@pytest.mark.parametrize("operator", [Sensor(), torch.nn.Identity()])
def test_large_measurements_are_checked_with_large_residuals(tmp_path: Path, operator: torch.nn.Module) -> None:
    torch.manual_seed(0)
    with BundleWriter(tmp_path / "bundle", "sensor", "rlsd tests", "cpu", "fp32") as writer:
        OperatorGraphs(writer, torch.rand(2, 1, 16, 16) * 2 - 1, []).operator("sensor", operator)
    lines = [line.split() for line in (tmp_path / "bundle" / "manifest.txt").read_text().splitlines()]
    errors = {line[1]: float(line[3]) for line in lines if line[0] == "check"}
    assert errors.keys() == {"operator.sensor.forward", "operator.sensor.loss"} and max(errors.values()) < 1e-5


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
