"""The operators of graphs for CUDA, over the stand-in for the driver: each is its definition, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx")
from device_case import difference, fake_fixture  # noqa: F401
from device_nodes import bundle_of, features_graph, graph_of_all, run
from kernel_watch import watched
from onnx import helper
from tiny import LATENT

from rlsd.engine import Engine, RlsdError, Status


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_every_operator_is_its_definition(fake, monkeypatch, tmp_path, kind):
    graph = graph_of_all(kind)
    bundle = bundle_of(tmp_path, features_graph(graph.nodes, graph.constants, graph.wanted))
    widths, plain = set(), fake._run

    def watch(known, line, grid, values):
        names = [word.split(":")[0] for word in line.split() if ":" in word]
        given = {name: int.from_bytes(raw[:4], "little") for name, raw in zip(names, values)}
        if "group_norm" in line.split()[1] and given.get("width") not in (None, given.get("channels")):
            widths.add(given["width"])
        plain(known, line, grid, values)

    monkeypatch.setattr(fake, "_run", watch)
    with Engine(bundle) as engine, watched(bounds=False):
        found = run(engine, graph.wanted)
    for name, want in graph.wanted.items():
        assert difference(found[name], want.astype(np.float32)) < 2e-3, name
    bytes_of_parts = [width * np.dtype(kind).itemsize for width in widths]  # of a pixel, for one program each
    assert bytes_of_parts and not any(size % 16 for size in bytes_of_parts)  # what the kernels were promised
    ending = {np.float16: "fp16", np.float32: "fp32"}[kind]
    launched = {line.split()[1] for line in fake.log() if line.startswith("cuLaunchKernel")}
    assert len(launched) == (26 if kind == np.float16 else 18) and all(name.endswith(ending) for name in launched)


X, WEIGHTS, STATISTICS = (2, 3, 2, 32), [(32,), (32,)], [(2, 8), (2, 8)]
REFUSED = [
    ("GroupNormNhwc", [(32,), *WEIGHTS], 8, r"x has shape \[32\], \[batch, ..., channels\] is needed"),
    ("GroupNormNhwc", [(), *WEIGHTS], 8, r"x has shape \[\], "),
    ("GroupNormNhwc", [(2, 0, 32), *WEIGHTS], 8, r"x has shape \[2, 0, 32\], .* not empty"),
    ("GroupNormNhwc", [(2, 3, 24), *WEIGHTS], 8, r"x has shape \[2, 3, 24\], .* a multiple of 16"),
    ("GroupNormNhwc", [X, *WEIGHTS], 0, "0 groups of 32 channels are not possible"),
    ("GroupNormNhwc", [X, *WEIGHTS], 5, "5 groups of 32 channels are not possible"),
    ("GroupNormNhwc", [(1, 2, 144), *WEIGHTS], 1, "1 groups of 144 channels are not possible.* 128 at most"),
    ("GroupNormNhwc", [(1, 1, 1056), *WEIGHTS], 16, "groups of 66 channels are not possible: a multiple of 4 of 128"),
    ("GroupNormNhwc", [(32769, 1, 16), (16,), (16,)], 16, "a batch of 32769 is too large"),
    ("GroupNormNhwc", [X, (16,), (32,)], 8, r"input 1 has shape \[16\], \[32\] is needed"),
    ("GroupNormNhwc", [X, (32,), (1, 32)], 8, r"input 2 has shape \[1, 32\], \[32\] is needed"),
    ("GroupNormNhwc", [X, *WEIGHTS, (32,)], 8, r"x_bias has shape \[32\], x \[2, 3, 2, 32\]"),
    ("GroupNormNhwc", [X, *WEIGHTS, ()], 8, r"x_bias has shape \[\]"),
    ("GroupNormNhwc", [X, *WEIGHTS, (2, 1, 2, 16)], 8, "x_bias has shape"),
    ("GroupNormNhwc", [(4, 3, 2, 32), *WEIGHTS, (2, 1, 1, 32)], 8, "x_bias has shape"),
    ("AddGroupNormNhwc", [X, (2, 6, 32), *WEIGHTS], 8, r"input 1 has shape \[2, 6, 32\], \[2, 3, 2, 32\] is needed"),
    ("AddGroupNormNhwc", [X, (2, 1, 1, 32), *WEIGHTS], 8, "input 1 has shape"),
    ("AddGroupNormNhwc", [X, X, *WEIGHTS, X], 8, "x_bias has shape"),
    ("GroupNormPullNhwc", [X, X, *STATISTICS, *WEIGHTS, X, (1, 1, 1, 16)], 8, "x_bias has shape"),
    ("GroupNormPullNhwc", [(2, 3, 1, 32), X, *STATISTICS, *WEIGHTS], 8, r"input 0 has shape \[2, 3, 1, 32\]"),
    ("GroupNormPullNhwc", [X, X, (2, 4), (2, 8), *WEIGHTS], 8, r"input 2 has shape \[2, 4\], \[2, 8\] is needed"),
    ("GroupNormPullNhwc", [X, X, (2, 8), (2, 4), *WEIGHTS], 8, r"input 3 has shape \[2, 4\], \[2, 8\] is needed"),
    ("GroupNormPullNhwc", [X, X, *STATISTICS, (16,), (32,)], 8, r"input 4 has shape \[16\], \[32\] is needed"),
    ("GroupNormPullNhwc", [X, X, *STATISTICS, (32,), (16,)], 8, r"input 5 has shape \[16\], \[32\] is needed"),
    ("GroupNormPullNhwc", [X, X, *STATISTICS, *WEIGHTS, (2, 6, 32)], 8, r"input 6 has shape \[2, 6, 32\]"),
    ("GroupNormPullNhwc", [(1, 1, 96)] * 2 + [(1, 1)] * 2 + [(96,)] * 2, 1, "no kernel 'group_norm_pull_sums_128_fp32"),
    ("GroupNormPullPhases", [(1, 3, 4, 32)] * 2 + [(1, 8)] * 2 + WEIGHTS, 8, r"x has .*, \[B, 2 H, 2 W, C\] is needed"),
    ("GroupNormPullPhases", [(1, 4, 3, 32)] * 2 + [(1, 8)] * 2 + WEIGHTS, 8, "2 H, 2 W, C"),
    ("GroupNormPullPhases", [(1, 4, 32)] * 2 + [(1, 8)] * 2 + WEIGHTS, 8, "2 H, 2 W, C"),
    ("BiasResidual", [(32,), (32,)], None, r"x has shape \[32\]"),
    ("BiasResidual", [X, (16,)], None, r"input 1 has shape \[16\], \[32\] is needed"),
    ("BiasResidual", [X, (32,), (2, 1, 1, 32)], None, r"input 2 has shape \[2, 1, 1, 32\], \[2, 3, 2, 32\] is needed"),
    ("InterleaveNhwc", [(1, 3, 3, 64), (64,)], None, r"input 1 has shape \[64\], \[16\] is needed"),
    ("InterleaveNhwc", [(3, 3, 64)], None, r"phases has shape \[3, 3, 64\], \[B, H \+ 1, W \+ 1, 4 C\] is needed"),
    ("InterleaveNhwc", [(1, 3, 3, 32)], None, "with C a multiple of 16"),
    ("InterleaveNhwc", [(0, 3, 3, 64)], None, "phases has shape"),
    ("InterleaveNhwc", [(1, 1, 3, 64)], None, "phases has shape"),
    ("InterleaveNhwc", [(1, 3, 1, 64)], None, "phases has shape"),
    ("InterleavePullNhwc", [(4, 4, 16)], None, r"image has shape \[4, 4, 16\], \[B, 2 H, 2 W, C\] is needed"),
    ("InterleavePullNhwc", [(1, 3, 4, 16)], None, "image has shape"),
    ("InterleavePullNhwc", [(1, 4, 3, 16)], None, "image has shape"),
    ("InterleavePullNhwc", [(1, 4, 4, 8)], None, "a multiple of 16"),
    ("AddLayerNorm", [(2, 24), (24,), (24,), (24,)], None, r"x has shape \[2, 24\]"),
    ("AddLayerNorm", [(1, 2064), (2064,), (2064,), (2064,)], None, "with more than 2048 channels"),
    ("AddLayerNorm", [(2, 32), (32,), (32,), (16,)], None, r"input 3 has shape \[16\], \[32\] is needed"),
    ("AddLayerNorm", [(2, 32), (32,), (32,), (32,), (1, 32)], None, "input 4 has shape"),
    ("LayerNormPull", [(2, 24), (2, 24), (24,)], None, r"x has shape \[2, 24\]"),
    ("LayerNormPull", [(1, 1040), (1, 1040), (1040,)], None, "with more than 1024 channels"),
    ("LayerNormPull", [(1, 32), (2, 32), (32,)], None, r"input 0 has shape \[1, 32\], \[2, 32\] is needed"),
    ("LayerNormPull", [(2, 32), (2, 32), (32,), (2, 16)], None, "input 3 has shape"),
    ("GeluPull", [(3, 5), (3, 5)], None, r"x has shape \[3, 5\], a multiple of 16 values is needed"),
    ("GeluPull", [(2, 8), (4, 8)], None, "input 0 has shape"),
    ("GeluPull", [(0, 16), (0, 16)], None, "x has shape"),
    ("SoftmaxPull", [(5,), (5,)], None, r"y has shape \[5\], \[..., columns\] is needed"),
    ("SoftmaxPull", [(2, 5), (2, 6)], None, "input 0 has shape"),
    ("NarrowConv", [(3, 4, 5), (32, 16)], None, r"x has shape \[3, 4, 5\], kernel \[32, 16\], four axes and two"),
    ("NarrowConv", [(1, 0, 5, 3), (32, 16)], None, "none of them empty"),
    ("NarrowConv", [(1, 4, 5, 3), (32, 1, 16)], None, "four axes and two"),
    ("NarrowConv", [(1, 4, 5, 8), (64, 16)], None, "8 channels are not between 1 and 7"),
    ("NarrowConv", [(1, 4, 5, 3), (32, 24)], None, r"the kernel has shape \[32, 24\], a multiple of 16"),
    ("NarrowConv", [(1, 4, 5, 3), (64, 16)], None, r"input 1 has shape \[64, 16\], \[32, 16\] is needed"),
    ("GroupNormTaps", [X, *WEIGHTS, (32, 32)], 8, "0 channels are not between 1 and 7"),
    ("GroupNormTaps", [X, *WEIGHTS, (32, 32)], {"groups": 8, "planes": 4}, r"input 3 has .*, \[32, 64\] is needed"),
    ("GroupNormTaps", [(2, 3, 32), *WEIGHTS, (32, 32)], {"groups": 8, "planes": 3}, r"\[B, H, W, C\] is needed"),
    ("AddGroupNormTaps", [X, (2, 6, 32), *WEIGHTS, (32, 32)], {"groups": 8, "planes": 3}, "the total is not among"),
    ("SumTaps", [(2, 9, 4), (1,)], None, r"taps has shape \[2, 9, 4\], bias \[1\], \[B, 9 P, H, W\] and \[P\]"),
    ("SumTaps", [(2, 9, 4, 5), (2,)], None, "are needed"),
    ("SumTaps", [(2, 0, 4, 5), (0,)], None, "are needed"),
    ("SumTaps", [(2, 9, 4, 5), ()], None, "are needed"),
]  # fmt: skip


@pytest.mark.parametrize("op, shapes, groups, words", REFUSED)
def test_wrong_tensors_are_named_and_the_engine_goes_on(fake, tmp_path, op, shapes, groups, words):
    names = [f"input{i}" for i in range(len(shapes))]
    constants = {name: np.zeros(shape, np.float32) for name, shape in zip(names, shapes)}
    attributes = groups if isinstance(groups, dict) else {} if groups is None else {"groups": groups}
    node = helper.make_node(op, names, ["y"], domain="rlsd", **attributes)
    y = {"y": np.zeros(1, np.float32)}
    with Engine(bundle_of(tmp_path, features_graph([node], constants, y))) as engine:
        with pytest.raises(RlsdError, match=f"{op}.*{words}") as raised:
            run(engine, y)
        assert raised.value.status == Status.RUNTIME_ERROR
        z = np.zeros((1, *LATENT), np.float32)
        assert np.isfinite(engine.evaluate("decoder", ["image"], z=z)["image"]).all()
