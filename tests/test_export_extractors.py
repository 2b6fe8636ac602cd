"""DINO and DINOv2 as feature extractors, against transformers' own models and preprocessing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import checkpoints  # noqa: E402
import transformers  # noqa: E402
from torch.nn.functional import interpolate  # noqa: E402

from rlsd.engine import Engine, Job, Params  # noqa: E402
from rlsd.export import CheckpointError, Networks, package  # noqa: E402
from rlsd.export.extractors import Preprocessing, load_features, preprocessing, read_settings, resizing  # noqa: E402
from rlsd.export.operators import operators  # noqa: E402

KINDS = ("vit", "dinov2", "dinov2_with_registers")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


class Doubling(torch.nn.Module):
    """A decoder for which nothing but the extractor matters: latents [B, 3, H, W] are images of twice the size."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(interpolate(z, scale_factor=2.0))


class Linear(torch.nn.Module):
    def forward(self, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.5 * z_t


def class_token(model: Any, image: torch.Tensor, kind: str) -> torch.Tensor:
    """phi of images in [-1, 1] from the library's own model, preprocessed by hand as its configuration says."""
    model, pixels = model.double(), (image.double() + 1) / 2
    if kind == "vit":
        pixels = interpolate(pixels, (224, 224), mode="bilinear", antialias=True)
    else:  # 40 x 60: the short side to 256, the middle 224
        pixels = interpolate(pixels, (256, 384), mode="bicubic", antialias=True)[:, :, 16:240, 80:304]
    return model(pixel_values=(pixels - MEAN) / STD).last_hidden_state[:, 0]


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_features_and_their_pull_back(tmp_path: Path, kind: str) -> None:
    model = checkpoints.dino(tmp_path / kind, kind)
    shape = (3, 40, 60)
    networks = Networks(
        Linear(), Doubling(), torch.linspace(0.99, 0.01, 50), (3, 20, 30), shape,
        {"hdr": operators(shape)["hdr"]}, features=load_features(tmp_path / kind, shape),
    )  # fmt: skip
    bundle = package(networks, tmp_path / "bundle", name=kind, batches=[2])
    image = (torch.rand(2, *shape) * 2 - 1).requires_grad_()
    want = class_token(model, image, kind)
    cotangent = torch.randn(want.shape)
    (pulled,) = torch.autograd.grad(want, image, cotangent.double())
    assert (want[0] - want[1]).norm() > 1e-2 * want[0].norm()  # they do look at the image
    with Engine(bundle) as engine:
        assert engine.feature_dim == 24
        got = engine.features(image.detach().numpy())
        error = np.linalg.norm(got - want.detach().numpy()) / np.linalg.norm(want.detach().numpy())
        lines = [line.split() for line in (bundle / "manifest.txt").read_text().splitlines()]
        checks = {line[1]: float(line[3]) for line in lines if line[0] == "check"}
        print(f"{kind}: class token {error:.1e}, checks {checks}")
        assert error <= 2e-6 and checks["features_pull"] <= 1e-5
        job = Job(
            y=np.zeros(shape, np.float32), operator="hdr", particles=2,
            params=Params(steps=3, gamma=1, repulsion="features"),
        )  # fmt: skip
        (result,) = engine.reconstruct([job])
        assert np.isfinite(result.particles).all()
    phi = load_features(tmp_path / kind, shape).double()
    x = image.detach().double().requires_grad_()
    (again,) = torch.autograd.grad(phi(x), x, cotangent.double())
    assert (again - pulled).norm() <= 1e-5 * pulled.norm()  # both have some constants in float32


def test_registers_are_no_class_tokens(tmp_path: Path) -> None:
    model = checkpoints.dino(tmp_path, "dinov2_with_registers")
    image = torch.rand(2, 3, 40, 60) * 2 - 1
    with torch.no_grad():
        want = class_token(model, image, "dinov2_with_registers")
        got = load_features(tmp_path, (3, 40, 60)).double()(image.double())
    assert (got - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_prepared_as_by_the_librarys_processor(tmp_path: Path, kind: str) -> None:
    """The processor works on bytes and rounds to them, we do not: the pixels differ by half a level at most."""
    checkpoints.dino(tmp_path, kind)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    name = "ViTImageProcessorPil" if kind == "vit" else "BitImageProcessorPil"
    processor = getattr(transformers, name, None) or getattr(transformers, name.removesuffix("Pil"))
    image = torch.randint(0, 256, (300, 420, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = interpolate(image.permute(2, 0, 1)[None].float(), scale_factor=1.5, mode="bicubic").clamp(60, 200).round()
    image = image[0].byte()  # away from black and white: a bicubic filter overshoots there, and bytes are clipped
    want = torch.as_tensor(processor(**settings)(image.permute(1, 2, 0).numpy(), return_tensors="np")["pixel_values"])
    phi: Any = load_features(tmp_path, tuple(image.shape))
    got = (phi.rows @ (image[None] / 255) @ phi.columns_t - phi.mean) / phi.std
    assert got.shape == want.shape == (1, 3, 224, 224)
    assert (got - want).abs().max() <= 1.6 / 255 / 0.224


def test_gray_images_are_seen_as_gray(tmp_path: Path) -> None:
    checkpoints.dino(tmp_path, "dinov2")
    gray = torch.rand(1, 1, 40, 60) * 2 - 1
    with torch.no_grad():
        seen = load_features(tmp_path, (1, 40, 60))(gray)
        want = load_features(tmp_path, (3, 40, 60))(gray.expand(1, 3, 40, 60))
    assert torch.allclose(seen, want, atol=1e-5)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"resample": 1}, "resample 1"),
        ({"crop_size": {"height": 200, "width": 200}}, "a crop of 200"),
        ({"size": {"shortest_edge": 100}}, "of 100x150 pixels"),
        ({"do_center_crop": False}, "a square is wanted"),
        ({"size": {"height": 256, "width": 128}}, "size .* not supported"),
        ({"crop_size": None}, "crop_size None is not supported"),
        ({"image_mean": None}, "image_mean None is not supported"),
        ({"image_std": [0.5, 0.5]}, "image_std .* is not supported: three numbers"),
        ({"do_rescale": False}, "only images rescaled to .0, 1. are supported"),
        ({"rescale_factor": 1 / 127.5}, "only images rescaled to .0, 1. are supported"),
    ],
)
def test_preprocessing_that_is_not_possible_is_said(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    checkpoints.dino(tmp_path, "dinov2")
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text()) | changes
    with pytest.raises(CheckpointError, match=why):
        preprocessing(tmp_path, settings, (3, 40, 60), {"patch_size": 14, "image_size": 518})


@pytest.mark.parametrize(
    "kind, field",
    [
        ("vit", "size"),
        ("vit", "resample"),
        ("vit", "image_mean"),
        ("dinov2", "image_std"),
        ("dinov2", "do_center_crop"),
    ],
)
def test_what_a_processors_class_would_decide_must_be_said(tmp_path: Path, kind: str, field: str) -> None:
    checkpoints.dino(tmp_path, kind)
    path = tmp_path / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in settings.items() if name != field}))
    with pytest.raises(CheckpointError, match=f"preprocessor_config.json does not say {field}"):
        load_features(tmp_path, (3, 40, 60))
    path.write_text('{"do_resize": false, "do_normalize": false, "do_center_crop": false}')
    assert read_settings(tmp_path, kind)["do_resize"] is False  # nothing else is used


def test_a_number_is_the_shortest_edge_for_bits_processor(tmp_path: Path) -> None:
    said = {"resample": 3, "size": 224, "do_normalize": False, "do_center_crop": True, "crop_size": 224}
    for kind, name, size in (
        ("dinov2", None, {"shortest_edge": 224}),
        ("vit", "BitImageProcessor", {"shortest_edge": 224}),
        ("dinov2", "ViTImageProcessor", 224),
        ("vit", None, 224),
    ):
        named = {"image_processor_type": name} if name else {}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said | named))
        assert read_settings(tmp_path, kind)["size"] == size


def test_a_patch_size_that_is_not_said_is_the_models_own(tmp_path: Path) -> None:
    checkpoints.dino(tmp_path, "vit")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["patch_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_features(tmp_path, (3, 40, 60))(torch.zeros(1, 3, 40, 60)).shape == (1, 24)


@pytest.mark.parametrize("field, value", [("image_size", [32, 64]), ("patch_size", [16, 16]), ("patch_size", 0)])
def test_a_transformer_is_made_for_squares(tmp_path: Path, field: str, value: Any) -> None:
    checkpoints.dino(tmp_path, "vit")
    config = json.loads((tmp_path / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{field} {re.escape(str(value))} is not supported"):
        load_features(tmp_path, (3, 40, 60))


def test_a_repositorys_name_is_no_folder() -> None:
    with pytest.raises(CheckpointError, match=r"facebook/dino-vits16 has no config.json: a folder"):
        load_features(Path("facebook/dino-vits16"), (3, 32, 32))


def test_other_models_are_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(CheckpointError, match=r"'resnet'.*vit, dinov2"):
        load_features(tmp_path, (3, 32, 32))


def test_what_a_configuration_leaves_out_and_what_it_must_not_say() -> None:
    config = {"patch_size": 8, "image_size": 32}
    steps = preprocessing(Path("dino"), {}, (3, 64, 64), config)
    assert (steps.resized, steps.crop, steps.filter) == ((32, 32), 32, "bilinear")
    with pytest.raises(CheckpointError, match=r"image_std \[0.2, 0, 0.2\] is not supported"):
        preprocessing(Path("dino"), {"image_std": [0.2, 0, 0.2]}, (3, 64, 64), config)
    odd = Preprocessing((5, 5), 2, "bilinear", [], [])  # transformers leaves the smaller part above
    assert torch.equal(resizing(5, 5, odd), torch.eye(5)[1:3])
