"""Kernel-level cases of the native core, each checked against its plain definition before it is timed.

    pytest bench/test_kernels.py --benchmark-enable --benchmark-only

Groups put the core beside NumPy (repulsion, random numbers) and beside ONNX Runtime's own operators (GroupNorm+SiLU,
upsampling folded into its convolution).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from rlsd.engine import library_path, normal, reference, repulsion

rng = np.random.default_rng(0)


@pytest.mark.parametrize("n, d", [(4, 128), (64, 128), (64, 384), (512, 384), (8, 16384)])
@pytest.mark.parametrize("who", ["core", "numpy"])
def test_repulsion(benchmark: Any, who: str, n: int, d: int) -> None:
    benchmark.group = f"repulsion N={n} D={d}"
    phi = rng.standard_normal((n, d)).astype(np.float32)
    if n * n * d < 1 << 25:
        assert np.allclose(repulsion(phi)[0], reference.repulsion(phi.astype(float), 0, 0, 0), rtol=1e-4, atol=1e-6)
    benchmark((lambda: repulsion(phi)) if who == "core" else (lambda: numpy_repulsion(phi)))


def numpy_repulsion(phi: np.ndarray) -> np.ndarray:
    """The Gram form in float32, as a plain NumPy user would write it: fast, and wrong for particles that are close."""
    square = (phi**2).sum(1)
    d2 = np.maximum(square[:, None] + square[None] - 2 * phi @ phi.T, 0)
    n = len(phi)
    others = np.sort(np.sqrt(d2) + np.diag(np.full(n, np.inf, np.float32)), 1)
    h = others[:, (n - 2) // 2] ** 2 / np.float32(np.log(max(n - 1, 2)))
    k = np.exp(-d2 / h[:, None]) * (1 - np.eye(n, dtype=np.float32))
    weight = 2 * k / h[:, None]
    return (weight.sum(1, keepdims=True) * phi - weight @ phi) / k.sum(1, keepdims=True)


@pytest.mark.parametrize("count", [256, 16384])
@pytest.mark.parametrize("who", ["core", "numpy"])
def test_normal_numbers(benchmark: Any, who: str, count: int) -> None:
    benchmark.group = f"normal numbers {count}"
    assert abs(normal(0, 0, 0, 0, 16384).std() - 1) < 0.02
    generator = np.random.Generator(np.random.Philox(0))
    draw = (
        (lambda: normal(0, 0, 0, 0, count)) if who == "core" else (lambda: generator.standard_normal(count, np.float32))
    )
    benchmark(draw)


def session(nodes: list, weights: dict[str, np.ndarray], x: np.ndarray, y: tuple[int, ...]) -> Callable[[], np.ndarray]:
    """The ONNX graph x -> y on one thread, with the core's operators."""
    graph = helper.make_graph(
        nodes, "case",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("rlsd", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library_path()))
    run = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: run.run(None, {"x": x})[0]


@pytest.mark.parametrize("shape", [(2, 16, 32, 32), (8, 64, 16, 16)])
@pytest.mark.parametrize("who", ["core", "onnxruntime"])
def test_group_norm_silu(benchmark: Any, who: str, shape: tuple[int, ...]) -> None:
    benchmark.group = f"GroupNorm+SiLU {shape}"
    x = rng.standard_normal(shape).astype(np.float32)
    weights = {name: rng.standard_normal(shape[1]).astype(np.float32) for name in ("w", "b")}
    fused = session(
        [helper.make_node("GroupNorm", ["x", "w", "b"], ["y"], domain="rlsd", groups=8, epsilon=1e-5, silu=1)],
        weights, x, shape,
    )  # fmt: skip
    plain = session(
        [
            helper.make_node("GroupNormalization", ["x", "w", "b"], ["n"], num_groups=8, epsilon=1e-5),
            helper.make_node("Sigmoid", ["n"], ["s"]),
            helper.make_node("Mul", ["n", "s"], ["y"]),
        ],
        weights, x, shape,
    )  # fmt: skip
    assert np.allclose(fused(), plain(), atol=1e-5)
    benchmark(fused if who == "core" else plain)


@pytest.mark.parametrize("who", ["core", "onnxruntime"])
def test_upsampling_convolution(benchmark: Any, who: str) -> None:
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution, 32 channels to 32 x 32, batch 2."""
    benchmark.group = "upsampling + 3x3 convolution"
    x = rng.standard_normal((2, 32, 16, 16)).astype(np.float32)
    kernel = rng.standard_normal((32, 32, 3, 3)).astype(np.float32) / 17
    rows = {
        1: [kernel[:, :, 0], kernel[:, :, 1] + kernel[:, :, 2]],
        0: [kernel[:, :, 0] + kernel[:, :, 1], kernel[:, :, 2]],
    }
    phases = []
    for a in (0, 1):
        row = np.stack(rows[a], 2)
        columns = {1: [row[..., 0], row[..., 1] + row[..., 2]], 0: [row[..., 0] + row[..., 1], row[..., 2]]}
        phases += [np.stack(columns[b], 3) for b in (0, 1)]
    folded = session(
        [
            helper.make_node("Conv", ["x", "k"], ["p"], kernel_shape=[2, 2], pads=[1, 1, 1, 1]),
            helper.make_node("Interleave", ["p"], ["y"], domain="rlsd"),
        ],
        {"k": np.stack(phases, 1).reshape(128, 32, 2, 2)}, x, (2, 32, 32, 32),
    )  # fmt: skip
    plain = session(
        [
            helper.make_node(
                "Resize", ["x", "", "scales"], ["u"], mode="nearest", coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            ),
            helper.make_node("Conv", ["u", "k"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        ],
        {"k": kernel, "scales": np.array([1, 1, 2, 2], np.float32)}, x, (2, 32, 32, 32),
    )  # fmt: skip
    assert np.allclose(folded(), plain(), atol=1e-4)
    benchmark(folded if who == "core" else plain)
