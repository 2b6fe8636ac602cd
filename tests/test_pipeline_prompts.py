"""Prompts from the command line to the job's context, with a small random Stable Diffusion."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import checkpoints  # noqa: E402
from PIL import Image  # noqa: E402

from rlsd.engine import Engine  # noqa: E402
from rlsd.pipeline import prompts  # noqa: E402
from rlsd.pipeline.cli import DONE, UNUSABLE, run  # noqa: E402
from rlsd.pipeline.errors import InputError  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `sd`, its bundle with one named prompt, and an image."""
    folder = tmp_path_factory.mktemp("prompts")
    checkpoints.diffusion_1_or_2(folder / "sd", "sd15")
    rows = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(rows).save(folder / "image.png")
    words = ["export", "--checkpoint", str(folder / "sd"), "--out", str(folder / "bundle"), "--size", "32"]
    assert run([*words, "--operators", "hdr", "--batch", "2", "--prompt", "cat=a red cat"]) == DONE
    return folder


def reconstruct(folder: Path, out: Path, *more: str) -> int:
    words = ["reconstruct", "--model", str(folder / "bundle"), "--task", "hdr", "--input", str(folder / "image.png")]
    return run([*words, "--out", str(out), "--particles", "2", "--steps", "3", *more])


def particles(out: Path) -> bytes:
    return bytes(np.load(out / "image" / "arrays.npz")["particles"].tobytes())


def test_a_prompt_is_the_named_context_that_the_export_kept(folder: Path, tmp_path: Path) -> None:
    ways = {
        "null": (), "named": ("--class", "cat"), "text": ("--prompt", "a red cat"), "other": ("--prompt", "a blue dog"),
        "guided": ("--prompt", "a red cat", "--guidance", "4"),
        "elsewhere": ("--prompt", "a red cat", "--text-encoder", str(folder / "sd")),
    }  # fmt: skip
    for name, more in ways.items():
        assert reconstruct(folder, tmp_path / name, *more) == DONE
    got = {name: particles(tmp_path / name) for name in ways}
    assert got["text"] == got["named"] == got["elsewhere"] and len(got["text"]) == 4 * 2 * 3 * 32 * 32
    assert len({got[name] for name in ("null", "text", "other", "guided")}) == 4
    report = json.loads((tmp_path / "guided" / "report.json").read_text())
    assert '"prompt": "a red cat"' in json.dumps(report)


@pytest.mark.parametrize(
    "more, why",
    [
        (("--prompt", "a cat", "--class", "cat"), "only one of them is allowed"),
        (("--text-encoder", "here"), "no prompt"),
        (("--prompt", "a cat", "--text-encoder", "nowhere"), "text encoder nowhere: checkpoint nowhere is neither"),
        (("--prompt", "a b c d e " * 20), "has 100 tokens; the text encoder takes 75"),
        (("--guidance", "2"), "needs a class to guide to: name one, or give a prompt"),
    ],
)
def test_what_is_not_possible_is_said_before_anything_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], why: str
) -> None:
    assert reconstruct(folder, tmp_path / "out", *more) == UNUSABLE
    assert why in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_text_encoder_must_be_the_bundles_own(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(9)
    checkpoints.text_encoder(tmp_path / "other")
    checkpoints.diffusion_xl(tmp_path / "xl")
    halves = shutil.copytree(folder / "sd", tmp_path / "halves")
    encoder = checkpoints.CLIPTextModel.from_pretrained(halves / "text_encoder", dtype=torch.float32)
    shutil.rmtree(halves / "text_encoder")
    encoder.half().save_pretrained(halves / "text_encoder", variant="fp16")
    with Engine(folder / "bundle") as engine:
        want = engine.context("cat")
        with pytest.raises(InputError, match="is not the one that the prior sd was exported with"):
            prompts.prompt_context(engine, "a red cat", str(tmp_path / "other"))
        with pytest.raises(InputError, match=r"makes contexts \[78, 64\]; the prior sd takes \[77, 32\]"):
            prompts.prompt_context(engine, "a red cat", str(tmp_path / "xl"))
        got = prompts.prompt_context(engine, "a red cat", str(halves))
    assert 0 < np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_only_the_text_encoder_is_fetched_in_the_precision_of_the_bundle(
    folder: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    from rlsd.export import hub
    from rlsd.export.layout import TEXT

    asked: list[tuple] = []

    def locate(where: str, **given: object) -> hub.Found:
        asked.append((given["halves"], given["parts"]))
        return hub.Found(folder / "sd", "sd", where)

    monkeypatch.setattr(hub, "locate", locate)
    with Engine(folder / "bundle") as engine:
        facts = engine.describe()
        monkeypatch.setattr(engine, "describe", lambda: {**facts, "precision": [precision]})
        prompts.prompt_context(engine, "a cat", f"owner/{precision}@{'0' * 40}")
    assert asked == [(precision == "fp16", TEXT)]


def test_a_prompt_is_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlsd.export.contexts import TextEncoder

    seen: list[str] = []
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, prompt: seen.append(prompt) or encode(self, prompt))
    with Engine(folder / "bundle") as engine:
        for _ in range(3):
            prompts.prompt_context(engine, "some new words")
    assert sorted(seen) in (["", "some new words"], ["some new words"])


def test_without_transformers_a_prompt_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts._encoder.cache_clear()
    for name in ("rlsd.export.contexts", "rlsd.export"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "rlsd.export.contexts", None)
    with Engine(folder / "bundle") as engine, pytest.raises(InputError, match=r"pip install 'rlsd\[export\]'"):
        prompts.prompt_context(engine, "words never seen")


def test_a_prior_without_text_says_so(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    words = ["reconstruct", "-m", "fashion", "-t", "half", "-i", str(folder / "image.png"), "-o", str(tmp_path / "o")]
    assert run([*words, "--prompt", "a shoe"]) == UNUSABLE
    assert "the prior fashion names no text encoder: give --text-encoder, or --class" in capsys.readouterr().err


def test_prompts_at_export_are_checked(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = checkpoints.stable_diffusion(tmp_path / "bare", text=False)
    for checkpoint, given, why in (
        (folder / "sd", ("cat",), "NAME=TEXT is wanted"),
        (folder / "sd", ("a/b=cat",), "prompt 'a/b' is not allowed"),
        (bare, ("cat=a cat",), "has no text encoder"),
    ):
        words = ["export", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "b"), "--size", "32"]
        assert run([*words, *(word for each in given for word in ("--prompt", each))]) == UNUSABLE
        assert why in capsys.readouterr().err
