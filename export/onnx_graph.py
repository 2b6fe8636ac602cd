"""From an ATen graph to ONNX: names, our own operators, small types; no weights are written here."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset20
from onnxscript.values import Op, Opset
from torch import Tensor, fx, nn

from rlsd.export.graph import drop_detach
from rlsd.export.trace import plain_attention
from rlsd.kernels import narrow

OPSET = 20
DOMAIN = Opset("rlsd", 1)  # the engine's custom operators: engine/src/custom_ops.cpp
CONTRIB = Opset("com.microsoft", 1)  # what ONNX Runtime adds to the standard


def to_onnx(module: nn.Module, args: Sequence[Tensor], inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """The module as an ONNX model with static shapes; `inputs` and `outputs` name its arguments and results.

    The weights still lie in torch's memory: rlsd.export.bundle moves them to the bundle's file.
    """
    if isinstance(module, fx.GraphModule):
        drop_detach(module)
    with warnings.catch_warnings(), plain_attention(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module,
            tuple(args),
            dynamo=True,
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            custom_translation_table=_TRANSLATIONS,
            verbose=False,
        )
    assert program is not None
    model = program.model
    _complete(model)
    _strip(model)
    return model


def _complete(model: ir.Model) -> None:
    """Registers constants that the exporter uses but forgot: where two nodes clip one tensor, it drops their bounds."""
    names = {value.name for value in model.graph.inputs} | set(model.graph.initializers)
    for node in model.graph:
        for value in node.inputs:
            if value is None or value.producer() is not None or value.name in names:
                continue
            if value.const_value is None:
                raise RuntimeError(f"{node.op_type} reads {value.name}, which nothing in the graph gives")
            model.graph.register_initializer(value)
            names.add(value.name)


def _strip(model: ir.Model) -> None:
    """Drops traces of the machine that exported: they would make equal exports differ."""
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _operator(
    name: str, inputs: str, outputs: str, domain: Opset = DOMAIN, **attributes: onnx.defs.OpSchema.AttrType
) -> Op:
    """An operator of one floating-point type; a name in brackets is an optional input."""
    parameter, optional = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.FormalParameterOption.Optional
    schema = onnx.defs.OpSchema(
        name,
        domain.domain,
        domain.version,
        inputs=[
            parameter(word[1:-1], "T", param_option=optional) if word[0] == "[" else parameter(word, "T")
            for word in inputs.split()
        ],
        outputs=[parameter(word, "T") for word in outputs.split()],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
        attributes=[onnx.defs.OpSchema.Attribute(word, kind, required=True) for word, kind in attributes.items()],
    )
    return Op(domain, name, schema)


_INT, _FLOAT, _INTS = (getattr(onnx.defs.OpSchema.AttrType, kind) for kind in ("INT", "FLOAT", "INTS"))
_NORM, _NORM_OUT = "x weight bias [x_bias]", "y mean rstd"
_NORM_KINDS = {"groups": _INT, "epsilon": _FLOAT, "silu": _INT}
_PULL, _PULL_KINDS = "cotangent x mean rstd weight bias [added] [x_bias]", {"groups": _INT, "silu": _INT}
_GROUP_NORM = [_operator(name, _NORM, _NORM_OUT, **_NORM_KINDS) for name in ("GroupNorm", "GroupNormNhwc")]
_GROUP_NORM_PULL = [
    _operator(name, _PULL, "x_cotangent", **_PULL_KINDS) for name in ("GroupNormPull", "GroupNormPullNhwc")
]
_GROUP_NORM_PULL_PHASES = _operator("GroupNormPullPhases", _PULL, "phases", **_PULL_KINDS)
_ADD_GROUP_NORM = _operator("AddGroupNormNhwc", "x residual weight bias [x_bias]", f"{_NORM_OUT} total", **_NORM_KINDS)
_BIAS_RESIDUAL = _operator("BiasResidual", "x bias [residual]", "y", silu=_INT)
_INTERLEAVE = [_operator(name, "phases [bias]", "image") for name in ("Interleave", "InterleaveNhwc")]
_INTERLEAVE_PULL = [_operator(name, "image", "phases") for name in ("InterleavePull", "InterleavePullNhwc")]
_LAYER_NORM_PULL = _operator("LayerNormPull", "cotangent x weight [added]", "x_cotangent", epsilon=_FLOAT)
_ADD_LAYER_NORM = _operator("AddLayerNorm", "x x_bias weight bias [residual]", "y total", epsilon=_FLOAT)
_GELU_PULL = _operator("GeluPull", "cotangent x", "x_cotangent")
_SOFTMAX_PULL = _operator("SoftmaxPull", "cotangent y", "x_cotangent", scale=_FLOAT)
_NARROW_CONV = _operator("NarrowConv", "x kernel [bias]", "y", channels_first=_INT)
_TAPS = {
    name: _operator(name, inputs, outputs, **_NORM_KINDS, planes=_INT)
    for name, inputs, outputs in (
        ("GroupNormTaps", "x weight bias kernel [x_bias]", "taps mean rstd"),
        ("AddGroupNormTaps", "x residual weight bias kernel [x_bias]", "taps mean rstd total"),
    )
}
_SUM_TAPS = _operator("SumTaps", "taps bias", "y")
_CONV = _operator("NhwcConv", "x weight [bias]", "y", CONTRIB, kernel_shape=_INTS, strides=_INTS, pads=_INTS)
_PRODUCT = _operator("FusedMatMul", "left right", "y", CONTRIB, transA=_INT, transB=_INT, alpha=_FLOAT)
_ATTENTION = _operator("MultiHeadAttention", "query key value", "y", CONTRIB, num_heads=_INT)
_GEGLU = _operator("BiasSplitGelu", "x bias", "y", CONTRIB)


def _given(*inputs):  # type: ignore[no-untyped-def]
    """Without the optional inputs that are left out at the end; one between others stays, as None."""
    return inputs if inputs[-1] is not None else _given(*inputs[:-1])


def _group_norm(  # type: ignore[no-untyped-def]
    x, weight, bias, groups: int, epsilon: float, silu: bool, last: bool = False, x_bias=None
):
    return _GROUP_NORM[last](*_given(x, weight, bias, x_bias), groups=groups, epsilon=epsilon, silu=int(silu))


def _group_norm_pull(  # type: ignore[no-untyped-def]
    cotangent, x, mean, rstd, weight, bias, groups: int, silu: bool, last: bool = False, added=None, x_bias=None
):
    given = _given(cotangent, x, mean, rstd, weight, bias, added, x_bias)
    return _GROUP_NORM_PULL[last](*given, groups=groups, silu=int(silu))


def _group_norm_pull_nhwc(  # type: ignore[no-untyped-def]
    cotangent, x, mean, rstd, weight, bias, groups: int, silu: bool, added=None, x_bias=None
):
    return _group_norm_pull(cotangent, x, mean, rstd, weight, bias, groups, silu, True, added, x_bias)


def _group_norm_pull_phases(  # type: ignore[no-untyped-def]
    cotangent, x, mean, rstd, weight, bias, groups: int, silu: bool, added=None, x_bias=None
):
    given = _given(cotangent, x, mean, rstd, weight, bias, added, x_bias)
    return _GROUP_NORM_PULL_PHASES(*given, groups=groups, silu=int(silu))


def _add_group_norm(x, residual, weight, bias, groups: int, epsilon: float, silu: bool, x_bias=None):  # type: ignore[no-untyped-def]
    given = _given(x, residual, weight, bias, x_bias)
    return _ADD_GROUP_NORM(*given, groups=groups, epsilon=epsilon, silu=int(silu))


def _bias_residual(x, bias, residual=None, silu: bool = False):  # type: ignore[no-untyped-def]
    return _BIAS_RESIDUAL(*_given(x, bias, residual), silu=int(silu))


def _narrow_conv(x, kernel, bias=None, channels_first: bool = False):  # type: ignore[no-untyped-def]
    return _NARROW_CONV(*_given(x, kernel, bias), channels_first=int(channels_first))


def _group_norm_taps(  # type: ignore[no-untyped-def]
    x, weight, bias, kernel, planes: int, groups: int, epsilon: float, silu: bool, x_bias=None
):
    kinds = {"groups": groups, "epsilon": epsilon, "silu": int(silu), "planes": planes}
    return _TAPS["GroupNormTaps"](*_given(x, weight, bias, kernel, x_bias), **kinds)


def _add_group_norm_taps(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, kernel, planes: int, groups: int, epsilon: float, silu: bool, x_bias=None
):
    kinds = {"groups": groups, "epsilon": epsilon, "silu": int(silu), "planes": planes}
    return _TAPS["AddGroupNormTaps"](*_given(x, residual, weight, bias, kernel, x_bias), **kinds)


def _conv_nhwc(x, weight, bias, stride: Sequence[int], padding: Sequence[int]):  # type: ignore[no-untyped-def]
    given = _given(x, weight, bias)
    return _CONV(*given, kernel_shape=list(weight.shape[1:3]), strides=list(stride), pads=[*padding, *padding])


def _linear(x, weight, bias):  # type: ignore[no-untyped-def]
    product = opset20.MatMul(x, weight)
    return product if bias is None else opset20.Add(product, bias)


def _product(left, right, across: Sequence[bool], scale: float = 1.0):  # type: ignore[no-untyped-def]
    return _PRODUCT(left, right, transA=int(across[0]), transB=int(across[1]), alpha=scale)


def _wide_attention(query, key, value):  # type: ignore[no-untyped-def]
    scores = _PRODUCT(query, key, transA=0, transB=1, alpha=query.shape[-1] ** -0.5)
    probabilities = opset20.Softmax(scores, axis=-1)
    return _PRODUCT(probabilities, value, transA=0, transB=0, alpha=1.0), probabilities


def _attention(query, key, value, heads: int):  # type: ignore[no-untyped-def]
    return _ATTENTION(query, key, value, num_heads=heads)


def _layer_norm(x, shape: Sequence[int], weight, bias, epsilon: float):  # type: ignore[no-untyped-def]
    """ONNX's mean and rstd are float32; in a graph of halves they are halves, which is what their pull-back reads."""
    if weight is None:
        weight = opset20.CastLike(opset20.Constant(value_floats=[1.0] * math.prod(shape)), x)
    given = (x, weight) if bias is None else (x, weight, bias)
    y, *statistics = opset20.LayerNormalization(*given, axis=-len(shape), epsilon=epsilon)
    return y, *(opset20.CastLike(value, x) if x.dtype == ir.DataType.FLOAT16 else value for value in statistics)


def _layer_norm_alone(x, weight, bias, epsilon: float):  # type: ignore[no-untyped-def]
    return opset20.LayerNormalization(x, weight, bias, axis=-1, epsilon=epsilon)[0]


def _add_layer_norm(x, x_bias, weight, bias, epsilon: float, residual=None):  # type: ignore[no-untyped-def]
    return _ADD_LAYER_NORM(*_given(x, x_bias, weight, bias, residual), epsilon=epsilon)


def _layer_norm_pull(cotangent, x, weight, epsilon: float, added=None):  # type: ignore[no-untyped-def]
    return _LAYER_NORM_PULL(*_given(cotangent, x, weight, added), epsilon=epsilon)


assert narrow  # registers rlsd::narrow_conv and its companions
_TRANSLATIONS = {
    torch.ops.aten.native_layer_norm.default: _layer_norm,
    torch.ops.rlsd.group_norm.default: _group_norm,
    torch.ops.rlsd.group_norm_pull.default: _group_norm_pull,
    torch.ops.rlsd.add_group_norm_nhwc.default: _add_group_norm,
    torch.ops.rlsd.group_norm_pull_nhwc.default: _group_norm_pull_nhwc,
    torch.ops.rlsd.group_norm_pull_phases.default: _group_norm_pull_phases,
    torch.ops.rlsd.bias_residual_nhwc.default: _bias_residual,
    torch.ops.rlsd.interleave.default: lambda phases, last=False, bias=None: _INTERLEAVE[last](*_given(phases, bias)),
    torch.ops.rlsd.interleave_pull.default: lambda image, last=False: _INTERLEAVE_PULL[last](image),
    torch.ops.rlsd.conv_nhwc.default: _conv_nhwc,
    torch.ops.rlsd.narrow_conv.default: _narrow_conv,
    torch.ops.rlsd.group_norm_taps.default: _group_norm_taps,
    torch.ops.rlsd.add_group_norm_taps.default: _add_group_norm_taps,
    torch.ops.rlsd.sum_taps.default: lambda taps, bias: _SUM_TAPS(taps, bias),
    torch.ops.rlsd.linear.default: _linear,
    torch.ops.rlsd.product.default: _product,
    torch.ops.rlsd.attention.default: _attention,
    torch.ops.rlsd.wide_attention.default: _wide_attention,
    torch.ops.rlsd.layer_norm.default: _layer_norm_alone,
    torch.ops.rlsd.add_layer_norm.default: _add_layer_norm,
    torch.ops.rlsd.layer_norm_pull.default: _layer_norm_pull,
    torch.ops.rlsd.gelu.default: lambda x: opset20.Gelu(x),
    torch.ops.rlsd.gelu_pull.default: lambda cotangent, x: _GELU_PULL(cotangent, x),
    torch.ops.rlsd.softmax_pull.default: lambda cotangent, y, scale=1.0: _SOFTMAX_PULL(cotangent, y, scale=scale),
    torch.ops.rlsd.round_through.default: lambda x: opset20.Round(x),
    torch.ops.rlsd.geglu.default: lambda x, bias: _GEGLU(x, bias),
}
