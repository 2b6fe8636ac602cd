"""A bundle with more operators: what it had stays as it was, what is new reconstructs, a broken one is refused."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
from bundle_factory import write_bundle  # noqa: E402
from device_case import NETS, PARAMS, TOLERANCE, difference, fake_fixture  # noqa: E402, F401
from hosted import hosted_bundle  # noqa: E402
from tiny import make_job, reference  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from rlsd.engine import Engine, Params  # noqa: E402
from rlsd.export import bundle as files  # noqa: E402
from rlsd.export.extend import extend  # noqa: E402


class Tanh(nn.Module):
    """The bundle's own `saturate`, from torch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.from_numpy(NETS.weights["A"]))

    def parameters_of(self, image: object) -> dict[str, tuple[int, ...]]:
        return {"gain": (1,)}

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return torch.tanh(gain * (x.flatten(1) @ self.matrix))


class Wide(nn.Module):
    """An operator with more weights than the networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.randn(16, 4000, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix


class Network(nn.Module):
    """An operator with what our kernels do in networks: a GroupNorm, a convolution of a doubled image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = (
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.Conv2d(16, 1, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.interpolate(functional.silu(self.norm(self.first(x))), scale_factor=2.0))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle", NETS, 2)


def enlarge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the tiny networks' weights large beside the operators', as those of real ones are."""
    monkeypatch.setattr(files, "BESIDE", 4)


def test_what_was_there_stays_and_the_new_operator_reconstructs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enlarge(monkeypatch)
    old = write_bundle(tmp_path / "old", NETS, 1, 4)
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    new = extend(old, tmp_path / "new", {"tanh": Tanh()})
    for name, content in before.items():
        assert (old / name).read_bytes() == content
        assert name == "manifest.txt" or (new / name).read_bytes() == content
    assert (new / "weights.bin").samefile(old / "weights.bin")
    lines = (new / "manifest.txt").read_text().splitlines()
    assert set((old / "manifest.txt").read_text().splitlines()[:-1]) < set(lines)
    checks = [line.split() for line in lines if line.startswith("check operator.tanh.")]
    assert {(words[1], words[2]) for words in checks} == {
        (f"operator.tanh.{kind}", batch) for kind in ("loss", "forward") for batch in ("1", "4")
    }
    assert all(0 < float(words[3]) < 1e-5 for words in checks)

    job = make_job(NETS, "saturate", particles=3, params=Params(**PARAMS))
    with Engine(old) as engine:
        (want,) = engine.reconstruct([job])
    with Engine(new) as engine:
        assert engine.operators["tanh"] == engine.operators["saturate"]
        same, other = engine.reconstruct([job, replace(job, operator="tanh")])
    assert same.particles.tobytes() == want.particles.tobytes()
    assert difference(other.particles, reference(NETS, job)) < 1e-4


def test_large_operators_make_the_weights_grow_in_a_copy(old: Path, tmp_path: Path) -> None:
    digest = files.sha256(old / "weights.bin")
    first = extend(old, tmp_path / "first", {"wide": Wide()})
    second = extend(first, tmp_path / "second", {"wider": Wide()})
    assert files.sha256(old / "weights.bin") == digest
    assert not (first / "weights.bin").samefile(old / "weights.bin")
    sizes = [(bundle / "weights.bin").stat().st_size for bundle in (old, first, second)]
    assert sizes[0] < sizes[1] < sizes[2] < 2.5 * sizes[1]  # each matrix once, whatever the graphs and batches
    assert (first / "operator.wide.forward.b2.onnx").stat().st_size < 2000
    x = np.random.default_rng(0).uniform(-1, 1, (2, 1, 4, 4)).astype(np.float32)
    want = Wide()(torch.from_numpy(x)).numpy()
    with Engine(second) as engine:
        for name in ("wide", "wider"):
            assert np.allclose(engine.measure(name, x), want, atol=1e-5)
        assert engine.operators.keys() == {"inpainting", "saturate", "wide", "wider"}


def test_a_file_system_without_links_gets_a_copy(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, path: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    enlarge(monkeypatch)
    monkeypatch.setattr(files.os, "link", refuse)
    new = extend(old, tmp_path / "new", {"tanh": Tanh()})
    assert not (new / "weights.bin").samefile(old / "weights.bin")
    assert (new / "weights.bin").read_bytes() == (old / "weights.bin").read_bytes()
    Engine(new).close()


def test_in_place(old: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(old, tmp_path / "bundle")
    with pytest.raises(FileExistsError, match="exists already"):
        extend(bundle, bundle, {"tanh": Tanh()})
    assert extend(bundle, bundle, {"tanh": Tanh()}, overwrite=True) == bundle
    with Engine(bundle) as engine:
        assert "tanh" in engine.operators


def test_a_bundle_for_cuda(tmp_path: Path, fake: object) -> None:
    source = hosted_bundle(write_bundle(tmp_path / "cpu", NETS, 2), tmp_path / "cuda")
    new = extend(source, tmp_path / "new", {"tanh": Tanh()})
    job = make_job(NETS, "saturate", particles=2, params=Params(**{**PARAMS, "steps": 3}))
    with Engine(source) as engine:
        (want,) = engine.reconstruct([job])
    with Engine(new) as engine:
        same, other = engine.reconstruct([job, replace(job, operator="tanh")])
    assert same.particles.tobytes() == want.particles.tobytes()
    assert difference(other.particles, reference(NETS, job)) < TOLERANCE


def test_an_operator_that_is_a_network_runs_on_a_gpu_as_on_a_cpu(tmp_path: Path, fake: object) -> None:
    plain = write_bundle(tmp_path / "plain", NETS, 2)
    job = make_job(NETS, "saturate", particles=2, params=Params(**{**PARAMS, "steps": 3}))
    job = replace(job, operator="network", operator_params={}, y=np.zeros((1, 8, 8), np.float32))
    found = []
    for base in (plain, hosted_bundle(plain, tmp_path / "cuda")):
        with Engine(extend(base, tmp_path / f"{base.name}-more", {"network": Network()})) as engine:
            found += engine.reconstruct([job])
    assert difference(found[1].particles, found[0].particles) < TOLERANCE


def sealed(bundle: Path, old: str, new: str) -> None:
    """Changes the manifest and seals it again."""
    body = (bundle / "manifest.txt").read_text().rpartition("end ")[0].replace(old, new)
    (bundle / "manifest.txt").write_text(f"{body}end {hashlib.sha256(body.encode()).hexdigest()}\n")


class Named(nn.Module):
    def parameters_of(self, image: object) -> dict[str, tuple[int, ...]]:
        return {"loss": (1,)}

    def forward(self, x: Tensor, loss: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    "operators, text",
    [
        ({"saturate": Tanh()}, r"'saturate' is in .* already \(inpainting, saturate\)"),
        ({"my operator": Tanh()}, "'my operator' is not allowed"),
        ({"a" * 81: Tanh()}, "longer than the 80"),
        ({"named": Named()}, "parameter 'loss' of operator 'named' is not allowed"),
        ({}, "no operators"),
    ],
)
def test_names_that_are_not_allowed(old: Path, tmp_path: Path, operators: dict[str, nn.Module], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        extend(old, tmp_path / "new", operators)
    assert not list(tmp_path.iterdir())


def test_a_bundle_that_is_not_whole(old: Path, tmp_path: Path) -> None:
    def broken(text: str) -> None:
        with pytest.raises(ValueError, match=text):
            extend(bundle, tmp_path / "new", {"tanh": Tanh()})
        assert [file.name for file in tmp_path.iterdir()] == ["bundle"]

    bundle = tmp_path / "bundle"
    bundle.mkdir()
    broken("is no bundle")
    bundle.rmdir()
    shutil.copytree(old, bundle)
    raw = bytearray((bundle / "weights.bin").read_bytes())
    raw[5] ^= 1
    (bundle / "weights.bin").write_bytes(raw)
    broken("weights.bin is missing or was altered")
    (bundle / "weights.bin").unlink()
    (bundle / "weights.bin").symlink_to(old / "weights.bin")
    broken("weights.bin is missing or was altered")
    shutil.rmtree(bundle)
    shutil.copytree(old, bundle)
    sealed(bundle, "rlsd-bundle 1", "rlsd-bundle 2")
    broken("format 'rlsd-bundle 2' is not known")
    (bundle / "manifest.txt").write_text((old / "manifest.txt").read_text().replace("name tiny", "name tiny2"))
    broken("its SHA-256 differs")
