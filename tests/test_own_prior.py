"""A prior of one's own images: the commands of docs/own-prior.md with few steps, and what is wrong with a folder."""

from __future__ import annotations

import glob
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import torch

from rlsd.engine import Engine
from rlsd.models.fashion import own, train
from rlsd.models.fashion.recipe import OWN_RECIPES, RECIPES
from rlsd.pipeline.cli import DONE, run

PAGE = Path(__file__).parents[1] / "docs" / "own-prior.md"
SHORT = {
    "python": "--steps 2 --threads 1",
    "export": "--operators inpainting --batch 2",
    "reconstruct": "--steps 3 --particles 2 --threads 1",
}


def picture(path: Path, seed: int, size: tuple[int, int], colour: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if colour else (size[1], size[0])
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)


def follow_the_page() -> None:
    """Runs every command of the page here, each with the options of SHORT."""
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for line in block.strip().splitlines():
        words = [name for word in shlex.split(line) for name in (sorted(glob.glob(word)) if "*" in word else [word])]
        if words[0] == "python":
            train.main([*words[3:], *SHORT["python"].split()])
        else:
            assert run([*words[1:], *SHORT[words[1]].split()]) == DONE


def test_the_pages_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        picture(
            Path("my-images") / ("tall cats", "dogs")[i % 2] / f"{i}.{'png' if i else 'jpg'}", i, (40 + i, 50), True
        )
    picture(Path("held-out/x.png"), 9, (33, 47), True)
    follow_the_page()
    kinds = {path.suffix for path in Path("my-checkpoint").rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}
    with Engine("my-bundle") as engine:
        assert engine.name == "mine" and engine.image_shape == (3, 32, 32)
        assert engine.contexts == ["dogs", "tall-cats"] and engine.feature_dim == 128
    particles = np.load("results/x/arrays.npz")["particles"]
    assert particles.shape == (2, 3, 32, 32) and np.isfinite(particles).all()
    assert not np.array_equal(particles[0], particles[1])


def test_larger_images_without_classes_resumed(tmp_path: Path) -> None:
    """64 x 64: interrupted after each phase, the checkpoint is the same as in one go, and has no extractor."""
    from safetensors.torch import load_file

    from rlsd.export.checkpoint import load

    for i in range(3):
        picture(tmp_path / "in" / f"{i}.png", i, (70, 64), colour=True)
    options = ["--images", str(tmp_path / "in"), "--size", "64", "--steps", "2", "--threads", "1"]
    train.main([*options, "--work", str(tmp_path / "w1"), "--out", str(tmp_path / "c1")])
    for phase in ("vae", "vae-decoder", "classifier", "own-unet", "export-weights"):
        train.main([*options, "--work", str(tmp_path / "w2"), "--out", str(tmp_path / "c2"), phase])
    for part in ("unet", "vae"):
        one, two = (load_file(tmp_path / c / part / "diffusion_pytorch_model.safetensors") for c in ("c1", "c2"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    networks = load(tmp_path / "c1", None, ["hdr"], None)
    assert (networks.image, networks.latent) == ((3, 64, 64), (4, 16, 16)) and networks.features is None
    assert networks.info == [] and networks.null_context is not None and networks.null_context.shape == (1, 64)


def test_images_are_read_as_they_are(tmp_path: Path) -> None:
    rows = np.zeros((40, 60, 3), np.uint8)
    rows[:, :5] = 255  # cut off: the middle square begins at column 10
    Image.fromarray(rows).save(tmp_path / "a.png")
    Image.fromarray(np.full((8, 8), 51400, np.uint16)).save(tmp_path / "deep.png")
    Image.new("L", (40, 40), 7).save(tmp_path / "b.jpeg")
    (tmp_path / "notes.txt").write_text("no image")
    read = own.load_images(tmp_path, 32)
    assert read.images.shape == (3, 3, 32, 32) and read.names == ()
    assert [int(image.min()) for image in read.images] == [0, 7, 200] == [int(image.max()) for image in read.images]
    assert own.load_images(tmp_path, 64, gray=True).images.shape == (3, 1, 64, 64)


@pytest.mark.parametrize(
    "files, why",
    [
        ([], "holds 0 PNG or JPEG files"),
        (["a.png"], "holds 1 PNG"),
        (["a.png", "x/b.png", "y/c.png"], "beside sub-folders"),
        (["x/a.png", "x/b.png"], "one class, x"),
        (["x y/a.png", "x+y/b.png"], "no good class names"),
        (["null/a.png", "y/b.png"], "no good class names"),
        (["broken.png", "a.png"], "broken.png cannot be read"),
    ],
)
def test_a_folder_that_cannot_be_used_is_said(
    tmp_path: Path, files: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for i, name in enumerate(files):
        picture(tmp_path / "in" / name, i, (32, 32), False)
        if "broken" in name:
            (tmp_path / "in" / name).write_bytes(b"\x89PNG\r\n")
    with pytest.raises(SystemExit) as stopped:
        train.main(["--images", str(tmp_path / "in"), "--work", str(tmp_path / "w"), "--out", str(tmp_path / "c")])
    assert stopped.value.code == 2 and why in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_work_folder_belongs_to_its_images(tmp_path: Path) -> None:
    for i in range(2):
        picture(tmp_path / "in" / f"{i}.png", i, (32, 32), False)
    first, other = own.load_images(tmp_path / "in", 32), own.load_images(tmp_path / "in", 64)
    own.train_own(first, [], tmp_path / "w", tmp_path / "c", OWN_RECIPES)
    own.train_own(first, [], tmp_path / "w", tmp_path / "c", OWN_RECIPES)
    with pytest.raises(ValueError, match="begun with other images"):
        own.train_own(other, [], tmp_path / "w", tmp_path / "c", OWN_RECIPES)


def test_steps() -> None:
    assert train.with_steps(RECIPES, None) == RECIPES
    assert {recipe.steps for recipe in train.with_steps(RECIPES, "7").values()} == {7}
    changed = train.with_steps(OWN_RECIPES, "vae=5,own-unet=6")
    assert (changed["vae"].steps, changed["own-unet"].steps) == (5, 6)
    assert changed["vae-decoder"] == OWN_RECIPES["vae-decoder"]
    for words in ("0", "many", "unet=5", "vae="):
        with pytest.raises(ValueError, match="is not allowed: a number, or PHASE=N"):
            train.with_steps(OWN_RECIPES, words)
