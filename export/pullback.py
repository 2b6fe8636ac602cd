"""The pull-back (vector-Jacobian product) of any differentiable torch module, as an ordinary forward graph.

ONNX has no automatic differentiation. So the joint computation of y = f(x) and of its pull-back is traced once
to ATen operations and then cut in two graphs: the forward graph returns y and the activations worth keeping, the
pull graph takes these and the cotangent of y. What is cheap to recompute (element-wise operations and views) is
recomputed in the pull graph, so that only the results of convolutions, matrix products and normalisations cross.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from rlsd.export.graph import drop_detach
from rlsd.export.trace import plain_attention

aten = torch.ops.aten

# Worth keeping rather than recomputing: all that is neither element-wise nor a view nor a small reduction.
KEPT = {
    aten.convolution.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten._softmax.default,
    aten._safe_softmax.default,
    aten.native_layer_norm.default,
    torch.ops.rlsd.group_norm.default,
    torch.ops.rlsd.add_group_norm_nhwc.default,
    torch.ops.rlsd.interleave.default,
    torch.ops.rlsd.conv_nhwc.default,
    torch.ops.rlsd.linear.default,
    torch.ops.rlsd.product.default,
    torch.ops.rlsd.attention.default,
    torch.ops.rlsd.wide_attention.default,
    torch.ops.rlsd.layer_norm.default,
}
# Where memory is dearer than matrix products of the size of attention: their results are recomputed, too, but for the
# probabilities of wide heads, which are written in any case.
RECOMPUTED_ON_CUDA = frozenset({aten.bmm.default, aten._softmax.default, torch.ops.rlsd.product.default})


@dataclass(frozen=True)
class Split:
    """A function and its pull-back.

    forward: (*inputs) -> (y, *kept). pull: (cotangent, *pull_inputs) -> cotangent of the first input, where
    pull_inputs names inputs of the function or entries of `kept`.
    """

    forward: fx.GraphModule
    pull: fx.GraphModule
    kept: list[str]
    kept_values: list[Tensor]  # meta tensors: shapes and types only
    pull_inputs: list[str]


def split(
    function: nn.Module,
    args: Sequence[Tensor],
    names: Sequence[str],
    recomputed: frozenset = frozenset(),
) -> Split:
    """Cuts `function(*args) -> y` and its pull-back in the first input in two graphs of static shapes.

    recomputed: operations whose results the pull graph makes again although they would be worth keeping.
    Raises NotImplementedError for a function that writes into parts of tensors.
    """
    state = {**dict(function.named_parameters()), **dict(function.named_buffers())}

    def joint(weights: Sequence[Tensor], inputs: Sequence[Tensor], cotangent: Tensor) -> tuple[Tensor, Tensor]:
        inputs = [inputs[0].detach().requires_grad_(), *inputs[1:]]
        y = torch.func.functional_call(function, dict(zip(state, weights)), tuple(inputs))
        pulled = None
        if y.requires_grad:
            (pulled,) = torch.autograd.grad(y, inputs[0], cotangent, allow_unused=True)
        return y, torch.zeros_like(inputs[0]) if pulled is None else pulled

    example = _like_output(function, args)
    with plain_attention():
        traced = make_fx(joint, decomposition_table=_decompositions(), tracing_mode="fake")(
            list(state.values()), list(args), example
        )
    for node in traced.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and not node.users:
            raise NotImplementedError(f"{node.target} changes a part of a tensor, which a graph of values cannot say")
    drop_detach(traced)
    return _cut(traced, list(state.values()), list(names), KEPT - recomputed)


def _like_output(function: nn.Module, args: Sequence[Tensor]) -> Tensor:
    """An empty tensor like the function's result, without computing it where the trace knows its shape."""
    if isinstance(function, fx.GraphModule):
        result = next(node for node in function.graph.nodes if node.op == "output").args[0]
        value = (result[0] if isinstance(result, (tuple, list)) else result).meta.get("val")
        if value is not None:
            return torch.empty(value.shape, dtype=value.dtype)
    with torch.no_grad():
        return torch.empty_like(function(*args))


def _cut(traced: fx.GraphModule, weights: list[Tensor], names: list[str], worth: set) -> Split:
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    constants = dict(zip(placeholders, weights))
    inputs = dict(zip(placeholders[len(weights) : -1], names))
    cotangent = placeholders[-1]
    y, pulled = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    _fold_constants(traced, constants)
    late = _reachable(traced.graph, cotangent) | {pulled}
    norms = (torch.ops.rlsd.group_norm.default, torch.ops.rlsd.layer_norm.default)
    normalised = {node.args[0] for node in traced.graph.nodes if node.target in norms}

    def keep(node: fx.Node) -> bool:
        # The input of a normalisation even where it is a sum: it is there anyway, and its summands need not be kept.
        return node not in late and node not in inputs and (node in normalised or _worth_keeping(node, worth))

    kept = [node for node in _needed([pulled], stop=keep) if keep(node) and node not in constants]
    forward = _extract(traced, list(inputs), [y, *kept], constants)
    pull_sources = [n for n in [*inputs, *kept] if n in _needed([pulled], stop=lambda n: n in kept)]
    pull = _extract(traced, [cotangent, *pull_sources], [pulled], constants)
    kept_names = {node: f"kept_{i}" for i, node in enumerate(kept)}
    return Split(
        forward,
        pull,
        list(kept_names.values()),
        [node.meta["val"] for node in kept],
        [inputs.get(node) or kept_names[node] for node in pull_sources],
    )


def _worth_keeping(node: fx.Node, worth: set) -> bool:
    if node.target is operator.getitem:
        return node.args[0].target in worth  # type: ignore[union-attr]
    return node.target in worth and isinstance(node.meta.get("val"), Tensor)


def _needed(outputs: Sequence[fx.Node], stop=lambda node: False) -> dict[fx.Node, None]:  # type: ignore[no-untyped-def]
    """All that `outputs` depend on, in the order of the graph; not looking behind nodes for which `stop` holds."""
    found: set[fx.Node] = set()
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if not stop(node):
                pending.extend(node.all_input_nodes)
    return dict.fromkeys(node for node in outputs[0].graph.nodes if node in found)


def _reachable(graph: fx.Graph, start: fx.Node) -> set[fx.Node]:
    found = {start}
    for node in graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _fold_constants(traced: fx.GraphModule, constants: dict[fx.Node, Tensor]) -> None:
    """Computes what depends on the weights alone (rotated kernels, say) and adds it to `constants`."""
    values: dict[fx.Node, object] = dict(constants)
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            values[node] = constants[node] = getattr(traced, str(node.target))
        elif node.op == "call_function" and all(source in values for source in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            if isinstance(values[node], Tensor):
                constants[node] = values[node]  # type: ignore[assignment]


def _extract(
    traced: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], constants: dict[fx.Node, Tensor]
) -> fx.GraphModule:
    graph = fx.Graph()
    root = nn.Module()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    cuts = set(inputs) | set(constants)
    for node in _needed(outputs, stop=lambda n: n in cuts):
        if node in copies:
            continue
        if node in constants:
            root.register_buffer(f"constant_{node.name}", constants[node].detach().contiguous())
            copies[node] = graph.get_attr(f"constant_{node.name}")
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in outputs))
    return fx.GraphModule(root, graph)


def _convolution_backward(
    cotangent: Tensor, x: Tensor, weight: Tensor, _bias: object, stride: list[int], padding: list[int],
    dilation: list[int], transposed: bool, output_padding: list[int], groups: int, mask: list[bool],
) -> tuple[Tensor, None, None]:  # fmt: skip
    """The cotangent of x alone: a convolution with the rotated, transposed kernel where the stride is 1."""
    if transposed or mask[1] or mask[2]:
        raise NotImplementedError("the pull-back is made for plain convolutions with frozen weights")
    extent = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
    if all(s == 1 for s in stride) and all(e >= p for e, p in zip(extent, padding)):
        out, per_group, *kernel = weight.shape
        swapped = weight.reshape(groups, out // groups, per_group, *kernel).transpose(1, 2)
        rotated = swapped.reshape(groups * per_group, out // groups, *kernel).flip(2, 3)
        around = [e - p for e, p in zip(extent, padding)]
        pulled = aten.convolution(cotangent, rotated, None, stride, around, dilation, False, [0] * len(around), groups)
        return pulled, None, None
    missing = [
        n - ((c - 1) * s - 2 * p + e + 1)
        for n, c, s, p, e in zip(x.shape[2:], cotangent.shape[2:], stride, padding, extent)
    ]
    pulled = aten.convolution(cotangent, weight, None, stride, padding, dilation, True, missing, groups)
    return pulled, None, None


def _decompositions() -> dict:
    table = get_decompositions(
        [
            aten._softmax_backward_data,
            aten.native_layer_norm_backward,
            aten.gelu_backward,
            aten.silu_backward,
            aten.sigmoid_backward,
            aten.tanh_backward,
            aten.threshold_backward,
            aten.hardtanh_backward,
            aten.leaky_relu_backward,
            aten.elu_backward,
            aten.mish_backward,
            aten.select_backward,
            aten.slice_backward,
            aten.upsample_nearest2d,
            aten.upsample_nearest2d_backward,
            aten.avg_pool2d_backward,
            aten.reflection_pad2d_backward,
            aten._safe_softmax,
            aten.new_zeros,
            aten.expand_copy,
        ]
    )
    return {**table, aten.convolution_backward.default: _convolution_backward}
