"""Checkpoints in diffusers layout through the whole export, run by the engine, against diffusers itself."""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import checkpoints  # noqa: E402
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel  # noqa: E402
from transformers import ViTModel  # noqa: E402

from rlsd.engine import Engine, Job, Params  # noqa: E402
from rlsd.export import CheckpointError, export_checkpoint  # noqa: E402
from rlsd.export.checkpoint import shapes  # noqa: E402


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    checkpoint = checkpoints.stable_diffusion(folder / "tiny-sd")
    features = checkpoints.vision_transformer(folder / "vit")
    bundle = export_checkpoint(checkpoint, folder / "bundle", size="32x48", batches=[2], features=features)
    with Engine(bundle) as engine:
        yield checkpoint, features, engine


def test_shapes_and_contexts(exported):
    _, _, engine = exported
    assert engine.name == "tiny-sd"
    assert engine.image_shape == (3, 32, 48)
    assert engine.latent_shape == (4, 4, 6)
    assert engine.context_shape == (77, checkpoints.WIDTH)
    assert engine.feature_dim == 32
    assert set(engine.operators) >= {"inpainting", "superres4", "gaussian_blur", "phase_retrieval", "hdr"}


def test_denoiser_is_the_unet(exported):
    checkpoint, _, engine = exported
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    z, t = torch.randn(3, 4, 4, 6), torch.tensor([1, 500, 999])
    context = torch.randn(3, 77, checkpoints.WIDTH)
    got = engine.evaluate("denoiser", ["eps"], z_t=z.numpy(), t=t.numpy(), context=context.numpy())["eps"]
    want = unet(z, t, context).sample.detach().numpy()
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_decoder_and_features_are_the_libraries_own(exported):
    checkpoint, features, engine = exported
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae")
    z = torch.randn(2, 4, 4, 6)
    got = engine.evaluate("decoder", ["image"], z=z.numpy())["image"]
    want = vae.decode(z / vae.config.scaling_factor).sample.detach().numpy()
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)

    vit = ViTModel.from_pretrained(features, add_pooling_layer=False).eval()
    image = torch.rand(2, 3, 32, 48)
    resized = torch.nn.functional.interpolate(image, (32, 32), mode="bilinear", antialias=True)
    pixels = (resized - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    want = vit(pixels).last_hidden_state[:, 0].detach().numpy()
    got = engine.features((image * 2 - 1).numpy())
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_the_engine_runs_it(exported):
    _, _, engine = exported
    mask = np.ones((1, 32, 48), np.float32)
    job = Job(
        y=np.zeros((3, 32, 48), np.float32), operator="inpainting", operator_params={"mask": mask}, particles=3,
        params=Params(steps=3, gamma=1.0, lr_z=0.01, lr_x=0.01),
    )  # fmt: skip
    (result,) = engine.reconstruct([job])
    assert result.particles.shape == (3, 3, 32, 48)
    assert np.isfinite(result.particles).all()


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_predictions_become_epsilon(tmp_path, prediction):
    checkpoint = checkpoints.stable_diffusion(tmp_path / "sd", prediction, text=False)
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle", size="16", operators=["hdr"], batches=[1])
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    scheduler = DDPMScheduler.from_pretrained(checkpoint / "scheduler")
    z, t = torch.randn(1, 4, 2, 2), torch.tensor([300])
    with Engine(bundle) as engine:
        context = np.zeros((1, *engine.context_shape), np.float32)
        got = engine.evaluate("denoiser", ["eps"], z_t=z.numpy(), t=t.numpy(), context=context)["eps"]
        assert list(engine.operators) == ["hdr"]
    predicted = unet(z, t, torch.from_numpy(context)).sample.detach()
    abar = scheduler.alphas_cumprod[300]
    scheduler.register_to_config(clip_sample=False)
    clean = scheduler.step(predicted, 300, z).pred_original_sample
    want = ((z - abar.sqrt() * clean) / (1 - abar).sqrt()).numpy()
    assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want)


def test_what_cannot_be_exported_is_said_in_one_sentence(tmp_path):
    checkpoint = checkpoints.stable_diffusion(tmp_path / "sd", text=False)
    for arguments, word in [
        ({"size": "30"}, "multiples of 16"),
        ({"size": "big"}, "HxW"),
        ({"operators": ["zoom"]}, "zoom"),
        ({"features": tmp_path / "nowhere"}, "config.json"),
    ]:
        with pytest.raises(CheckpointError, match=word):
            export_checkpoint(checkpoint, tmp_path / "bundle", **{"size": "16", **arguments})
    with pytest.raises(CheckpointError, match="unet"):
        export_checkpoint(tmp_path, tmp_path / "bundle")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sd"]


def test_a_unet_of_other_latents_and_sizes_between_are_refused() -> None:
    unet = SimpleNamespace(in_channels=4, sample_size=8, block_out_channels=(8, 8))
    vae, other = (SimpleNamespace(latent_channels=n, out_channels=3, block_out_channels=(8, 8)) for n in (4, 16))
    assert shapes(unet, vae, None) == ((4, 8, 8), (3, 16, 16))
    oblong = SimpleNamespace(in_channels=4, sample_size=[8, 12], block_out_channels=(8, 8))
    assert shapes(oblong, vae, None) == ((4, 8, 12), (3, 16, 24))
    for wrong in ([], [8], {}, "x", 1.5, 0):
        odd = SimpleNamespace(in_channels=4, sample_size=wrong, block_out_channels=(8, 8))
        assert shapes(odd, vae, (16, 16)) == ((4, 8, 8), (3, 16, 16))
        with pytest.raises(CheckpointError, match=r"sample_size .* is not allowed: a whole number or two"):
            shapes(odd, vae, None)
    with pytest.raises(CheckpointError, match="takes 4 channels, the VAE's latents have 16"):
        shapes(unet, other, None)
    for size in ((16, 18), (18, 16), (16, 0)):
        with pytest.raises(CheckpointError, match=f"size {size[0]}x{size[1]} is not allowed"):
            shapes(unet, vae, size)
