"""Moves a graph from [B, C, H, W] to [B, H, W, C], the layout of the tensor cores.

One walk in the order of the graph. A value that has been moved is a `permute` of its channels-last companion, which
dies when nobody needs it; what follows takes the companion. Transposes remain at the graph's border only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from rlsd.export.fused_ops import halves_the_image
from rlsd.export.graph import add_buffer, arguments, constant, replace
from rlsd.export.ops import LANES
from rlsd.kernels.norm.naive import precise

aten = torch.ops.aten
LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
ELEMENTWISE = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.add_.Tensor, aten.silu.default,
    aten.relu.default, aten.sigmoid.default, aten.neg.default, aten.gelu.default, aten.tanh.default,
    torch.ops.rlsd.gelu.default,
}  # fmt: skip


def channels_last(graph_module: fx.GraphModule) -> None:
    """The rewrite, in place. What has no channels-last form keeps its layout, with a transpose on either side."""
    rules = {
        aten.conv2d.default: _convolution,
        torch.ops.rlsd.group_norm.default: _group_norm,
        torch.ops.rlsd.interleave.default: _interleave,
        aten.cat.default: _concatenation,
        aten.permute.default: _permutation,
        aten.view.default: _view,
        aten.reshape.default: _view,
        aten.transpose.int: _transposition,
        **dict.fromkeys(ELEMENTWISE, _elementwise),
    }
    for node in list(graph_module.graph.nodes):
        rule = rules.get(node.target) if node.op == "call_function" else None
        if rule is not None:
            rule(graph_module, node)
    graph_module.graph.eliminate_dead_code()


def _call(gm: fx.GraphModule, before: fx.Node, target: object, args: tuple, value: Tensor | None) -> fx.Node:
    with gm.graph.inserting_before(before):
        node = gm.graph.call_function(target, args)  # type: ignore[arg-type]
    if value is not None:
        node.meta["val"] = value
    return node


def _moved(node: object) -> fx.Node | None:
    """The channels-last companion, where there is one."""
    if isinstance(node, fx.Node) and node.target == aten.permute.default and list(node.args[1]) == FIRST:  # type: ignore[call-overload]
        return node.args[0]  # type: ignore[return-value]
    return None


def _companion(gm: fx.GraphModule, node: fx.Node, before: fx.Node) -> fx.Node:
    return _moved(node) or _call(gm, before, aten.permute.default, (node, LAST), node.meta["val"].permute(LAST))


def _finish(gm: fx.GraphModule, node: fx.Node, moved: fx.Node) -> None:
    """Puts the permuted `moved` in the place of `node`."""
    back = _call(gm, node, aten.permute.default, (moved, FIRST), None)
    replace(node, back)


def _convolution(gm: fx.GraphModule, node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, groups = arguments(node, None, None, None, [1, 1], [0, 0], [1, 1], 1)
    kernel = constant(gm, weight)
    if kernel is None or groups != 1 or any(d != 1 for d in dilation) or isinstance(padding, str):
        return
    if any(s != 1 for s in stride) and not halves_the_image(x.meta["val"].shape[2:], kernel.shape[2:], stride, padding):
        return  # patches of a transformer, say: conv_nhwc has no pull-back for it
    if any(p >= k for p, k in zip(padding, kernel.shape[2:])):
        return  # nor for this
    stored = add_buffer(gm, node, "nhwc_weight", kernel.permute(0, 2, 3, 1))
    args = (_companion(gm, x, node), stored, bias, list(stride), list(padding))
    value = node.meta["val"].permute(LAST)
    _finish(gm, node, _call(gm, node, torch.ops.rlsd.conv_nhwc.default, args, value))


def _group_norm(gm: fx.GraphModule, node: fx.Node) -> None:
    x, weight, bias, groups, epsilon, silu, last = arguments(node, None, None, None, None, None, None, False)
    if last:
        return
    value = x.meta["val"]
    if value.dim() == 3:
        moved = _transposed(x) or _call(gm, node, aten.transpose.int, (x, 1, 2), value.transpose(1, 2))
    else:
        moved = _companion(gm, x, node)
    weight, bias = (_precise(gm, node, name, value) for name, value in (("weight", weight), ("bias", bias)))
    fused = _call(gm, node, node.target, (moved, weight, bias, groups, epsilon, silu, True), None)
    for user in list(node.users):  # getitem
        part = _call(gm, node, user.target, (fused, user.args[1]), None)
        if user.args[1] != 0:
            replace(user, part)
            continue
        part.meta["val"] = moved.meta["val"]
        if value.dim() == 3:
            replace(user, _call(gm, node, aten.transpose.int, (part, 1, 2), None))
        else:
            replace(user, _call(gm, node, aten.permute.default, (part, FIRST), None))


def _precise(gm: fx.GraphModule, node: fx.Node, name: str, source: fx.Node) -> fx.Node:
    """A norm's weights stay float32 beside activations in halves: they are few, and kernels/norm wants them so."""
    value = constant(gm, source)
    return source if value is None else add_buffer(gm, node, f"nhwc_{name}", value.to(precise(value.dtype)))


def _interleave(gm: fx.GraphModule, node: fx.Node) -> None:
    """The phases become blocks of channels: the convolution before makes them in that order."""
    phases = _moved(node.args[0])
    if phases is None or phases.target != torch.ops.rlsd.conv_nhwc.default:
        return
    x, weight, bias, *rest = phases.args
    kernel, shift = constant(gm, weight), constant(gm, bias) if bias is not None else None  # type: ignore[arg-type]
    assert kernel is not None, "made by _convolution"
    value = node.meta["val"].permute(LAST)
    channels = value.shape[3]
    filled = channels + -channels % LANES  # with zeros, where the kernel that interleaves does not take so few
    ordered = add_buffer(gm, phases, "blocks_weight", _blocks(kernel, filled))
    shifted = None if shift is None else add_buffer(gm, phases, "blocks_bias", _blocks(shift, filled))
    apart = phases.meta["val"]
    again = _call(gm, node, phases.target, (x, ordered, shifted, *rest), apart.new_empty(*apart.shape[:3], 4 * filled))
    image = _call(gm, node, node.target, (again, True), value.new_empty(*value.shape[:3], filled))
    if filled != channels:
        image = _call(gm, node, aten.slice.Tensor, (image, 3, 0, channels), value)
    _finish(gm, node, image)


def _blocks(rows: Tensor, channels: int) -> Tensor:
    """[4 C, ...], a channel's four phases side by side -> [4 * channels, ...], a phase's channels; zeros are added."""
    phases = rows.reshape(-1, 4, *rows.shape[1:]).transpose(0, 1)
    more = phases.new_zeros(4, channels - phases.shape[1], *rows.shape[1:])
    return torch.cat([phases, more], 1).flatten(0, 1).contiguous()


def _elementwise(gm: fx.GraphModule, node: fx.Node) -> None:
    tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if node.meta["val"].dim() != 4 or not any(_moved(arg) for arg in tensors):
        return
    if any(arg.meta["val"].dim() not in (0, 4) for arg in tensors):
        return
    moved = [_broadcast(gm, arg, node) if arg in tensors else arg for arg in node.args]
    value = node.meta["val"].permute(LAST)
    _finish(gm, node, _call(gm, node, node.target, tuple(moved), value))


def _broadcast(gm: fx.GraphModule, arg: fx.Node, node: fx.Node) -> fx.Node:
    """The companion; for rows of a table of [T, C, 1, 1], rows of the table moved once and for all."""
    value = arg.meta["val"]
    if value.dim() == 0:
        return arg
    table = constant(gm, arg.args[0]) if arg.target == aten.index_select.default else None  # type: ignore[arg-type]
    if table is None or value.shape[2:] != (1, 1):
        return _companion(gm, arg, node)
    stored = add_buffer(gm, arg, "nhwc_table", table.permute(LAST))
    return _call(gm, node, arg.target, (stored, *arg.args[1:]), value.permute(LAST))


def _concatenation(gm: fx.GraphModule, node: fx.Node) -> None:
    parts, axis = arguments(node, None, 0)
    if node.meta["val"].dim() != 4 or axis not in (1, -3) or not any(_moved(part) for part in parts):
        return
    value = node.meta["val"].permute(LAST)
    moved = [_companion(gm, part, node) for part in parts]
    _finish(gm, node, _call(gm, node, node.target, (moved, 3), value))


def _permutation(gm: fx.GraphModule, node: fx.Node) -> None:
    companion = _moved(node.args[0])
    if companion is not None and list(node.args[1]) == LAST:  # type: ignore[call-overload]
        replace(node, companion)


def _view(gm: fx.GraphModule, node: fx.Node) -> None:
    """[B, C, H, W] <-> [B, C, H W], whose channels-last forms are [B, H, W, C] <-> [B, H W, C]."""
    source, value = node.args[0], node.meta["val"]
    before = source.meta["val"].shape  # type: ignore[union-attr]
    companion = _moved(source)
    if companion is not None and _merges(before, value.shape):
        tokens = [before[0], before[2] * before[3], before[1]]
        flat = _call(gm, node, aten.reshape.default, (companion, tokens), value.transpose(1, 2))
        replace(node, _call(gm, node, aten.transpose.int, (flat, 1, 2), None))
    rows = _transposed(source)
    if rows is not None and _merges(value.shape, before):
        moved = value.permute(LAST)
        _finish(gm, node, _call(gm, node, aten.reshape.default, (rows, list(moved.shape)), moved))


def _merges(apart: Sequence[int], merged: Sequence[int]) -> bool:
    return len(apart) == 4 and tuple(merged) == (apart[0], apart[1], apart[2] * apart[3])


def _transposed(node: object) -> fx.Node | None:
    """The source of a transposition of the last two of three axes."""
    if not isinstance(node, fx.Node) or node.target != aten.transpose.int or node.meta["val"].dim() != 3:
        return None
    source, *axes = node.args
    return source if {axis % 3 for axis in axes} == {1, 2} else None  # type: ignore[operator,return-value]


def _transposition(gm: fx.GraphModule, node: fx.Node) -> None:
    source = _transposed(node.args[0]) if _transposed(node) is not None else None
    if source is not None:
        replace(node, source)
