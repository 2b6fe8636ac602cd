"""Checkpoints of the hub: found in its cache without a network, pinned to a commit, no more files than needed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
huggingface_hub = pytest.importorskip("huggingface_hub")
import checkpoints  # noqa: E402

from rlsd.export import CheckpointError  # noqa: E402
from rlsd.export.checkpoint import load  # noqa: E402
from rlsd.export.hub import locate  # noqa: E402
from rlsd.export.layout import TEXT, missing_parts, needed_files  # noqa: E402

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/small-xl"
# What the repository of a published SDXL holds, its other formats and pictures included.
LISTING = [
    ".gitattributes", "LICENSE.md", "README.md", "comparison.png", "model_index.json",
    "scheduler/scheduler_config.json",
    "sd_xl_base_1.0.safetensors",
    *(f"text_encoder/{name}" for name in (
        "config.json", "flax_model.msgpack", "model.fp16.safetensors", "model.onnx", "model.safetensors",
        "openvino_model.bin")),
    *(f"text_encoder_2/{name}" for name in (
        "config.json", "model.fp16.safetensors", "model.onnx_data", "model.safetensors")),
    *(f"tokenizer{suffix}/{name}" for suffix in ("", "_2") for name in (
        "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")),
    *(f"{part}/{name}" for part in ("unet", "vae", "vae_1_0") for name in (
        "config.json", "diffusion_flax_model.msgpack", "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors", "model.onnx")),
    "vae_decoder/config.json", "vae_decoder/model.onnx",
    "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model.non_ema.fp16.safetensors",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    checkpoints.diffusion_xl(folder / "xl", variant="fp16")
    checkpoints.in_hub_cache(folder / "cache", NAME, COMMIT, folder / "xl")
    return folder / "cache"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    def refuse(self: Any, repository: str, **_: Any) -> list[str]:
        asked.append(repository)
        raise ConnectionError("there is no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    return asked


def test_what_the_cache_holds_is_read_from_there(cache: Path, no_network: list[str]) -> None:
    for found in (locate(NAME, COMMIT, True, cache), locate(f"{NAME}@{COMMIT}", halves=True, cache=cache)):
        assert found.folder == cache / "models--someone--small-xl" / "snapshots" / COMMIT
        assert (found.name, found.origin) == ("someone-small-xl", f"{NAME}@{COMMIT}")
    networks = load(found.folder, (64, 64), ["hdr"], None, origin=found.origin)
    assert networks.info == [f"text_encoder {NAME}@{COMMIT}"] and networks.latent == (4, 8, 8)
    assert not no_network


def test_what_the_cache_holds_in_part_is_asked_for(cache: Path, tmp_path: Path, no_network: list[str]) -> None:
    folder = locate(NAME, COMMIT, True, cache).folder
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").rename(tmp_path / "away")
    try:
        assert missing_parts(folder) == ["vae"]
        with pytest.raises(CheckpointError, match=f"{NAME} at {COMMIT} is not in the cache .*: there is no network"):
            locate(NAME, COMMIT, True, cache)
    finally:
        (tmp_path / "away").rename(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert no_network == [NAME]


def test_a_download_takes_what_is_needed(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, Any] = {}
    folder = locate(NAME, COMMIT, True, cache).folder

    def download(repository: str, **given: Any) -> str:
        taken.update(given, repository=repository)
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision: LISTING)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate(NAME, COMMIT, halves=True, cache=tmp_path).folder == folder
    assert taken["repository"] == NAME and taken["revision"] == COMMIT
    assert taken["allow_patterns"] == needed_files(LISTING, True)


def test_halves_in_the_cache_are_not_all_there_is(
    cache: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]
) -> None:
    """The same words mean the same weights: in float32 the repository is asked whether it has the plain ones."""
    folder = locate(NAME, COMMIT, True, cache).folder
    assert not no_network and missing_parts(folder) == [] and "unet" in missing_parts(folder, plain=True)
    with pytest.raises(
        CheckpointError, match=r"is in the cache in halves alone .*give the folder .*there is no network"
    ):
        locate(NAME, COMMIT, cache=cache)
    taken: list[str] = []

    def download(repository: str, allow_patterns: list[str], **_: Any) -> str:
        taken.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    halves = [file for file in LISTING if "_model.safetensors" not in file and "/model.safetensors" not in file]
    for listing, word in (
        (LISTING, "unet/diffusion_pytorch_model.safetensors"),
        (halves, "unet/diffusion_pytorch_model.fp16.safetensors"),
    ):
        taken.clear()
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision, files=listing: files)
        assert locate(NAME, COMMIT, cache=cache).folder == folder and word in taken


def test_only_the_parts_that_are_wanted(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]
) -> None:
    """A prompt at run time needs the text encoders, not the gigabytes of the UNet."""
    chosen = needed_files(LISTING, False, TEXT)
    assert {file.partition("/")[0] for file in chosen} == {"model_index.json", *TEXT}
    assert {file for file in chosen if file.endswith(".safetensors")} == {
        "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"
    }  # fmt: skip
    source = locate(NAME, COMMIT, True, cache).folder
    shutil.copytree(source, tmp_path / "text", ignore=shutil.ignore_patterns("unet", "vae", "scheduler"))
    checkpoints.in_hub_cache(tmp_path / "cache", NAME, COMMIT, tmp_path / "text")
    assert (locate(NAME, COMMIT, True, tmp_path / "cache", TEXT).folder / "text_encoder").is_dir() and not no_network
    with pytest.raises(CheckpointError, match="is not in the cache"):
        locate(NAME, COMMIT, True, tmp_path / "cache")


@pytest.mark.parametrize("file", ["sd.safetensors", "models/v1-5-pruned.ckpt"])
def test_a_single_file_is_said(file: str) -> None:
    with pytest.raises(CheckpointError, match=r"is a single-file checkpoint; .*from_single_file.*save_pretrained"):
        locate(file)


@pytest.mark.parametrize("halves", [False, True])
def test_needed_files(halves: bool) -> None:
    chosen = needed_files(LISTING, halves)
    weights = {file for file in chosen if file.endswith(".safetensors")}
    dot = ".fp16" if halves else ""
    assert weights == {
        f"unet/diffusion_pytorch_model{dot}.safetensors", f"vae/diffusion_pytorch_model{dot}.safetensors",
        f"text_encoder/model{dot}.safetensors", f"text_encoder_2/model{dot}.safetensors",
    }  # fmt: skip
    rest = set(chosen) - weights
    assert all(file.endswith((".json", ".txt")) for file in rest)
    assert {"model_index.json", "scheduler/scheduler_config.json", "tokenizer_2/vocab.json", "vae/config.json"} <= rest
    assert not any(file.startswith(("vae_1_0", "vae_decoder")) for file in chosen)


def test_shards_are_all_needed(tmp_path: Path) -> None:
    names = ["config.json", "diffusion_pytorch_model.safetensors.index.json",
             *(f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))]  # fmt: skip
    files = [*(f"unet/{name}" for name in names), "unet/diffusion_pytorch_model.bin"]
    assert sorted(needed_files(files, True)) == sorted(files[:-1])
    with pytest.raises(CheckpointError, match=r"unet: no diffusion_pytorch_model\.safetensors"):
        needed_files(["unet/config.json", "unet/diffusion_pytorch_model.bin"], False)
    (tmp_path / "unet").mkdir()
    for name in names[:3]:
        (tmp_path / "unet" / name).write_text('{"weight_map": {"a": "%s", "b": "%s"}}' % tuple(names[2:]))  # noqa: UP031
    assert "unet" in missing_parts(tmp_path)
    (tmp_path / "unet" / names[3]).symlink_to(tmp_path / "blob")  # as in a cache, where what it leads to may be gone
    assert "unet" in missing_parts(tmp_path)
    (tmp_path / "blob").write_text("")
    assert "unet" not in missing_parts(tmp_path)
    (tmp_path / "unet" / "config.json").unlink()
    assert "unet" in missing_parts(tmp_path)


def test_half_a_tokenizer_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    for names, whole in ((["vocab.json"], False), (["vocab.json", "merges.txt"], True)):
        for name in names:
            (tmp_path / "tokenizer" / name).write_text("{}")
        assert ("tokenizer" not in missing_parts(tmp_path, ["text_encoder", "tokenizer"])) is whole


@pytest.mark.parametrize(
    "checkpoint, revision, why",
    [
        (NAME, None, "revision None is not allowed.*40 hexadecimal"),
        (NAME, "main", "revision 'main' is not allowed"),
        (NAME, COMMIT[:12], "revision '0123456789ab' is not allowed"),
        (f"{NAME}@v1", None, "revision 'v1' is not allowed"),
        (f"{NAME}@{COMMIT}", COMMIT, "names one already"),
        ("no-such-folder", COMMIT, "neither a folder nor owner/name"),
        ("a/b/c", COMMIT, "neither a folder nor owner/name"),
        ("../x", COMMIT, "neither a folder nor owner/name"),
    ],
)
def test_what_is_not_pinned_is_refused(checkpoint: str, revision: str | None, why: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=why):
        locate(checkpoint, revision, cache=tmp_path)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a local folder"):
        locate(tmp_path, COMMIT)


@pytest.mark.parametrize("halves", [False, True])
def test_shards_of_one_set_of_weights_are_needed(halves: bool) -> None:
    stem = "unet/diffusion_pytorch_model"
    shards = {dot: {f"{stem}{dot}-0000{i}-of-00002.safetensors" for i in (1, 2)} for dot in ("", ".fp16")}
    indices = [f"{stem}.safetensors.index{dot}.json" for dot in ("", ".fp16")]
    chosen = needed_files(["unet/config.json", *shards[""], *shards[".fp16"], *indices], halves)
    assert set(chosen) == {"unet/config.json", indices[halves], *shards[".fp16" if halves else ""]}
