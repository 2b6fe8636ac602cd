"""The embedded prior: its checkpoint loads through the real libraries, and its training resumes to the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlsd.models import fashion

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from rlsd.models.fashion import data, recipe, train, train_prior
from rlsd.models.fashion.classifier import Classifier
from rlsd.models.fashion.evaluate import frechet, histogram_entropy, psnr
from rlsd.models.fashion.loop import Recipe, batch_indices
from rlsd.models.fashion.networks import Prior, build_vae

CHECKPOINT = fashion.CHECKPOINT


def shipped_images() -> tuple[torch.Tensor, torch.Tensor]:
    """The test images as uint8 [N, 1, 28, 28] with the labels that their names state."""
    paths = sorted((fashion.PATH / "test_images").glob("*.png"))
    labels = [fashion.CLASS_NAMES.index(path.stem.split("-", 1)[1]) for path in paths]
    images = [torch.tensor(list(Image.open(path).tobytes()), dtype=torch.uint8).view(1, 28, 28) for path in paths]
    return torch.stack(images), torch.tensor(labels)


def test_package_imports_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import rlsd.models.fashion as f; assert f.PATH.is_dir()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_checkpoint_is_small_half_precision_and_safe() -> None:
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in CHECKPOINT.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}, path


@torch.no_grad()
def test_networks_load_and_fit_together() -> None:
    vae = AutoencoderKL.from_pretrained(CHECKPOINT / "vae", torch_dtype=torch.float32).eval()
    unet = UNet2DConditionModel.from_pretrained(CHECKPOINT / "unet", torch_dtype=torch.float32).eval()
    schedule = DDIMScheduler.from_pretrained(CHECKPOINT / "scheduler")
    table = load_file(CHECKPOINT / "context" / "context.safetensors")["context"].float()
    described = json.loads((CHECKPOINT / "context" / "config.json").read_text())
    assert described["names"] == [*fashion.CLASS_NAMES, "null"] and described["null"] == 10
    assert table.shape == (11, 1, 64)
    images, _ = shipped_images()
    x = data.to_model(images)
    z = vae.encode(x).latent_dist.mean
    shown = vae.decode(z).sample
    assert z.shape == (12, 4, 8, 8) and shown.shape == x.shape
    assert psnr(x, shown.clamp(-1, 1)).mean() > 22
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    t = torch.full((12,), 500)
    a = schedule.alphas_cumprod[500]
    noisy = a.sqrt() * z * vae.config.scaling_factor + (1 - a).sqrt() * noise
    eps = unet(noisy, t, table[10].expand(12, 1, 64)).sample
    # A predictor that has learnt nothing errs by the noise's own variance, 1.
    assert (eps - noise).square().mean() < 0.5


def test_classifier_knows_the_shipped_images() -> None:
    model = fashion.load_classifier()
    images, labels = shipped_images()
    assert len(images) == 12 and set(labels.tolist()) == set(range(10))
    x = data.to_model(images).requires_grad_(True)
    assert not model.training and model.features(x).shape == (12, 128)
    assert (model(x).argmax(1) == labels).double().mean() >= 0.75
    model.features(x).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().amax() > 0


@pytest.mark.parametrize("shape", [(1, 1, 31, 33), (3, 1, 28, 28), (2, 1, 8, 8)])
@pytest.mark.parametrize("value", [0.0, -1.0, 50.0])
def test_classifier_takes_odd_inputs(shape: tuple[int, ...], value: float) -> None:
    x = torch.full(shape, value, requires_grad=True)
    features = Classifier().features(x)
    features.sum().backward()
    assert features.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("phase", ["vae", "vae-decoder", "classifier", "unet", "unet-finish", "unet-guided"])
def test_resumed_training_gives_the_same_bits(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipe.BATCH, phase, 4)
    g = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (12, 1, 28, 28), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, 10, (12,), generator=g)
    short = Recipe(steps=4, lr=1e-3, warmup=1, save_seconds=1e9)

    def run(work: Path, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        work.mkdir(exist_ok=True)
        if phase == "vae":
            train.train_vae(images, work, short, stop_at)
        elif phase == "classifier":
            train.train_classifier(phase, images, labels, work, short, stop_at)
        else:
            torch.manual_seed(6)
            made = {"vae": build_vae(), "classifier-mild": Classifier(), "unet": Prior()}
            made["unet-finish"] = Prior()
            for name, model in {**made, "vae-decoder": made["vae"]}.items():
                if name != phase:
                    torch.save({"ema": model.state_dict()}, work / f"{name}.pt")
            if phase == "vae-decoder":
                train.train_decoder(images, work, short, stop_at)
            else:
                train.train_unet(phase, images, labels, work, short, stop_at)
        state = torch.load(work / f"{phase}.pt", weights_only=True)
        return {f"{part}.{k}": v for part in ("model", "ema") for k, v in state[part].items()}

    straight = run(tmp_path / "straight")
    run(tmp_path / "broken", stop_at=2)
    resumed = run(tmp_path / "broken")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)


def test_autoguidance_adds_the_difference_to_a_worse_network(tmp_path: Path) -> None:
    networks = {}
    for seed, name in enumerate(("unet", "unet-finish")):
        torch.manual_seed(seed)
        networks[name] = Prior().eval()
        torch.save({"ema": networks[name].state_dict()}, tmp_path / f"{name}.pt")
    guided = train_prior.autoguidance(train_prior.STAGES["unet-guided"], tmp_path)
    assert guided is not None and train_prior.autoguidance(train_prior.STAGES["unet-finish"], tmp_path) is None
    z, t, context = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([10, 3])
    with torch.no_grad():
        good, worse = (networks[name](z, t, context) for name in ("unet-finish", "unet"))
    want = good + (train_prior.GUIDANCE - 1) * (good - worse)
    assert (guided(z, t, context) - want).norm() < 0.02 * want.norm()  # computed in bf16
    assert (good - want).norm() > 0.1 * want.norm()


def test_an_epoch_visits_every_item_once() -> None:
    seen = torch.cat([batch_indices(7, step, 4, 12) for step in range(3)])
    assert sorted(seen.tolist()) == list(range(12))
    assert not torch.equal(batch_indices(7, 0, 4, 12), batch_indices(7, 3, 4, 12))


def test_rate_warms_up_and_ends_near_zero() -> None:
    long = Recipe(steps=1000, lr=1.0, warmup=100)
    assert long.rate(0) == pytest.approx(0.01) and long.rate(99) == 1.0
    assert long.rate(999) < 1e-4
    cut = replace(long, steps=600, horizon=1000, cooldown=200)
    assert all(cut.rate(step) == long.rate(step) for step in range(401))
    assert cut.rate(500) == pytest.approx(0.5 * long.rate(500)) and cut.rate(599) < 0.01


def test_missing_data_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        data.load(tmp_path, "train")


def test_figures() -> None:
    import numpy as np

    a = np.random.default_rng(3).normal(size=(4000, 5))
    assert frechet(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet(a, a + 2.0) == pytest.approx(20.0)
    assert frechet(a, 3.0 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(4 * np.trace(np.cov(a, rowvar=False)))
    assert histogram_entropy(torch.eye(10)) == ([1] * 10, pytest.approx(1.0))
    assert psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.2)).item() == pytest.approx(20.0, abs=1e-4)
