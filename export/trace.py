"""From a torch module to a small ATen graph, and the exact rewrites that every graph gets.

All graphs have static shapes: one graph for each batch size. Each rewrite leaves the computed function as it
is and can be left out by name, so that what it brings can be measured.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlsd.export import ops
from rlsd.export.channels_last import channels_last
from rlsd.export.fused_biases import fuse_biases
from rlsd.export.fused_sums import fuse_sums
from rlsd.export.fusions import drop_no_ops, fuse_attention, fuse_geglu, fuse_rows, plain_linear
from rlsd.export.graph import add_buffer, arguments, calls, constant, replace
from rlsd.export.padding import plain_padding

aten = torch.ops.aten


def to_aten(module: nn.Module, args: Sequence[Tensor], rewrites: Sequence[str] | None = None) -> fx.GraphModule:
    """Captures `module(*args)` as an ATen graph with frozen weights, then applies `rewrites` (default: all)."""
    module = module.eval().requires_grad_(False)
    with plain_attention():
        graph_module = torch.export.export(module, tuple(args), strict=False).module(check_guards=False)
    plain_padding(graph_module)
    for name in REWRITES if rewrites is None else rewrites:
        (REWRITES | CUDA_REWRITES)[name](graph_module)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as matrix products and a softmax: the only form with a pull-back that ONNX can express."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def fuse_group_norm(graph_module: fx.GraphModule) -> None:
    """Makes each GroupNorm, with the SiLU behind it where there is one, a single node."""
    for node in calls(graph_module, aten.group_norm.default):
        x, groups, weight, bias, epsilon = arguments(node, None, None, None, None, 1e-5)
        shape = x.meta["val"].shape
        channels = shape[1]
        weight = weight or add_buffer(graph_module, node, "weight", torch.ones(channels, dtype=x.meta["val"].dtype))
        bias = bias or add_buffer(graph_module, node, "bias", torch.zeros(channels, dtype=x.meta["val"].dtype))
        users = list(node.users)
        silu = len(users) == 1 and users[0].target in (aten.silu.default, aten.silu_.default)
        last = users[0] if silu else node
        graph = graph_module.graph
        with graph.inserting_before(last):
            if len(shape) not in (3, 4):  # the others' kernels: every further axis is one of pixels
                x = graph.call_function(aten.reshape.default, (x, [shape[0], channels, shape[2:].numel()]))
                x.meta["val"] = node.meta["val"].reshape(x.args[1])
            fused = graph.call_function(torch.ops.rlsd.group_norm.default, (x, weight, bias, groups, epsilon, silu))
            y = graph.call_function(operator.getitem, (fused, 0))
            if len(shape) not in (3, 4):
                y.meta["val"] = x.meta["val"]
                y = graph.call_function(aten.reshape.default, (y, list(shape)))
        replace(last, y)


def fold_upsampling(graph_module: fx.GraphModule) -> None:
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution: one 2x2 convolution at 4/9 of the work.

    Each of the four phases of the output sees only 2x2 source pixels. The four 2x2 kernels are stacked along
    the output channels; their results interleave to an image with a border of one pixel too many.
    """
    for node in calls(graph_module, aten.conv2d.default):
        upsampled, weight, bias, stride, padding, dilation, groups = arguments(
            node, None, None, None, [1, 1], [0, 0], [1, 1], 1
        )
        source = _source_of_doubling(upsampled)
        kernel = constant(graph_module, weight)
        plain = (list(stride), list(padding), list(dilation), groups) == ([1, 1], [1, 1], [1, 1], 1)
        if source is None or kernel is None or not plain or kernel.shape[-2:] != (3, 3):
            continue
        if len(upsampled.users) != 1:
            continue
        stacked = add_buffer(graph_module, node, "phases_weight", phase_kernels(kernel))
        offset = constant(graph_module, bias) if bias is not None else None
        shift = None if offset is None else add_buffer(graph_module, node, "phases_bias", offset.repeat_interleave(4))
        graph = graph_module.graph
        with graph.inserting_before(node):
            phases = graph.call_function(aten.conv2d.default, (source, stacked, shift, [1, 1], [1, 1]))
            batch, _, height, width = source.meta["val"].shape
            phases.meta["val"] = kernel.new_empty(batch, 4 * kernel.shape[0], height + 1, width + 1, device="meta")
            result = graph.call_function(torch.ops.rlsd.interleave.default, (phases,))
        replace(node, result)


def phase_kernels(kernel: Tensor) -> Tensor:
    """[O, I, 3, 3] -> [4 O, I, 2, 2], in the order that rlsd::interleave wants."""
    odd = torch.stack([kernel[:, :, 0] + kernel[:, :, 1], kernel[:, :, 2]], 2)  # rows i, i+1
    even = torch.stack([kernel[:, :, 0], kernel[:, :, 1] + kernel[:, :, 2]], 2)  # rows i-1, i
    phases = [
        torch.stack(pair, 3)
        for rows in (odd, even)
        for pair in (
            [rows[..., 0] + rows[..., 1], rows[..., 2]],
            [rows[..., 0], rows[..., 1] + rows[..., 2]],
        )
    ]
    return torch.stack(phases, 1).reshape(4 * kernel.shape[0], kernel.shape[1], 2, 2)


def expand_upsampling(graph_module: fx.GraphModule) -> None:
    """Any other nearest-neighbour upsampling by a whole factor: an expand, whose pull-back is a plain sum."""
    for node in calls(graph_module, aten.upsample_nearest2d.vec):
        x = node.args[0]
        batch, channels, height, width = x.meta["val"].shape
        up, across = node.meta["val"].shape[2] / height, node.meta["val"].shape[3] / width
        if up != int(up) or across != int(across):
            continue
        up, across = int(up), int(across)
        graph = graph_module.graph
        with graph.inserting_before(node):
            apart = graph.call_function(aten.reshape.default, (x, [batch, channels, height, 1, width, 1]))
            wide = graph.call_function(aten.expand.default, (apart, [batch, channels, height, up, width, across]))
            result = graph.call_function(aten.reshape.default, (wide, list(node.meta["val"].shape)))
        apart.meta["val"] = x.meta["val"].reshape(apart.args[1])
        wide.meta["val"] = apart.meta["val"].expand(wide.args[1])
        replace(node, result)


REWRITES: dict[str, Callable[[fx.GraphModule], None]] = {
    "no_ops": drop_no_ops,
    "group_norm": fuse_group_norm,
    "upsampling": fold_upsampling,
    "nearest": expand_upsampling,
}
# Of these, what leaves nothing but ONNX's own operators: all that a forward operator gets in a bundle for a GPU, where
# the engine has kernels for channels last only, and these graphs stay channels first.
PLAIN_REWRITES = ("no_ops", "nearest")
# For a GPU on top of these, in this order.
CUDA_REWRITES: dict[str, Callable[[fx.GraphModule], None]] = {
    "attention": fuse_attention,
    "geglu": fuse_geglu,
    "rows": fuse_rows,
    "linear": plain_linear,
    "channels_last": channels_last,
    "sums": fuse_sums,
    "biases": fuse_biases,
}


# All that can be left out by name; the last ones are no rewrites of the traced graph.
SAVINGS = (*REWRITES, "timesteps")
CUDA_SAVINGS = (*REWRITES, *CUDA_REWRITES, "narrow", "phases", "timesteps", "context", "recompute")


def all_but(savings: Sequence[str], without: Sequence[str]) -> list[str]:
    """The savings that remain. Raises ValueError for a name that is not among them."""
    for name in without:
        if name not in savings:
            raise ValueError(f"saving {name!r} is not known: {', '.join(savings)}")
    return [name for name in savings if name not in without]


def _source_of_doubling(node: fx.Node) -> fx.Node | None:
    if node.target != aten.upsample_nearest2d.vec:
        return None
    source = node.args[0]
    before, after = source.meta["val"].shape, node.meta["val"].shape
    return source if tuple(after[2:]) == (2 * before[2], 2 * before[3]) else None


assert ops  # registers rlsd::group_norm
