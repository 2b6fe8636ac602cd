"""From an ATen graph to ONNX: names, our own operators, small types; no weights are written here."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import onnx
import onnx_ir as ir
import torch
from onnxscript.values import Op, Opset
from torch import Tensor, nn

from rlsd.export.trace import plain_attention

OPSET = 20
DOMAIN = Opset("rlsd", 1)  # the engine's custom operators: engine/src/custom_ops.cpp


def to_onnx(module: nn.Module, args: Sequence[Tensor], inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """The module as an ONNX model with static shapes; `inputs` and `outputs` name its arguments and results.

    The weights still lie in torch's memory: rlsd.export.bundle moves them to the bundle's file.
    """
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
    _strip(model)
    return model


def _strip(model: ir.Model) -> None:
    """Drops traces of the machine that exported: they would make equal exports differ."""
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _operator(name: str, inputs: str, outputs: str, **attributes: onnx.defs.OpSchema.AttrType) -> Op:
    tensor = [("T", ["tensor(float)", "tensor(float16)"], "")]
    parameter = onnx.defs.OpSchema.FormalParameter
    schema = onnx.defs.OpSchema(
        name,
        DOMAIN.domain,
        DOMAIN.version,
        inputs=[parameter(word, "T") for word in inputs.split()],
        outputs=[parameter(word, "T") for word in outputs.split()],
        type_constraints=tensor,
        attributes=[onnx.defs.OpSchema.Attribute(word, kind, required=True) for word, kind in attributes.items()],
    )
    return Op(DOMAIN, name, schema)


_INT, _FLOAT = onnx.defs.OpSchema.AttrType.INT, onnx.defs.OpSchema.AttrType.FLOAT
_GROUP_NORM = _operator("GroupNorm", "x weight bias", "y mean rstd", groups=_INT, epsilon=_FLOAT, silu=_INT)
_GROUP_NORM_PULL = _operator(
    "GroupNormPull", "cotangent x mean rstd weight bias", "x_cotangent", groups=_INT, silu=_INT
)
_INTERLEAVE = _operator("Interleave", "phases", "image")
_INTERLEAVE_PULL = _operator("InterleavePull", "image", "phases")


def _group_norm(x, weight, bias, groups: int, epsilon: float, silu: bool):  # type: ignore[no-untyped-def]
    return _GROUP_NORM(x, weight, bias, groups=groups, epsilon=epsilon, silu=int(silu))


def _group_norm_pull(cotangent, x, mean, rstd, weight, bias, groups: int, silu: bool):  # type: ignore[no-untyped-def]
    return _GROUP_NORM_PULL(cotangent, x, mean, rstd, weight, bias, groups=groups, silu=int(silu))


_TRANSLATIONS = {
    torch.ops.rlsd.group_norm.default: _group_norm,
    torch.ops.rlsd.group_norm_pull.default: _group_norm_pull,
    torch.ops.rlsd.interleave.default: lambda phases: _INTERLEAVE(phases),
    torch.ops.rlsd.interleave_pull.default: lambda cotangent: _INTERLEAVE_PULL(cotangent),
}
