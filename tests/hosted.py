"""Bundles for CUDA that run where no GPU is: the engine's whole device path over a stand-in for the driver.

Networks become graphs that ONNX Runtime's CPU provider has, with inputs and outputs in halves; operators of our own
stay and launch the Triton kernels through the stand-in. Weights, kernels' lines, manifest: as in a bundle for CUDA.

python tests/hosted.py SOURCE TARGET        writes one
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import fake_cuda
import onnx
from onnx import TensorProto
from onnx.external_data_helper import set_external_data

from rlsd.export.lower import border, lowered

ALIGNMENT, LEAST = 64, 256
REPLACED = ("file", "weights", "kernel", "end", "target", "precision")


def hosted_bundle(
    source: Path,
    target: Path,
    arch: int = 90,
    scales: tuple[float, float] = (64.0, 8.0),
    notes: Sequence[str] = (),
    cubins: Sequence[tuple[str, bytes, str]] | None = None,
) -> Path:
    """Writes `source`, a bundle for CUDA or a CPU, to the new folder `target`, with stand-ins for the cubins.

    scales: of the cotangents of decoder and features, for one whose source was made for a CPU. notes: more lines of the
    manifest. cubins: real ones instead, (file name, contents, manifest line), for a real GPU.
    """
    target.mkdir(parents=True)
    lines = (source / "manifest.txt").read_text().splitlines()
    for_cuda = "target cuda" in lines
    head, *rest = [line for line in lines if line.split()[0] not in REPLACED]
    kept = [head, "target cuda", "precision fp16", *rest]
    if not for_cuda:
        named = ["decoder", *(["features"] if any(line.startswith("feature_dim") for line in lines) else [])]
        kept += [f"cotangent_scale {name} {scale}" for name, scale in zip(named, scales)]
    kept += notes
    files: dict[str, bytes] = {}
    weights = bytearray()
    for words in map(str.split, rest):
        if words[0] in ("alphas_cumprod", "null_context", "named_context"):
            files[words[-1]] = (source / words[-1]).read_bytes()
        if words[0] == "graph":
            model = onnx.load(source / words[3])
            if not words[1].startswith("operator."):
                model = lowered(model, kept=True) if for_cuda else halved(model)
            move_weights(model, weights)
            files[words[3]] = model.SerializeToString()
    files["weights.bin"] = bytes(weights)
    for name, contents, line in fake_cuda.fake_cubin_bundle_lines(arch) if cubins is None else cubins:
        files[name] = contents
        kept.append(line)
    kept.append("weights weights.bin")
    kept += [f"file {name} {len(data)} {hashlib.sha256(data).hexdigest()}" for name, data in sorted(files.items())]
    text = "".join(line + "\n" for line in kept)
    for name, data in files.items():
        (target / name).write_bytes(data)
    (target / "manifest.txt").write_text(text + f"end {hashlib.sha256(text.encode()).hexdigest()}\n")
    return target


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """A network in float32 whose inputs and outputs are halves."""
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    nodes = list(border(model.graph, list(model.graph.node)))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def move_weights(model: onnx.ModelProto, weights: bytearray) -> None:
    """Moves what is large to the common file, as rlsd.export.bundle does."""
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.raw_data) < LEAST:
            continue
        weights.extend(b"\0" * (-len(weights) % ALIGNMENT))
        set_external_data(tensor, "weights.bin", len(weights), len(tensor.raw_data))
        weights.extend(tensor.raw_data)
        tensor.ClearField("raw_data")


if __name__ == "__main__":
    hosted_bundle(Path(sys.argv[1]), Path(sys.argv[2]))
