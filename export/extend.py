"""Gives a bundle more forward operators, as a new bundle: the networks are neither exported nor copied again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rlsd.export.bundle import FORMAT, WEIGHTS, BundleWriter, check_name, sha256
from rlsd.export.operator_graphs import OperatorGraphs, check_operator, declare
from rlsd.export.trace import REWRITES

MANIFEST = "manifest.txt"


@dataclass(frozen=True)
class Verified:
    """A bundle each byte of which is what its manifest says. facts: its lines, without those about files."""

    folder: Path
    facts: list[list[str]]
    files: list[str]

    def values(self, key: str) -> list[list[str]]:
        """The values of each line with this key."""
        return [words[1:] for words in self.facts if words[0] == key]

    def value(self, key: str) -> list[str]:
        """The values of the one line with this key. ValueError if it is not there."""
        found = self.values(key)
        if not found:
            raise ValueError(f"{self.folder}: its manifest has no line {key!r}")
        return found[0]


def extend(bundle: Path, out: Path, operators: Mapping[str, nn.Module], *, overwrite: bool = False) -> Path:
    """Writes to `out` all that `bundle` has and the graphs of `operators`, name -> module, and returns `out`.

    A module is what rlsd.export.Networks says: (x [B, C, H, W] in [-1, 1], **parameters) -> y [B, ...]. Its graphs are
    made for every batch of the bundle and checked as in any export; the figures go into the manifest. `weights.bin` is
    hard-linked where that is possible (which the engine allows, and onnx.load refuses), and copied if it has to grow:
    for arrays over 1/64 of it. `out` appears when it is complete; it may be `bundle` itself with `overwrite`.
    Raises ValueError for a bundle that is not whole or not of this format, and for a name that is taken or not
    allowed; FileExistsError for `out`; check.CheckError for a graph that does not agree with its module.
    """
    base = verify(Path(bundle))
    image = [int(size) for size in base.value("image")]
    batches = sorted(int(batch) for name, batch, _ in base.values("graph") if name == "denoiser")
    check_operators(base, operators, image)
    with (
        torch.random.fork_rng(devices=[]),
        BundleWriter(
            Path(out), base.value("name")[0], " ".join(base.value("producer")), base.value("target")[0],
            base.value("precision")[0], overwrite, weights=base.folder / WEIGHTS,
        ) as writer,
    ):  # fmt: skip
        torch.manual_seed(0)
        adopt(base, writer)
        declare(operators, image, writer)
        for batch in batches:
            graphs = OperatorGraphs(writer, torch.rand(batch, *image) * 2 - 1, list(REWRITES))
            for name, operator in operators.items():
                graphs.operator(name, operator)
    return Path(out)


def adopt(base: Verified, writer: BundleWriter) -> None:
    """Takes over every fact and every file but the weights, which the writer has."""
    for words in base.facts:
        if words[0] not in ("name", "producer", "target", "precision", "weights"):
            writer.fact(*words)
    for file in base.files:
        if file != WEIGHTS:
            writer.file(file, (base.folder / file).read_bytes())


def check_operators(base: Verified, operators: Mapping[str, nn.Module], image: list[int]) -> None:
    """ValueError for a name that the bundle has already, or that neither it nor the engine would take."""
    there = [words[0] for words in base.values("operator")]
    if not operators:
        raise ValueError("no operators are given; at least one is wanted")
    for name, operator in operators.items():
        if name in there:
            raise ValueError(f"operator {name!r} is in {base.folder} already ({', '.join(there)}); choose another name")
        check_operator(name, operator, image)


def verify(folder: Path) -> Verified:
    """Reads a bundle's manifest and checks it and each file against its SHA-256. ValueError where one differs."""
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError:
        raise ValueError(f"{folder} is no bundle: its {MANIFEST} cannot be read") from None
    body, end, digest = text.rpartition(b"\nend ")
    if not end or digest.strip() != hashlib.sha256(body + b"\n").hexdigest().encode():
        raise ValueError(f"{folder}: {MANIFEST} was altered or cut off: its SHA-256 differs")
    first, *lines = body.decode().splitlines()
    if first != f"rlsd-bundle {FORMAT}":
        raise ValueError(f"{folder}: format {first[:64]!r} is not known; rlsd-bundle {FORMAT} is wanted")
    words = [line.split() for line in lines]
    files = [(each[1], int(each[2]), each[3]) for each in words if each[0] == "file"]
    for name, size, want in files:
        path = folder / check_name("file", name)
        if not path.is_file() or path.is_symlink() or path.stat().st_size != size or sha256(path) != want:
            raise ValueError(f"{path} is missing or was altered: it is not the file of the manifest")
    verified = Verified(folder, [each for each in words if each[0] != "file"], [name for name, _, _ in files])
    if verified.value("weights") != [WEIGHTS] or WEIGHTS not in verified.files:
        raise ValueError(f"{folder}: weights {' '.join(verified.value('weights'))!r} is not allowed: {WEIGHTS}")
    return verified
