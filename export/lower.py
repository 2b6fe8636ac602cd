"""An ONNX graph made for CUDA in halves, written down with what ONNX Runtime's CPU provider has.

To check such a graph without a GPU. The lowered graph computes in float32 and rounds every result to halves where the
CUDA graph stores halves, which is what a GPU does that accumulates in float32.

With `kept`, inputs, outputs and the operators of domain "rlsd" stay in halves: such a graph takes the place of the CUDA
graph in an engine whose device is a stand-in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from rlsd.export.bundle import link_or_copy

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
Nodes = Iterator[NodeProto]


def lower(source: Path, target: Path) -> None:
    """Writes the lowered form of the graph file `source` to `target`, and its files of weights beside it.

    These are linked, or copied where that cannot be, and left as they are where a file of their name lies.
    """
    model = lowered(onnx.load(source, load_external_data=False))
    files = {ExternalDataInfo(x).location for x in model.graph.initializer if uses_external_data(x)}
    for name in files:
        if not (target.parent / name).exists():
            link_or_copy(source.parent / name, target.parent / name)
    onnx.save(model, target)


def lowered(model: onnx.ModelProto, kept: bool = False) -> onnx.ModelProto:
    """The same in memory; `model` is changed. Weights in another file stay there as they are: a cast widens them."""
    graph = model.graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    nodes: list[NodeProto] = []
    for tensor in graph.initializer:
        if tensor.data_type == HALF and uses_external_data(tensor):
            nodes.append(helper.make_node("Cast", [f"{tensor.name}/half"], [tensor.name], to=FLOAT))
            tensor.name = f"{tensor.name}/half"
        elif tensor.data_type == HALF:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in graph.node:
        if kept and node.domain == "rlsd":
            nodes += _in_halves(node, kinds)
        else:
            nodes += [each for part in _parts(node, kinds) for each in _rounded(part, kinds)]
    if kept:
        nodes = [*border(graph, nodes)]
    else:
        for value in (*graph.input, *graph.output):
            if value.type.tensor_type.elem_type == HALF:
                value.type.tensor_type.elem_type = FLOAT
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    model.opset_import.extend(
        helper.make_opsetid(*domain)
        for domain in (("rlsd", 1), ("com.microsoft", 1))
        if domain[0] not in {known.domain for known in model.opset_import}
    )
    return model


def _in_halves(node: NodeProto, kinds: dict[str, int]) -> Nodes:
    """The node as it is, between casts: halves are floats everywhere else."""
    halves = [name for name in dict.fromkeys(node.input) if kinds.get(name) == HALF]
    for name in halves:
        yield helper.make_node("Cast", [name], [f"{name}/in/{node.output[0]}"], to=HALF)
    back = [name for name in node.output if kinds.get(name) == HALF]
    for i, name in enumerate(node.input):
        if name in halves:
            node.input[i] = f"{name}/in/{node.output[0]}"
    for i, name in enumerate(node.output):
        if name in back:
            node.output[i] = f"{name}/half"
    yield node
    for name in back:
        yield helper.make_node("Cast", [f"{name}/half"], [name], to=FLOAT)


def border(graph: onnx.GraphProto, nodes: list[NodeProto]) -> Nodes:
    """Casts at the inputs and outputs that are halves, which the nodes know as floats of another name."""
    inputs = [value.name for value in graph.input if value.type.tensor_type.elem_type == HALF]
    outputs = [value.name for value in graph.output if value.type.tensor_type.elem_type == HALF]
    for name in inputs:
        yield helper.make_node("Cast", [name], [f"{name}/float"], to=FLOAT)
    for node in nodes:
        for words in (node.input, node.output):
            for i, name in enumerate(words):
                if name in inputs or name in outputs:
                    words[i] = f"{name}/float"
        yield node
    for name in outputs:
        yield helper.make_node("Cast", [f"{name}/float"], [name], to=HALF)


def _parts(node: NodeProto, kinds: dict[str, int]) -> Nodes:
    """A node that stores or rounds a result and goes on from it is two; what it rounds inside is added to `kinds`."""
    if node.op_type == "AddGroupNormNhwc":
        x, residual, weight, bias, *x_bias = node.input
        *rest, total = node.output
        yield from _sum([x, residual, *x_bias], total)
        yield helper.make_node("GroupNormNhwc", [total, weight, bias], rest, domain="rlsd", **_attributes(node))
    elif node.op_type in ("GroupNormTaps", "AddGroupNormTaps"):
        kinds[f"{node.output[0]}/y"] = HALF
        yield from _group_norm_taps(node)
    elif node.op_type == "GroupNormPullPhases":
        image = f"{node.output[0]}/image"
        kinds[image] = HALF
        yield helper.make_node("GroupNormPullNhwc", node.input, [image], domain="rlsd", **_attributes(node))
        yield helper.make_node("InterleavePullNhwc", [image], node.output, domain="rlsd")
    elif node.op_type == "AddLayerNorm":
        x, x_bias, weight, bias, *residual = node.input
        y, total = node.output
        yield from _sum([x, x_bias, *residual], total)
        yield helper.make_node("LayerNormalization", [total, weight, bias], [y], axis=-1, **_attributes(node))
    else:
        yield node


def _rounded(node: NodeProto, kinds: dict[str, int]) -> Nodes:
    """The node in float32; then its results that are halves on CUDA become floats that are exact halves."""
    halves = [name for name in node.output if kinds.get(name) == HALF]
    for lowered in _RULES.get(node.op_type, _kept)(node):
        for i, name in enumerate(lowered.output):
            if name in halves:
                lowered.output[i] = f"{name}/exact"
        yield lowered
    for name in halves:
        yield helper.make_node("Cast", [f"{name}/exact"], [f"{name}/half"], to=HALF)
        yield helper.make_node("Cast", [f"{name}/half"], [name], to=FLOAT)


def _kept(node: NodeProto) -> Nodes:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == HALF:
            attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32)))
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == HALF:
            attribute.i = FLOAT
    yield node


def _attributes(node: NodeProto) -> dict:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _transpose(source: str, target: str, order: list[int]) -> NodeProto:
    return helper.make_node("Transpose", [source], [target], perm=order)


def _integers(name: str, *values: int) -> NodeProto:
    return helper.make_node("Constant", [], [name], value_ints=list(values))


def _convolution(node: NodeProto) -> Nodes:
    x, weight, *bias = node.input
    y = node.output[0]
    yield _transpose(x, f"{y}/x", [0, 3, 1, 2])
    yield _transpose(weight, f"{y}/weight", [0, 3, 1, 2])
    yield helper.make_node("Conv", [f"{y}/x", f"{y}/weight", *bias], [f"{y}/y"], **_attributes(node))
    yield _transpose(f"{y}/y", y, [0, 2, 3, 1])


def _channels_first(x: str, weight: str, y: str) -> Nodes:
    """x [B, *, C] as y [B, C, P], with C as long as `weight`."""
    yield _integers(f"{y}/around", 0, -1)
    yield helper.make_node("Shape", [weight], [f"{y}/channels"])
    yield helper.make_node("Concat", [f"{y}/around", f"{y}/channels"], [f"{y}/flat"], axis=0)
    yield helper.make_node("Reshape", [x, f"{y}/flat"], [f"{y}/tokens"])
    yield _transpose(f"{y}/tokens", y, [0, 2, 1])


def _channels_last(x: str, like: str, y: str) -> Nodes:
    yield _transpose(x, f"{y}/back", [0, 2, 1])
    yield helper.make_node("Shape", [like], [f"{y}/shape"])
    yield helper.make_node("Reshape", [f"{y}/back", f"{y}/shape"], [y])


def _sum(terms: Sequence[str], total: str) -> Nodes:
    """All terms that are there, from left to right; rounded, where it has to be, by whoever knows `total`."""
    first, *rest = [term for term in terms if term]
    for i, term in enumerate(rest):
        last = i == len(rest) - 1
        yield helper.make_node("Add", [first, term], [total if last else f"{total}/{i}"])
        first = f"{total}/{i}"
    if not rest:
        yield helper.make_node("Identity", [first], [total])


def _group_norm(node: NodeProto) -> Nodes:
    x, weight, bias, *x_bias = node.input
    y, *statistics = node.output
    yield from _sum([x, *x_bias], f"{y}/x")
    yield from _channels_first(f"{y}/x", weight, f"{y}/first")
    yield helper.make_node(
        "GroupNorm", [f"{y}/first", weight, bias], [f"{y}/norm", *statistics], domain="rlsd", **_attributes(node)
    )
    yield from _channels_last(f"{y}/norm", x, y)


def _group_norm_pull(node: NodeProto) -> Nodes:
    cotangent, x, mean, rstd, weight, bias, *rest = node.input
    added, x_bias = (*rest, "", "")[:2]
    y = node.output[0]
    yield from _channels_first(cotangent, weight, f"{y}/first")
    yield from _sum([x, x_bias], f"{y}/biased")
    yield from _channels_first(f"{y}/biased", weight, f"{y}/x")
    given = [f"{y}/first", f"{y}/x", mean, rstd, weight, bias]
    yield helper.make_node("GroupNormPull", given, [f"{y}/pull"], domain="rlsd", **_attributes(node))
    yield from _channels_last(f"{y}/pull", x, f"{y}/alone")
    yield from _sum([f"{y}/alone", added], y)


def _interleave(node: NodeProto) -> Nodes:
    x, *bias = node.input
    y = node.output[0]
    yield _transpose(x, f"{y}/first", [0, 3, 1, 2])
    yield helper.make_node("DepthToSpace", [f"{y}/first"], [f"{y}/whole"], blocksize=2, mode="DCR")
    for name, values in (("start", (1, 1)), ("end", (-1, -1)), ("axes", (2, 3))):
        yield _integers(f"{y}/{name}", *values)
    yield helper.make_node("Slice", [f"{y}/whole", f"{y}/start", f"{y}/end", f"{y}/axes"], [f"{y}/cut"])
    yield _transpose(f"{y}/cut", f"{y}/image", [0, 2, 3, 1])
    yield from _sum([f"{y}/image", *bias], y)


def _interleave_pull(node: NodeProto) -> Nodes:
    x, y = node.input[0], node.output[0]
    yield _transpose(x, f"{y}/first", [0, 3, 1, 2])
    yield _integers(f"{y}/pads", 0, 0, 1, 1, 0, 0, 1, 1)
    yield helper.make_node("Pad", [f"{y}/first", f"{y}/pads"], [f"{y}/padded"])
    yield helper.make_node("SpaceToDepth", [f"{y}/padded"], [f"{y}/phases"], blocksize=2)
    yield _transpose(f"{y}/phases", y, [0, 2, 3, 1])


def _group_norm_taps(node: NodeProto) -> Nodes:
    x, *rest = node.input
    taps, mean, rstd, *total = node.output
    attributes = _attributes(node)
    planes = attributes.pop("planes")
    if total:
        residual, weight, bias, kernel, *x_bias = rest
        yield from _sum([x, residual, *x_bias], total[0])
        given = [total[0], weight, bias]
    else:
        weight, bias, kernel, *x_bias = rest
        given = [x, weight, bias, *x_bias]
    yield helper.make_node("GroupNormNhwc", given, [f"{taps}/y", mean, rstd], domain="rlsd", **attributes)
    for name, value in (("start", 0), ("end", 9 * planes), ("axis", 1)):
        yield _integers(f"{taps}/{name}", value)
    yield _node("Slice", f"{taps}/kernel", kernel, f"{taps}/start", f"{taps}/end", f"{taps}/axis")
    yield _node("MatMul", f"{taps}/last", f"{taps}/y", f"{taps}/kernel")
    yield _transpose(f"{taps}/last", taps, [0, 3, 1, 2])


def _sum_taps(node: NodeProto) -> Nodes:
    """Each plane's 9 taps as the channels of an image, whose convolution with shifts is one plane."""
    taps, bias = node.input
    y = node.output[0]
    shifts = np.eye(9, dtype=np.float32).reshape(1, 9, 3, 3)
    yield helper.make_node("Constant", [], [f"{y}/shifts"], value=numpy_helper.from_array(shifts))
    yield helper.make_node("Shape", [taps], [f"{y}/sides"], start=2)
    for name, values in (("apart", (0, 9, -1)), ("alone", (-1, 9)), ("axes", (1, 2))):
        yield _integers(f"{y}/{name}", *values)
    yield helper.make_node("Concat", [f"{y}/apart", f"{y}/sides"], [f"{y}/apart shape"], axis=0)
    yield _node("Reshape", f"{y}/taps", taps, f"{y}/apart shape")  # [B, 9, P, H, W]
    yield _transpose(f"{y}/taps", f"{y}/planes", [0, 2, 1, 3, 4])
    yield helper.make_node("Concat", [f"{y}/alone", f"{y}/sides"], [f"{y}/alone shape"], axis=0)
    yield _node("Reshape", f"{y}/images", f"{y}/planes", f"{y}/alone shape")
    yield helper.make_node("Conv", [f"{y}/images", f"{y}/shifts"], [f"{y}/sums"], pads=[1] * 4)
    yield helper.make_node("Shape", [taps], [f"{y}/batch"], end=1)
    yield helper.make_node("Shape", [bias], [f"{y}/count"])
    yield helper.make_node("Concat", [f"{y}/batch", f"{y}/count", f"{y}/sides"], [f"{y}/shape"], axis=0)
    yield _node("Reshape", f"{y}/together", f"{y}/sums", f"{y}/shape")
    yield _node("Unsqueeze", f"{y}/bias", bias, f"{y}/axes")
    yield _node("Add", y, f"{y}/together", f"{y}/bias")


def _narrow_conv(node: NodeProto) -> Nodes:
    x, kernel, *bias = node.input
    y = node.output[0]
    first = x if _attributes(node)["channels_first"] else f"{y}/x"
    if first != x:
        yield _transpose(x, first, [0, 3, 1, 2])
    yield helper.make_node("Shape", [first], [f"{y}/narrow"], start=1, end=2)
    for name, values in (("start", (0,)), ("taps", (9,)), ("sides", (3, 3)), ("others", (-1,))):
        yield _integers(f"{y}/{name}", *values)
    yield _node("Mul", f"{y}/end", f"{y}/narrow", f"{y}/taps")
    yield _node("Slice", f"{y}/rows", kernel, f"{y}/start", f"{y}/end", f"{y}/start")  # along axis 0
    yield helper.make_node("Concat", [f"{y}/sides", f"{y}/narrow", f"{y}/others"], [f"{y}/shape"], axis=0)
    yield _node("Reshape", f"{y}/apart", f"{y}/rows", f"{y}/shape")
    yield _transpose(f"{y}/apart", f"{y}/kernel", [3, 2, 0, 1])
    yield helper.make_node("Conv", [first, f"{y}/kernel", *bias], [f"{y}/y"], pads=[1] * 4)
    yield _transpose(f"{y}/y", y, [0, 2, 3, 1])


def _geglu(node: NodeProto) -> Nodes:
    y = node.output[0]
    yield helper.make_node("Add", list(node.input), [f"{y}/sum"])
    yield helper.make_node("Split", [f"{y}/sum"], [f"{y}/value", f"{y}/gate"], axis=-1, num_outputs=2)
    yield helper.make_node("Gelu", [f"{y}/gate"], [f"{y}/open"])
    yield helper.make_node("Mul", [f"{y}/value", f"{y}/open"], [y])


def _bias_residual(node: NodeProto) -> Nodes:
    y = node.output[0]
    if not _attributes(node)["silu"]:
        yield from _sum(node.input, y)
        return
    yield from _sum(node.input, f"{y}/sum")
    yield helper.make_node("Sigmoid", [f"{y}/sum"], [f"{y}/gate"])
    yield helper.make_node("Mul", [f"{y}/sum", f"{y}/gate"], [y])


def _node(op: str, y: str, *given: str) -> NodeProto:
    return helper.make_node(op, [*given], [y])


def _number(name: str, value: float) -> NodeProto:
    return helper.make_node("Constant", [], [name], value_float=value)


def _layer_norm_pull(node: NodeProto) -> Nodes:
    cotangent, x, weight, *added = node.input
    y = node.output[0]
    yield _integers(f"{y}/axis", -1)
    yield _node("ReduceMean", f"{y}/mean", x, f"{y}/axis")
    yield _node("Sub", f"{y}/centred", x, f"{y}/mean")
    yield _node("Mul", f"{y}/square", f"{y}/centred", f"{y}/centred")
    yield _node("ReduceMean", f"{y}/variance", f"{y}/square", f"{y}/axis")
    yield _number(f"{y}/epsilon", _attributes(node)["epsilon"])
    yield _node("Add", f"{y}/sum", f"{y}/variance", f"{y}/epsilon")
    yield _node("Sqrt", f"{y}/root", f"{y}/sum")
    yield _node("Div", f"{y}/normal", f"{y}/centred", f"{y}/root")
    yield _node("Mul", f"{y}/pulled", cotangent, weight)
    yield _node("ReduceMean", f"{y}/first", f"{y}/pulled", f"{y}/axis")
    yield _node("Mul", f"{y}/product", f"{y}/pulled", f"{y}/normal")
    yield _node("ReduceMean", f"{y}/second", f"{y}/product", f"{y}/axis")
    yield _node("Mul", f"{y}/along", f"{y}/normal", f"{y}/second")
    yield _node("Sub", f"{y}/less", f"{y}/pulled", f"{y}/first")
    yield _node("Sub", f"{y}/left", f"{y}/less", f"{y}/along")
    yield _node("Div", f"{y}/alone", f"{y}/left", f"{y}/root")
    yield from _sum([f"{y}/alone", *added], y)


def _gelu_pull(node: NodeProto) -> Nodes:
    cotangent, x = node.input
    y = node.output[0]
    for name, value in (("middle", 0.5), ("root", 0.5**0.5), ("minus", -0.5), ("density", (2 * np.pi) ** -0.5)):
        yield _number(f"{y}/{name}", value)
    yield _node("Mul", f"{y}/x", x, f"{y}/root")
    yield _node("Erf", f"{y}/erf", f"{y}/x")
    yield _node("Mul", f"{y}/halved", f"{y}/erf", f"{y}/middle")
    yield _node("Add", f"{y}/below", f"{y}/halved", f"{y}/middle")
    yield _node("Mul", f"{y}/square", x, x)
    yield _node("Mul", f"{y}/exponent", f"{y}/square", f"{y}/minus")
    yield _node("Exp", f"{y}/exp", f"{y}/exponent")
    yield _node("Mul", f"{y}/scaled", f"{y}/exp", f"{y}/density")
    yield _node("Mul", f"{y}/slope", x, f"{y}/scaled")
    yield _node("Add", f"{y}/derivative", f"{y}/below", f"{y}/slope")
    yield _node("Mul", y, cotangent, f"{y}/derivative")


def _softmax_pull(node: NodeProto) -> Nodes:
    cotangent, p = node.input
    y = node.output[0]
    yield _integers(f"{y}/axis", -1)
    yield _number(f"{y}/scale", _attributes(node)["scale"])
    yield _node("Mul", f"{y}/product", cotangent, p)
    yield _node("ReduceSum", f"{y}/total", f"{y}/product", f"{y}/axis")
    yield _node("Sub", f"{y}/left", cotangent, f"{y}/total")
    yield _node("Mul", f"{y}/pulled", p, f"{y}/left")
    yield _node("Mul", y, f"{y}/pulled", f"{y}/scale")


_RULES: dict[str, Callable[[NodeProto], Nodes]] = {
    "NhwcConv": _convolution,
    "GroupNormNhwc": _group_norm,
    "GroupNormPullNhwc": _group_norm_pull,
    "InterleaveNhwc": _interleave,
    "InterleavePullNhwc": _interleave_pull,
    "BiasSplitGelu": _geglu,
    "BiasResidual": _bias_residual,
    "LayerNormPull": _layer_norm_pull,
    "GeluPull": _gelu_pull,
    "SoftmaxPull": _softmax_pull,
    "NarrowConv": _narrow_conv,
    "SumTaps": _sum_taps,
}
