"""A module's graphs for CUDA, cut in two: they do what autograd does, and what they are made of."""

from __future__ import annotations

import torch
from torch import nn

from rlsd.export import census
from rlsd.export.fused_sums import fuse_pulled_phases, fuse_pulled_sums
from rlsd.export.onnx_graph import to_onnx
from rlsd.export.pullback import RECOMPUTED_ON_CUDA, Split, split
from rlsd.export.trace import CUDA_REWRITES, REWRITES, to_aten

ALL = [*REWRITES, *CUDA_REWRITES]


def taken_apart(
    module: nn.Module, x: torch.Tensor, rewrites: list[str], atol: float = 1e-12
) -> tuple[Split, list[torch.Tensor]]:
    """The module and its pull-back, which do what autograd does to `atol`; and what the pull-back was given."""
    source = x.clone().requires_grad_()
    y = module(source)
    cotangent = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, source, cotangent)
    parts = split(to_aten(module, [x], rewrites), [x], ["x"], recomputed=RECOMPUTED_ON_CUDA)
    if "sums" in rewrites:
        fuse_pulled_sums(parts.pull)
        fuse_pulled_phases(parts.pull)
    got, *kept = parts.forward(x)
    known = {"x": x, **dict(zip(parts.kept, kept))}
    given = [cotangent, *(known[name] for name in parts.pull_inputs)]
    assert torch.allclose(got, y, rtol=0, atol=1e-12)
    assert torch.allclose(parts.pull(*given)[0], want, rtol=0, atol=atol)
    return parts, given


def kinds(module: nn.Module, args: list[torch.Tensor], inputs: list[str], outputs: list[str]) -> dict[str, int]:
    return census.node_kinds(to_onnx(module, args, inputs, outputs))
