"""Real kinds of checkpoint, small and random, through the export and the engine, against their own pipelines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import checkpoints  # noqa: E402
from diffusers import EulerDiscreteScheduler  # noqa: E402

from rlsd.engine import Engine, Job, Params  # noqa: E402
from rlsd.export import CheckpointError, export_checkpoint  # noqa: E402
from rlsd.export.checkpoint import load  # noqa: E402
from rlsd.export.contexts import TextEncoder  # noqa: E402
from rlsd.export.diffusers_unet import LEAST, load_schedule, load_unet, pooled_width  # noqa: E402
from rlsd.export.diffusers_vae import Decoder, load_vae  # noqa: E402
from rlsd.export.layout import missing_parts  # noqa: E402

SIZE = (64, 96)
PROMPT = "a red cat"


def unet_calls(pipeline: Any, **given: Any) -> list[dict[str, Any]]:
    """The arguments of the UNet's calls in one run of the pipeline."""
    calls: list[dict[str, Any]] = []

    def record(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append({"sample": args[0], "timestep": args[1], **kwargs})

    hook = pipeline.unet.register_forward_pre_hook(record, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipeline(height=SIZE[0], width=SIZE[1], num_inference_steps=2, output_type="latent", **given)
    hook.remove()
    return calls


def doubled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: doubled(each) for name, each in value.items()}
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def in_float64(pipeline: Any, call: dict[str, Any]) -> torch.Tensor:
    """What the UNet predicts for one of the pipeline's own calls."""
    unet = pipeline.unet.double()
    with torch.no_grad():
        predicted = unet(**doubled(call) | {"return_dict": False})[0]
    pipeline.unet.float()
    return predicted


def error(got: np.ndarray, want: torch.Tensor) -> float:
    return float(np.linalg.norm(got - want.numpy()) / np.linalg.norm(want.numpy()))


def run_two_steps(engine: Engine, context: np.ndarray | None) -> np.ndarray:
    mask = np.ones((1, *SIZE), np.float32)
    job = Job(
        y=np.zeros((3, *SIZE), np.float32), operator="inpainting", operator_params={"mask": mask}, particles=2,
        context=context, params=Params(steps=3, gamma=1.0, lr_z=0.01, lr_x=0.01, guidance=1 if context is None else 4),
    )  # fmt: skip
    (result,) = engine.reconstruct([job])
    assert np.isfinite(result.particles).all()
    return result.particles


@pytest.mark.parametrize("kind", ["sd15", "sd21-base", "sd21", "sdxl"])
def test_the_denoiser_is_the_pipelines_own_unet_call(tmp_path: Path, kind: str) -> None:
    make = checkpoints.diffusion_xl if kind == "sdxl" else checkpoints.diffusion_1_or_2
    pipeline = make(tmp_path / kind, *([] if kind == "sdxl" else [kind]))
    bundle = export_checkpoint(
        tmp_path / kind, tmp_path / "bundle", size=SIZE, operators=["inpainting"], batches=[2], prompts={"cat": PROMPT}
    )
    call = unet_calls(pipeline, prompt=PROMPT, guidance_scale=3.0)[0]  # of two samples: without and with the prompt
    z, t = call["sample"], call["timestep"]
    predicted = in_float64(pipeline, call)
    abar = float(pipeline.scheduler.alphas_cumprod[int(t)])
    if pipeline.scheduler.config.prediction_type == "v_prediction":
        predicted = abar**0.5 * predicted + (1 - abar) ** 0.5 * z.double()
    with Engine(bundle) as engine:
        facts = dict(line.split(" ", 1) for line in engine.describe()["info"])
        null = np.fromfile(bundle / "null_context.f32", np.float32).reshape(engine.context_shape)
        named = np.stack([null, engine.context("cat")])
        got = engine.evaluate("denoiser", ["eps"], z_t=z.numpy(), t=np.full(2, int(t)), context=named)["eps"]
        seen = error(got, predicted)
        with torch.no_grad():
            latent = torch.randn(2, *engine.latent_shape)
            image = pipeline.vae.double().decode(latent.double() / pipeline.vae.config.scaling_factor).sample
        decoded = error(engine.evaluate("decoder", ["image"], z=latent.numpy())["image"], image)
        print(f"{kind}: denoiser {seen:.1e}, decoder {decoded:.1e}")
        assert seen <= 1e-5 and decoded <= 1e-5
        assert facts["text_encoder"] == str((tmp_path / kind).resolve())
        rows = 77 + (kind == "sdxl")
        assert engine.context_shape == (rows, checkpoints.WIDTH * (1 + (kind == "sdxl")))
        assert not null.any() if kind == "sdxl" else null.any()
        assert not np.array_equal(run_two_steps(engine, None), run_two_steps(engine, engine.context("cat")))


def test_default_size_is_the_unets_own(tmp_path: Path) -> None:
    checkpoints.diffusion_1_or_2(tmp_path / "sd21", "sd21")
    assert load(tmp_path / "sd21", None, ["hdr"], None).image == (3, 96, 96)  # 12 latent pixels, as 96 make 768


def test_xl_says_its_own_size_and_reads_the_pooled_rows(tmp_path: Path) -> None:
    """time_ids follow the size of the bundle; each of context, pooled rows and size changes what is predicted."""
    checkpoints.diffusion_xl(tmp_path / "xl")
    small, large = (load(tmp_path / "xl", size, ["hdr"], None) for size in ((64, 64), (64, 96)))
    assert large.denoiser.unet.time_ids.tolist() == [[64, 96, 0, 0, 64, 96]]
    z, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, *small.null_context.shape)
    other = context.clone()
    other[:, -1, :40] += 1
    padding = context.clone()
    padding[:, -1, 40:] += 1
    with torch.no_grad():
        base = small.denoiser(z, t, context)
        assert torch.equal(small.denoiser(z, t, padding), base)
        assert not torch.allclose(small.denoiser(z, t, other), base)
        assert not torch.allclose(large.denoiser(z, t, context), base)


@pytest.mark.parametrize("pooled", [32, 48])
def test_xl_takes_as_many_pooled_values_as_its_encoder_gives(tmp_path: Path, pooled: int) -> None:
    """Not fewer, which would cut them, and not more, which would be zeros."""
    pipeline = checkpoints.diffusion_xl(tmp_path / "xl")
    config = {**pipeline.unet.config, "projection_class_embeddings_input_dim": 6 * 8 + pooled}
    type(pipeline.unet).from_config(config).save_pretrained(tmp_path / "xl" / "unet")
    with pytest.raises(CheckpointError, match=f"and 40 pooled values, its UNet takes .* and {pooled} pooled values"):
        load(tmp_path / "xl", (64, 64), ["hdr"], None)
    none = SimpleNamespace(
        addition_embed_type="text_time", projection_class_embeddings_input_dim=48, addition_time_embed_dim=8
    )
    with pytest.raises(CheckpointError, match="leaves no room for a pooled embedding"):
        pooled_width(none)


def test_xl_for_cuda_keeps_what_halves_cannot_hold_in_float32(tmp_path: Path) -> None:
    pipeline = checkpoints.diffusion_xl(tmp_path / "xl")
    convolution = pipeline.vae.decoder.up_blocks[1].resnets[0].conv2
    convolution.weight.data *= 3e5  # a residual stream like that of SDXL's own VAE, which overflows
    pipeline.vae.save_pretrained(tmp_path / "xl" / "vae")
    bundle = export_checkpoint(
        tmp_path / "xl", tmp_path / "bundle", target="cuda", architectures=[], size="64", batches=[1],
        operators=["inpainting"], prompts={"cat": PROMPT},
    )  # fmt: skip
    lines = [line.split() for line in (bundle / "manifest.txt").read_text().splitlines()]
    checks = {line[1]: float(line[3]) for line in lines if line[0] == "check" and line[2] == "halves"}
    print(checks)
    assert checks.keys() == {"denoiser", "decoder", "decoder_pull"} and max(checks.values()) < 1e-2
    assert {line[2] for line in lines if line[:2] == ["info", "float32"]} == {"decoder"}
    assert {"context", "denoiser"} <= {line[1] for line in lines if line[0] == "graph"}


def test_halves_are_read_where_they_are_all_there_is_or_all_that_is_wanted(tmp_path: Path) -> None:
    pipeline = checkpoints.diffusion_xl(tmp_path / "half", variant="fp16")
    assert not list((tmp_path / "half").rglob("*model.safetensors"))
    checkpoints.diffusion_xl(tmp_path / "both")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipeline, part).half().save_pretrained(tmp_path / "both" / part, variant="fp16")
    parts = {name: load(tmp_path / name, (64, 64), ["hdr"], None, {"cat": PROMPT}) for name in ("half", "both")}
    parts["chosen"] = load(tmp_path / "both", (64, 64), ["hdr"], None, {"cat": PROMPT}, halves=True)
    weight = {name: each.denoiser.unet.unet.conv_in.weight for name, each in parts.items()}
    assert all(value.dtype == torch.float32 for value in weight.values())
    rounded = weight["both"].half().float()
    assert torch.equal(weight["chosen"], rounded) and not torch.equal(weight["both"], rounded)
    assert torch.equal(weight["half"], weight["both"])  # saved in float32 under the halves' name
    assert not torch.equal(parts["chosen"].contexts["cat"], parts["both"].contexts["cat"])
    assert torch.allclose(parts["chosen"].contexts["cat"], parts["both"].contexts["cat"], atol=1e-2)


def test_a_schedule_that_ends_without_signal(tmp_path: Path) -> None:
    settings = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    EulerDiscreteScheduler(prediction_type="v_prediction", **settings).save_pretrained(tmp_path / "v")
    table = load_schedule(tmp_path / "v").alphas_cumprod
    assert table[-1] == LEAST and (table[:-1] > LEAST).all() and (table.diff() < 0).all()
    EulerDiscreteScheduler(prediction_type="epsilon", **settings).save_pretrained(tmp_path / "eps")
    with pytest.raises(CheckpointError, match="rescale_betas_zero_snr"):
        load_schedule(tmp_path / "eps")


def test_a_schedule_without_offset_has_that_of_stable_diffusions_pipelines(sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd, tmp_path / "sd")
    config = folder / "scheduler" / "scheduler_config.json"
    edit(config, steps_offset=0)
    assert load(folder, (64, 64), ["hdr"], None).steps_offset == 0
    config.write_text(
        json.dumps({name: value for name, value in json.loads(config.read_text()).items() if name != "steps_offset"})
    )
    assert load(folder, (64, 64), ["hdr"], None).steps_offset == 1


def test_without_signal_all_is_noise(sd: Path, tmp_path: Path) -> None:
    """A v-prediction at abar = LEAST: eps is z_t, whatever the UNet says."""
    folder = shutil.copytree(sd, tmp_path / "sd")
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    networks = load(folder, (64, 64), ["hdr"], None)
    z = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        eps = networks.denoiser(z, torch.tensor([999, 900]), networks.null_context.expand(2, -1, -1))
    assert (eps[0] - z[0]).norm() <= 1e-3 * z[0].norm() < (eps[1] - z[1]).norm()


@pytest.mark.parametrize(
    "latents",
    [{"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 0.5]}, {"shift_factor": 0.1}],
)
def test_other_scalings_of_the_latents(tmp_path: Path, latents: dict[str, Any]) -> None:
    vae = checkpoints.small_vae(scaling_factor=0.5, **latents)
    vae.save_pretrained(tmp_path / "vae")
    z = torch.randn(2, 4, 4, 4)
    mean, std = (torch.tensor(latents.get(f"latents_{name}", [value] * 4))[:, None, None]
                 for name, value in (("mean", latents.get("shift_factor", 0)), ("std", 1.0)))  # fmt: skip
    with torch.no_grad():
        want = vae.decode(z * std / 0.5 + mean).sample
        assert torch.allclose(Decoder(load_vae(tmp_path / "vae"))(z), want, atol=1e-5)


def drop(path: Path, *fields: str) -> None:
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in fields}))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "file, changes, why",
    [
        ("unet/config.json", {"in_channels": 9}, "inpainting"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type 'image' is not supported"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet/config.json", {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type"),
        ("unet/config.json", {"_class_name": "UNetSpatioTemporalConditionModel"}, "only a UNet2DConditionModel"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "only an AutoencoderKL"),
        ("vae/config.json", {"latents_mean": [0, 0, 0, 0]}, "latents_std"),
        ("vae/config.json", {"latents_mean": [0.0], "latents_std": [1.0]}, "1 values for 4 channels"),
        ("unet/config.json", {"conv_out_kernel": 4}, "conv_out_kernel 4 is not supported, only an odd number"),
        ("unet/config.json", {"conv_in_kernel": None}, "conv_in_kernel None is not supported"),
        ("vae/config.json", {"act_fn": None}, "vae cannot be loaded: AttributeError: 'NoneType' object"),
        ("vae/config.json", {"block_out_channels": {}}, "vae cannot be loaded: KeyError"),
        ("unet/config.json", {"up_block_types": 1.5}, "unet cannot be loaded: TypeError: object of type 'float'"),
        ("unet/config.json", {"transformer_layers_per_block": []}, "unet cannot be loaded: IndexError"),
        ("text_encoder/config.json", {"hidden_size": "x"}, "text_encoder cannot be loaded"),
        ("vae/config.json", {"latents_mean": 0.0, "latents_std": 1.0}, "latents_mean 0.0 is not allowed"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor 0 is not allowed"),
        ("vae/config.json", {"scaling_factor": None}, "scaling_factor None is not allowed"),
        ("vae/config.json", {"shift_factor": "x"}, "shift_factor 'x' is not allowed"),
        ("vae/config.json", {"shift_factor": [0.1]}, "shift_factor .* is not allowed"),
        ("vae/config.json", {"latent_channels": 16}, "vae cannot be loaded"),
        ("vae/config.json", {"layers_per_block": 2}, "do not fit its config.json: .*resnets"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "no table of betas"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "cosmic"}, "'cosmic' is not known"),
        ("model_index.json", {"requires_aesthetics_score": True}, "refiner"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256 is not supported"),
        ("unet/config.json", {"dual_cross_attention": True}, "dual_cross_attention True is not supported"),
        ("unet/config.json", {"cross_attention_dim": [32, 32]}, r"cross_attention_dim \[32, 32\] is not supported"),
        ("unet/config.json", {"mid_block_type": None}, "do not fit its config.json: mid_block"),
        ("vae/config.json", {"layers_per_block": 0}, "do not fit its config.json: .*resnets"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps 0 is not allowed"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "1000"}, "num_train_timesteps '1000' is not"),
        ("unet/config.json", {"encoder_hid_dim": 32}, "encoder_hid_dim 32 is not supported"),
        ("unet/config.json", {"num_class_embeds": 10}, "num_class_embeds 10 is not supported"),
        (
            "vae/config.json",
            {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1},
            "not together with shift_factor",
        ),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "no table of betas"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type 'flow' is not known"),
    ],
)
def test_what_is_not_supported_is_said(sd: Path, tmp_path: Path, file: str, changes: dict[str, Any], why: str) -> None:
    folder = shutil.copytree(sd, tmp_path / "sd")
    edit(folder / file, **changes)
    with pytest.raises(ValueError, match=why):
        load(folder, (64, 64), ["hdr"], None)


@pytest.mark.parametrize("text, why", [("[]", "is not a JSON object"), ("{", "cannot be read as JSON")])
def test_a_configuration_is_an_object(sd: Path, tmp_path: Path, text: str, why: str) -> None:
    folder = shutil.copytree(sd, tmp_path / "sd")
    (folder / "vae" / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"config.json {why}"):
        load(folder, (64, 64), ["hdr"], None)


def test_a_schedule_says_its_betas(sd: Path, tmp_path: Path) -> None:
    """By a name, or one by one; a configuration without either is that of another kind of model."""
    folder = shutil.copytree(sd / "scheduler", tmp_path / "scheduler")
    drop(folder / "scheduler_config.json", "beta_schedule")
    with pytest.raises(CheckpointError, match="no table of betas"):
        load_schedule(folder)
    betas = [0.1, 0.2, 0.3]
    edit(folder / "scheduler_config.json", trained_betas=betas, num_train_timesteps=3)
    table = (1 - torch.tensor(betas)).cumprod(0).double()
    assert torch.allclose(load_schedule(folder).alphas_cumprod, table)


def test_channels_that_a_configuration_does_not_say_are_the_classs(sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd, tmp_path / "sd")
    drop(folder / "unet" / "config.json", "in_channels", "out_channels")
    assert load(folder, (64, 64), ["hdr"], None).latent == (4, 8, 8)


def test_a_size_that_nothing_says_is_asked_for(sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd, tmp_path / "sd")
    drop(folder / "unet" / "config.json", "sample_size")
    with pytest.raises(CheckpointError, match="give --size"):
        load(folder, None, ["hdr"], None)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_what_the_index_names_must_be_there(sd: Path, tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(sd, tmp_path / "sd")
    shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError, match=f"no folder '{part}': but its model_index.json names it"):
        load(folder, (64, 64), ["hdr"], None)
    shutil.rmtree(folder / ("tokenizer" if part == "text_encoder" else "text_encoder"))
    edit(folder / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    assert not load(folder, (64, 64), ["hdr"], None).null_context.any()


def test_each_text_encoder_needs_its_tokenizer(tmp_path: Path) -> None:
    checkpoints.diffusion_xl(tmp_path / "xl")
    (tmp_path / "xl" / "model_index.json").unlink()
    assert not TextEncoder(tmp_path / "xl").null().any()  # SDXL was trained so, unless it says otherwise
    (tmp_path / "xl" / "model_index.json").write_text('{"force_zeros_for_empty_prompt": false}')
    assert TextEncoder(tmp_path / "xl").null().any()
    shutil.rmtree(tmp_path / "xl" / "tokenizer_2")
    with pytest.raises(CheckpointError, match="has no folder tokenizer_2"):
        TextEncoder(tmp_path / "xl")


def test_a_tokenizer_has_a_vocabulary_that_its_encoder_knows(sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd, tmp_path / "sd")
    text_config = json.loads((folder / "text_encoder" / "config.json").read_text())
    drop(folder / "tokenizer" / "tokenizer_config.json", "model_max_length")
    encoder, length = TextEncoder(folder), text_config["max_position_embeddings"]
    plain = encoder.encode("a b")
    assert plain.shape == encoder.encode("a " * (length - 2)).shape == (length, checkpoints.WIDTH)
    with pytest.raises(CheckpointError, match=f"has {length - 1} tokens; the text encoder takes {length - 2}"):
        encoder.encode("a " * (length - 1))
    encoder.parts[0][1].config.use_attention_mask = True  # then what fills the prompt up is not seen
    assert not torch.equal(encoder.encode("a b"), plain)
    checkpoints.CLIPTextModel(checkpoints.text_config(vocab_size=53)).save_pretrained(folder / "text_encoder")
    with pytest.raises(CheckpointError, match=r"tokenizer of .* has token 53, its encoder only 53"):
        TextEncoder(folder)
    for name in ("tokenizer.json", "vocab.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    assert missing_parts(folder) == ["tokenizer"]
    with pytest.raises(CheckpointError, match=r"has neither tokenizer.json nor both vocab.json and merges.txt"):
        TextEncoder(folder)


def test_only_safetensors_are_read(sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd, tmp_path / "sd")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="only safetensors"):
        load_unet(folder / "unet")


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prior") / "sd"
    checkpoints.diffusion_1_or_2(folder, "sd15")
    return folder
