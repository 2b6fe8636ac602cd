"""Writes first inputs for the fuzzers, from the tiny bundle: python tests/fuzz/seeds.py FOLDER."""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bundle_factory import facts_of, make_graphs
from tiny import make_nets, null_context

CUDA = (
    "target cuda", "cotangent_scale decoder 64", "cotangent_scale features 8.5e-1",
    "kernel step_z_fp16 90 f0 entry 4 49152 z:*fp16 n:i32 scale:fp32 scratch:*i8 more:*i8 BLOCK=1024 EVEN=-1",
)  # fmt: skip


def manifests() -> list[bytes]:
    """Lines without the first, those of the files, and the last."""
    nets = make_nets()
    graphs = [f"graph {name} {batch} f0" for name in make_graphs(nets, 1, True) for batch in (1, 2)]
    lines = [*facts_of(nets, True), *graphs, "file f0 12 " + "0123456789abcdef" * 4]
    cuda = [line for line in lines if line != "target cpu"] + list(CUDA)
    return ["\n".join(each).encode() for each in (lines, cuda, facts_of(nets, False), lines[:5])]


def bundles() -> list[bytes]:
    """A manifest and its files f0, f1, f2, each after its length, then a tuning.txt."""
    found = []
    for scale in (1, 2):
        nets = make_nets()
        renamed = {"alphas_cumprod.f64": "f1", "null_context.f32": "f2", "context.loud.f32": "f2", "weights.bin": "f0"}
        lines = [*facts_of(nets, True), *(f"graph {name} {scale} f0" for name in make_graphs(nets, 1, True))]
        text = "\n".join(" ".join(renamed.get(word, word) for word in line.split(" ")) for line in lines)
        files = (b"weights", nets.abar.astype("<f8").tobytes(), (scale * null_context()).tobytes())
        packed = b"".join(len(data).to_bytes(2, "big") + data for data in files)
        found.append(text.encode() + b"\0" + packed + b"\0\0rlsd-tuning 1\ndevice a device\nbundle x\nbatch 1 2.5\n")
    return found


def main() -> None:
    rng = random.Random(0)
    inputs = {"manifest": manifests(), "loader": bundles(), "weights": list(make_graphs(make_nets(), 1, True).values())}
    inputs["calls"] = [rng.randbytes(400) for _ in range(20)]
    for target, contents in inputs.items():
        folder = Path(sys.argv[1]) / target
        folder.mkdir(parents=True, exist_ok=True)
        for i, content in enumerate(contents):
            (folder / f"seed-{i}").write_bytes(content)


if __name__ == "__main__":
    main()
