"""Tiny bundles made by hand with onnx.helper, of the networks in tiny.py.

python tests/bundle_factory.py FOLDER       writes one
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from tiny import CONTEXT, FEATURES, HIDDEN, IMAGE, LATENT, OPERATORS, C, M, Nets, P, make_nets, null_context

Array = np.ndarray


class GraphWriter:
    """One ONNX graph of float32 tensors for `batch` samples."""

    def __init__(self, nets: Nets, batch: int, external: dict[str, tuple[int, int]]):
        self.nets, self.batch, self.external = nets, batch, external
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.count = 0

    def weight(self, name: str) -> str:
        values = self.nets.weights[name]
        tensor = TensorProto(name=name, dims=values.shape, data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        offset, length = self.external[name]
        for key, value in (("location", "weights.bin"), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        self.initializers[name] = tensor
        return name

    def constant(self, values: Array) -> str:
        name = f"constant{len(self.initializers)}"
        self.initializers[name] = numpy_helper.from_array(values, name)
        return name

    def __call__(self, op: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        self.count += 1
        out = out or f"v{self.count}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def reshaped(self, x: str, shape: tuple[int, ...], out: str = "") -> str:
        return self("Reshape", x, self.constant(np.array([self.batch, *shape], np.int64)), out=out)

    def times(self, x: str, weight: str, transposed: bool = False) -> str:
        w = self.weight(weight)
        return self("MatMul", x, self("Transpose", w, perm=[1, 0]) if transposed else w)

    def act(self, x: str, out: str = "") -> str:
        return self("Identity" if self.nets.linear else "Tanh", x, out=out)

    def times_slope(self, x: str, y: str, tanh: bool = True) -> str:
        """x times the derivative of `act` where its value is y."""
        if not tanh:
            return x
        return self("Mul", x, self("Sub", self.constant(np.array(1, np.float32)), self("Mul", y, y)))

    def model(self, inputs: Mapping[str, tuple[int, ...]], outputs: Mapping[str, tuple[int, ...]]) -> bytes:
        def info(name: str, shape: tuple[int, ...]) -> Any:
            kind = TensorProto.INT64 if name == "t" else TensorProto.FLOAT
            return helper.make_tensor_value_info(name, kind, [self.batch, *shape])

        graph = helper.make_graph(
            self.nodes, "tiny", [info(*i) for i in inputs.items()], [info(*o) for o in outputs.items()],
            list(self.initializers.values()),
        )  # fmt: skip
        opset = [helper.make_opsetid("", 17)]
        return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def denoiser(g: GraphWriter) -> bytes:
    z = g.reshaped("z_t", (M,))
    hidden = g("Add", g.times(z, "W1"), g.times(g.reshaped("context", (C,)), "Wc"))
    hidden = g("Tanh", g("Add", hidden, g("Gather", g.weight("bias"), "t")))
    scaled = g("Mul", g("Gather", g.weight("slope"), "t"), z)
    eps = g("Add", g("Add", g.times(hidden, "W2"), scaled), g("Gather", g.weight("offset"), "t"))
    g.reshaped(eps, LATENT, out="eps")
    return g.model({"z_t": LATENT, "t": (), "context": CONTEXT}, {"eps": LATENT})


def decoder(g: GraphWriter) -> bytes:
    hidden = g.act(g("Add", g.times(g.reshaped("z", (M,)), "V1"), g.weight("b1")), out="hidden")
    image = g.act(g("Add", g.times(hidden, "V2"), g.weight("b2")), out="pixels")
    g.reshaped(image, IMAGE, out="image")
    return g.model({"z": LATENT}, {"image": IMAGE, "hidden": (HIDDEN,), "pixels": (P,)})


def decoder_pull(g: GraphWriter) -> bytes:
    """Takes what the decoder saved and not z; the linear one takes the cotangent alone."""
    inner = g.times_slope(g.reshaped("cotangent", (P,)), "pixels", not g.nets.linear)
    inner = g.times_slope(g.times(inner, "V2", transposed=True), "hidden", not g.nets.linear)
    g.reshaped(g.times(inner, "V1", transposed=True), LATENT, out="z_cotangent")
    saved = {} if g.nets.linear else {"hidden": (HIDDEN,), "pixels": (P,)}
    return g.model({"cotangent": IMAGE, **saved}, {"z_cotangent": LATENT})


def features(g: GraphWriter) -> bytes:
    g("Tanh", g.times(g.reshaped("image", (P,)), "F"), out="phi")
    return g.model({"image": IMAGE}, {"phi": (FEATURES,)})


def features_pull(g: GraphWriter) -> bytes:
    """Takes the image: the forward graph saves nothing."""
    phi = g("Tanh", g.times(g.reshaped("image", (P,)), "F"))
    g.reshaped(g.times(g.times_slope("cotangent", phi), "F", transposed=True), IMAGE, out="image_cotangent")
    return g.model({"image": IMAGE, "cotangent": (FEATURES,)}, {"image_cotangent": IMAGE})


def measured(g: GraphWriter, operator: str, out: str = "") -> str:
    if operator == "inpainting":
        return g("Mul", "mask", "x", out=out)
    return g.act(g("Mul", "gain", g.times(g.reshaped("x", (P,)), "A")), out=out)


def forward(g: GraphWriter, operator: str) -> bytes:
    shape, params = OPERATORS[operator]
    measured(g, operator, out="y")
    return g.model({"x": IMAGE, **params}, {"y": shape})


def loss(g: GraphWriter, operator: str) -> bytes:
    shape, params = OPERATORS[operator]
    size = int(np.prod(shape))
    f = measured(g, operator)
    residual = g("Sub", f, "y")
    squares = g.reshaped(g("Mul", residual, residual), (size,))
    mean = g("ReduceMean", squares, axes=[1], keepdims=0)
    g("Mul", mean, g.constant(np.array(0.5, np.float32)), out="loss")
    inner = g("Mul", residual, g.constant(np.array(1 / size, np.float32)))
    if operator == "inpainting":
        g("Mul", inner, "mask", out="grad")
    else:
        inner = g("Mul", g.times_slope(inner, f, not g.nets.linear), "gain")
        g.reshaped(g.times(inner, "A", transposed=True), IMAGE, out="grad")
    return g.model({"x": IMAGE, "y": shape, **params}, {"loss": (), "grad": IMAGE})


def pack_weights(nets: Nets) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The file of weights, and (offset, length) of each."""
    blob, where = b"", {}
    for name, values in nets.weights.items():
        raw = values.astype("<f4").tobytes()
        where[name] = (len(blob), len(raw))
        blob += raw + bytes(-len(raw) % 64)
    return blob, where


def manifest(facts: list[str], files: Mapping[str, bytes]) -> bytes:
    """The manifest's bytes: facts, a line for each file, the seal."""
    lines = ["rlsd-bundle 1", *facts]
    lines += [f"file {name} {len(data)} {hashlib.sha256(data).hexdigest()}" for name, data in sorted(files.items())]
    text = "".join(line + "\n" for line in lines)
    return (text + f"end {hashlib.sha256(text.encode()).hexdigest()}\n").encode()


def facts_of(nets: Nets, with_features: bool) -> list[str]:
    """Every line of the manifest that names neither a graph nor a file's digest."""
    facts = ["name tiny", "producer bundle_factory", "target cpu", "precision fp32", f"latent {words(LATENT)}"]
    facts.append(f"image {words(IMAGE)}")
    facts += ["context 2 3", f"timesteps {len(nets.abar)}", "steps_offset 1", "alphas_cumprod alphas_cumprod.f64"]
    facts += ["null_context null_context.f32", "named_context loud context.loud.f32", "weights weights.bin"]
    if with_features:
        facts.append(f"feature_dim {FEATURES}")
    for operator, (shape, params) in OPERATORS.items():
        facts.append(f"operator {operator} {words(shape)}")
        facts += [f"operator_param {operator} {param} {words(size)}" for param, size in params.items()]
    return [*facts, "check decoder_pull 1e-6", "info anything goes here"]


def words(shape: tuple[int, ...]) -> str:
    return " ".join(map(str, shape))


def make_graphs(nets: Nets, batch: int, with_features: bool) -> dict[str, bytes]:
    """Every graph for `batch` samples at a time, by name."""
    where = pack_weights(nets)[1]
    makers: dict[str, Any] = {"denoiser": denoiser, "decoder": decoder, "decoder_pull": decoder_pull}
    if with_features:
        makers |= {"features": features, "features_pull": features_pull}
    graphs = {name: make(GraphWriter(nets, batch, where)) for name, make in makers.items()}
    for operator in OPERATORS:
        graphs[f"operator.{operator}.loss"] = loss(GraphWriter(nets, batch, where), operator)
        graphs[f"operator.{operator}.forward"] = forward(GraphWriter(nets, batch, where), operator)
    return graphs


def write_bundle(
    path: Path, nets: Nets, *batches: int, with_features: bool = True, instead: Mapping[str, bytes] | None = None
) -> Path:
    """Writes a bundle to the new folder `path`, its graphs once for each of `batches` (default 1) samples at a time.

    instead: graphs to put in the place of ours.
    """
    facts = facts_of(nets, with_features)
    files = {"weights.bin": pack_weights(nets)[0], "alphas_cumprod.f64": nets.abar.astype("<f8").tobytes()}
    files["null_context.f32"] = null_context().astype("<f4").tobytes()
    files["context.loud.f32"] = (3 * null_context()).astype("<f4").tobytes()
    for batch in batches or (1,):
        for name, data in (make_graphs(nets, batch, with_features) | dict(instead or {})).items():
            files[f"{name}.b{batch}.onnx"] = data
            facts.append(f"graph {name} {batch} {name}.b{batch}.onnx")
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    (path / "manifest.txt").write_bytes(manifest(facts, files))
    return path


if __name__ == "__main__":
    write_bundle(Path(sys.argv[1]), make_nets())
