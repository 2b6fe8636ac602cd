"""The operators of ONNX domain "rlsd" in librlsd, run by the onnxruntime package, against float64."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper  # noqa: E402

from rlsd.engine import library_path  # noqa: E402

Array = np.ndarray
EPSILON = 1e-5
INPUTS = {"GroupNorm": ["x", "weight", "bias"], "GroupNormPull": ["cotangent", "x", "mean", "rstd", "weight", "bias"]}
OUTPUTS = {"GroupNorm": ["y", "mean", "rstd"], "GroupNormPull": ["x_cotangent"]}


def model(nodes: list, inputs: list[str], outputs: list[str]) -> bytes:
    """A graph of float32 tensors of any shape."""
    taken, given = ([helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ns] for ns in (inputs, outputs))
    return serialized(helper.make_graph(nodes, "test", taken, given))


def serialized(graph: Any) -> bytes:
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("rlsd", 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=8).SerializeToString()


def open_session(graph: bytes) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@cache
def session(op: str, groups: int, silu: int, outputs: tuple[str, ...] = ()) -> Any:
    attributes: dict[str, Any] = {"epsilon": EPSILON} if op == "GroupNorm" else {}
    names = list(outputs or OUTPUTS[op])
    node = helper.make_node(op, INPUTS[op], names, domain="rlsd", groups=groups, silu=silu, **attributes)
    return open_session(model([node], INPUTS[op], names))


@dataclass(frozen=True)
class Case:
    """Inputs of both operators for x of `shape` [batch, channels, ...]."""

    x: Array
    cotangent: Array
    weight: Array
    bias: Array
    groups: int
    silu: int

    def forward(self) -> tuple[Array, Array, Array]:
        run = session("GroupNorm", self.groups, self.silu).run
        y, mean, rstd = run(None, {"x": self.x, "weight": self.weight, "bias": self.bias})
        return y, mean, rstd

    def pull(self) -> Array:
        _, mean, rstd = self.forward()
        feed = dict(cotangent=self.cotangent, x=self.x, mean=mean, rstd=rstd, weight=self.weight, bias=self.bias)
        return session("GroupNormPull", self.groups, self.silu).run(None, feed)[0]

    def sample(self, i: int) -> "Case":
        x, cotangent = self.x[i : i + 1].copy(), self.cotangent[i : i + 1].copy()
        return Case(x, cotangent, self.weight, self.bias, self.groups, self.silu)


def case(shape: tuple[int, ...], groups: int, silu: int, offset: float = 0.0, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    x, cotangent = (rng.standard_normal(shape) for _ in range(2))
    weight, bias = 1 + 0.5 * rng.standard_normal(shape[1]), 0.5 * rng.standard_normal(shape[1])
    a, b, c, d = (np.asarray(v, np.float32) for v in (x + offset, cotangent, weight, bias))
    return Case(a, b, c, d, groups, silu)


def sigmoid(u: Any) -> Array:
    e = np.exp(-np.abs(u))
    return np.where(u >= 0, 1, e) / (1 + e)


def reference(c: Case) -> tuple[Array, Array, Array, Array]:
    """y, mean, rstd and x_cotangent in float64, by the textbook formulas."""
    grouped = (c.x.shape[0], c.groups, -1)
    per_channel = (1, -1) + (1,) * (c.x.ndim - 2)
    x, cotangent, weight, bias = (a.astype(np.float64) for a in (c.x, c.cotangent, c.weight, c.bias))
    weight, bias = weight.reshape(per_channel), bias.reshape(per_channel)
    g = x.reshape(grouped)
    mean, rstd = g.mean(-1, keepdims=True), 1 / np.sqrt(g.var(-1, keepdims=True) + np.float64(np.float32(EPSILON)))
    normal = (g - mean) * rstd
    u = weight * normal.reshape(x.shape) + bias
    y, slope = u, np.ones_like(u)
    if c.silu:
        s = sigmoid(u)
        y, slope = u * s, s + u * s * sigmoid(-u)
    d = (cotangent * slope * weight).reshape(grouped)
    pulled = rstd * (d - d.mean(-1, keepdims=True) - normal * (d * normal).mean(-1, keepdims=True))
    return y, mean[..., 0], rstd[..., 0], pulled.reshape(x.shape)


def error(value: Array, exact: Array) -> float:
    """The largest error, relative to the largest entry."""
    assert value.shape == exact.shape and value.dtype == np.float32
    return float(np.abs(value - exact).max() / np.abs(exact).max())


SHAPES = [
    pytest.param((2, 12, 5, 7), 3, id="odd"),
    pytest.param((1, 32, 32, 32), 8, id="even"),
    pytest.param((3, 6, 1, 1), 2, id="one pixel"),
    pytest.param((2, 8), 2, id="no pixels"),
    pytest.param((1, 5, 17), 5, id="instance"),
    pytest.param((2, 7, 3, 3, 2), 1, id="layer, volumes"),
    pytest.param((1, 4, 131, 97), 2, id="long rows"),
]


@pytest.mark.parametrize("silu", [0, 1])
@pytest.mark.parametrize("shape, groups", SHAPES)
def test_against_float64(shape: tuple[int, ...], groups: int, silu: int) -> None:
    c = case(shape, groups, silu)
    exact_y, exact_mean, exact_rstd, exact_pull = reference(c)
    y, mean, rstd = c.forward()
    assert error(y, exact_y) < 1e-6
    np.testing.assert_allclose(mean, exact_mean, rtol=2e-7, atol=2e-7)
    np.testing.assert_allclose(rstd, exact_rstd, rtol=5e-7)
    assert error(c.pull(), exact_pull) < 2e-6


def test_the_reference_is_the_derivative() -> None:
    c = case((1, 6, 3, 2), 2, 1)
    direction = np.random.default_rng(7).standard_normal(c.x.shape)
    h = 1e-6

    def loss(sign: int) -> float:
        moved = Case(c.x + sign * h * direction, c.cotangent, c.weight, c.bias, c.groups, c.silu)  # float64
        return float((c.cotangent * reference(moved)[0]).sum())

    assert (reference(c)[3] * direction).sum() == pytest.approx((loss(1) - loss(-1)) / (2 * h), rel=1e-7)


@pytest.mark.parametrize("offset", [30.0, 1e3, -1e4])
def test_large_offsets(offset: float) -> None:
    """y is as good as without; the pull-back knows the mean in float32 only, half a unit in its last place."""
    c = case((2, 16, 33, 31), 4, 1, offset)
    y, mean, rstd = c.forward()
    exact_y, exact_mean, exact_rstd, exact_pull = reference(c)
    assert error(y, exact_y) < 1e-6
    np.testing.assert_allclose(mean, exact_mean, rtol=1e-7)
    np.testing.assert_allclose(rstd, exact_rstd, rtol=5e-7)
    assert error(c.pull(), exact_pull) < 2e-6 + np.spacing(np.float32(abs(offset)))


def test_a_constant_group_gives_the_bias() -> None:
    c = case((1, 4, 5, 5), 2, 0)
    flat = Case(np.full_like(c.x, 1234.567), c.cotangent, c.weight, c.bias, 2, 0)
    y, mean, rstd = flat.forward()
    np.testing.assert_array_equal(y, np.broadcast_to(c.bias[:, None, None], y.shape[1:])[None])
    np.testing.assert_array_equal(mean, np.float32(1234.567))
    np.testing.assert_allclose(rstd, 1 / np.sqrt(EPSILON), rtol=1e-6)
    assert np.isfinite(flat.pull()).all()


def test_a_constant_group_of_large_values_has_no_variance() -> None:
    """Their sum in float32 misses the mean, and what it misses is no deviation."""
    c = case((1, 4, 33, 31), 2, 0)
    for value in (1e5 / 3, 1e7 / 3):
        flat = Case(np.full_like(c.x, value), c.cotangent, c.weight, c.bias, 2, 0)
        np.testing.assert_allclose(flat.forward()[2], 1 / np.sqrt(EPSILON), rtol=1e-6)


def test_silu_from_one_end_to_the_other() -> None:
    """Weight 0 and bias u make u the pre-activation."""
    u = np.concatenate([np.linspace(-100, 100, 20011), np.linspace(-1e4, 1e4, 1001), [0, 1e-30, -1e-30, np.nan]])
    u = u.astype(np.float32)
    zero = np.zeros_like(u)
    y = session("GroupNorm", 1, 1).run(["y"], {"x": zero[None], "weight": zero, "bias": u})[0][0]
    np.testing.assert_array_equal(y[u < -87], 0)
    normal = u >= -87
    np.testing.assert_allclose(y[normal], (u * sigmoid(u.astype(np.float64)))[normal], rtol=3e-7, atol=0)
    assert np.isnan(y[-1])


@pytest.mark.parametrize("u", [-1e4, -88.0, -87.0, -20.0, -1.278, 0.0, 1.0, 20.0, 88.0, 1e4])
def test_the_slope_of_silu(u: float) -> None:
    """Mean 0, rstd 1 and weight 1 make u = x; where all x are equal, only the slope tells elements apart."""
    x = np.full((1, 4096), u, np.float32)
    cotangent = np.zeros_like(x)
    cotangent[0, :2] = 1, -1
    zero, one = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
    feed = dict(cotangent=cotangent, x=x, mean=zero, rstd=one, weight=np.ones_like(x[0]), bias=np.zeros_like(x[0]))
    pulled = session("GroupNormPull", 1, 1).run(None, feed)[0][0].astype(np.float64)
    exact = np.float64(x[0, 0])
    slope = sigmoid(exact) + exact * sigmoid(exact) * sigmoid(-exact)
    assert (pulled[0] - pulled[1]) / 2 == pytest.approx(slope, rel=1e-6, abs=2e-7)
    assert np.isfinite(pulled).all()


@pytest.mark.parametrize("silu", [0, 1])
def test_a_sample_does_not_depend_on_its_batch(silu: int) -> None:
    c = case((5, 10, 9, 7), 5, silu)
    y, mean, rstd = c.forward()
    pulled = c.pull()
    for i in range(5):
        alone = c.sample(i)
        for one, many in zip((*alone.forward(), alone.pull()), (y, mean, rstd, pulled)):
            assert one.tobytes() == many[i : i + 1].tobytes()


def test_not_a_number_stays_in_its_group() -> None:
    c = case((2, 4, 3, 3), 2, 1)
    c.x[0, 1, 2, 2] = np.nan
    for out in (c.forward()[0], c.pull()):
        assert np.isnan(out[0, :2]).all() and np.isfinite(out[0, 2:]).all() and np.isfinite(out[1]).all()


def test_every_output_element_is_written() -> None:
    c = case((2, 6, 5, 3), 3, 1)
    _, mean, rstd = c.forward()
    feed = dict(x=c.x, cotangent=c.cotangent, weight=c.weight, bias=c.bias, mean=mean, rstd=rstd)
    for op in INPUTS:
        binding = session(op, 3, 1).io_binding()
        poisoned = {  # kept: old versions use this memory and do not
            name: np.full((2, 3) if name in ("mean", "rstd") else c.x.shape, np.nan, np.float32) for name in OUTPUTS[op]
        }
        for name in INPUTS[op]:
            binding.bind_cpu_input(name, feed[name])
        for name, memory in poisoned.items():
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(memory))
        session(op, 3, 1).run_with_iobinding(binding)
        assert all(np.isfinite(out).all() for out in binding.copy_outputs_to_cpu())


def test_statistics_may_be_left_out() -> None:
    c = case((1, 4, 3, 5), 2, 1)
    feed = {"x": c.x, "weight": c.weight, "bias": c.bias}
    only = session("GroupNorm", 2, 1, ("y",)).run(None, feed)
    nodes = [helper.make_node("GroupNorm", INPUTS["GroupNorm"], ["y", "", "rstd"], domain="rlsd", groups=2, silu=1)]
    gap = open_session(model(nodes, INPUTS["GroupNorm"], ["y", "rstd"])).run(None, feed)
    y, _, rstd = c.forward()
    assert only[0].tobytes() == gap[0].tobytes() == y.tobytes()
    assert gap[1].tobytes() == rstd.tobytes()


def test_inputs_that_are_needed_later_are_kept() -> None:
    """x and the cotangent may be overwritten only where nothing else reads them."""
    nodes = [
        helper.make_node("Neg", ["x0"], ["x"]),
        helper.make_node("GroupNorm", INPUTS["GroupNorm"], ["y", "mean", "rstd"], domain="rlsd", groups=2, silu=1),
        helper.make_node("GroupNormPull", ["y", *INPUTS["GroupNormPull"][1:]], ["p"], domain="rlsd", groups=2, silu=1),
        helper.make_node("Add", ["x", "p"], ["sum"]),
    ]
    c = case((2, 4, 5, 5), 2, 1)
    graph = open_session(model(nodes, ["x0", "weight", "bias"], ["sum"]))
    total = graph.run(None, {"x0": -c.x, "weight": c.weight, "bias": c.bias})[0]
    again = Case(c.x, c.forward()[0], c.weight, c.bias, 2, 1)
    np.testing.assert_array_equal(total, c.x + again.pull())


def test_one_session_in_several_threads() -> None:
    c = case((2, 32, 24, 24), 8, 1)
    wanted = c.forward()[0].tobytes(), c.pull().tobytes()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: (c.forward()[0].tobytes(), c.pull().tobytes()), range(64)))
    assert set(results) == {wanted}


def test_static_shapes_are_inferred() -> None:
    """The operators tell ONNX Runtime the shape of their first output, so that it can plan memory."""
    shaped = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6, 4, 3])]
    shaped += [helper.make_tensor_value_info(n, TensorProto.FLOAT, [6]) for n in ("weight", "bias")]
    node = helper.make_node("GroupNorm", INPUTS["GroupNorm"], ["y"], domain="rlsd", groups=2)
    graph = helper.make_graph([node], "test", shaped, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    assert open_session(serialized(graph)).get_outputs()[0].shape == [2, 6, 4, 3]
    shaped[0] = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6, 4, 3])  # unknown: nothing is said
    graph = helper.make_graph([node], "test", shaped, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    assert -1 not in open_session(serialized(graph)).get_outputs()[0].shape


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": (6,)}, r"GroupNorm: x has shape \[6\], at least \[batch, channels\] is needed"),
        ({"x": (1, 5, 2)}, "GroupNorm: 2 groups do not divide the 5 channels of x"),
        ({"x": (1, 0, 2)}, "GroupNorm: 2 groups do not divide the 0 channels of x"),
        ({"weight": (5,)}, r"GroupNorm: weight has shape \[5\], \[6\] is needed"),
        ({"bias": (1, 6)}, r"GroupNorm: bias has shape \[1, 6\], \[6\] is needed"),
    ],
)
def test_wrong_shapes_are_named(change: dict[str, tuple[int, ...]], message: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"x": (2, 6, 3), "weight": (6,), "bias": (6,)} | change
    feed = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(Exception, match=message):
        session("GroupNorm", 2, 0).run(None, feed)


@pytest.mark.parametrize("name", ["cotangent", "mean", "rstd", "weight", "bias"])
def test_wrong_shapes_of_the_pull_back_are_named(name: str) -> None:
    shapes = dict(cotangent=(2, 6, 3), x=(2, 6, 3), mean=(2, 2), rstd=(2, 2), weight=(6,), bias=(6,))
    shapes[name] = (2, 1)
    feed = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    with pytest.raises(Exception, match=rf"GroupNormPull: {name} has shape \[2, 1\], \[.*\] is needed"):
        session("GroupNormPull", 2, 1).run(None, feed)


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({}, "GroupNorm: groups"),
        ({"groups": 0}, "GroupNorm: groups is 0, at least 1 is needed"),
        ({"groups": 2, "epsilon": -1.0}, "GroupNorm: epsilon is -1.0*, at least 0 is needed"),
        ({"groups": 2, "epsilon": float("nan")}, "GroupNorm: epsilon is nan, at least 0 is needed"),
    ],
)
def test_wrong_attributes_are_named(attributes: dict[str, Any], message: str) -> None:
    node = helper.make_node("GroupNorm", INPUTS["GroupNorm"], ["y"], domain="rlsd", **attributes)
    with pytest.raises(Exception, match=message):
        open_session(model([node], INPUTS["GroupNorm"], ["y"]))


def test_half_precision_weights_from_memory_are_folded(tmp_path: Path) -> None:
    """What bundles rely on: external weights are read from memory, and their Cast is done at load."""
    weights = np.random.default_rng(0).standard_normal((8, 4, 3, 3)).astype(np.float16)
    stored = TensorProto(name="half", dims=weights.shape, data_type=TensorProto.FLOAT16)
    stored.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "weights.bin", "offset": "64", "length": str(weights.nbytes)}.items():
        stored.external_data.add(key=key, value=value)
    nodes = [
        helper.make_node("Cast", ["half"], ["full"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "full"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 5, 5])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 3, 3])
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    blob = bytes(64) + weights.tobytes()
    if not hasattr(options, "add_external_initializers_from_files_in_memory"):
        pytest.skip("this ONNX Runtime has it in C alone")
    options.add_external_initializers_from_files_in_memory(["weights.bin"], [blob], [len(blob)])
    graph = serialized(helper.make_graph(nodes, "test", [x], [y], [stored]))
    opened = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "Conv" in kinds and "Cast" not in kinds
    image = np.zeros((1, 4, 5, 5), np.float32)
    image[0, :, 2, 2] = 1
    exact = weights[:, :, ::-1, ::-1].astype(np.float32).sum(1)
    np.testing.assert_allclose(opened.run(None, {"x": image})[0][0], exact, rtol=1e-6, atol=1e-6)


def interleaving(op: str, x: Array) -> Array:
    return open_session(model([helper.make_node(op, ["x"], ["y"], domain="rlsd")], ["x"], ["y"])).run(None, {"x": x})[0]


@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (3, 8, 4, 6), (2, 12, 9, 5)])
def test_interleave_is_a_cropped_pixel_shuffle_and_has_its_adjoint(shape: tuple[int, ...]) -> None:
    b, c, h, w = shape
    rng = np.random.default_rng(c)
    phases = rng.standard_normal(shape).astype(np.float32)
    image = interleaving("Interleave", phases)
    shuffled = phases.reshape(b, c // 4, 2, 2, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)
    np.testing.assert_array_equal(image, shuffled[:, :, 1:-1, 1:-1])
    cotangent = rng.standard_normal(image.shape).astype(np.float32)
    pulled = interleaving("InterleavePull", cotangent)
    assert np.isclose((image.astype(float) * cotangent).sum(), (phases.astype(float) * pulled).sum(), rtol=1e-6)


def test_the_pull_of_interleave_writes_every_element() -> None:
    """What was cropped gets zeros, whatever lay in the output's memory before."""
    cotangent = np.random.default_rng(0).standard_normal((2, 3, 6, 8)).astype(np.float32)
    padded = np.pad(cotangent, ((0, 0), (0, 0), (1, 1), (1, 1)))
    wanted = padded.reshape(2, 3, 4, 2, 5, 2).transpose(0, 1, 3, 5, 2, 4).reshape(2, 12, 4, 5)
    graph = open_session(model([helper.make_node("InterleavePull", ["x"], ["y"], domain="rlsd")], ["x"], ["y"]))
    binding = graph.io_binding()
    binding.bind_cpu_input("x", cotangent)
    memory = np.full_like(wanted, np.nan)  # kept, as above
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(memory))
    graph.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], wanted)


@pytest.mark.parametrize(
    "op, shape",
    [
        *[("Interleave", shape) for shape in [(1, 5, 3, 3), (4, 3, 3), (1, 4, 1, 3), (1, 4, 3, 1)]],
        *[("InterleavePull", shape) for shape in [(1, 2, 3, 4), (1, 2, 4, 3), (2, 4, 4), (1, 2, 0, 4), (1, 2, 4, 0)]],
    ],
)
def test_wrong_shapes_of_interleave_are_named(op: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(Exception, match=rf"{op}: .* has shape .* is needed"):
        interleaving(op, np.zeros(shape, np.float32))
