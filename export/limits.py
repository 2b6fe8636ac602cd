"""What the GroupNorm kernels of a bundle for CUDA take, so that an export says it and not who runs the bundle."""

from __future__ import annotations

import math

import torch
from torch import fx

from rlsd.export.check import CheckError
from rlsd.export.ops import LANES
from rlsd.kernels.norm.tiles import divide

LARGEST_GROUP = 128  # engine/src/device_division.h: Division
PARTIAL_BYTES = 4 << 20  # of two float32 a chunk of pixels and group: half of scratch_bytes there
PULLED_BLOCK = 64  # rlsd.kernels.norm has the pull-back for these lanes alone


def check_norms(name: str, graph_module: fx.GraphModule) -> None:
    """CheckError where a GroupNorm of the graph `name` has a size that its kernel does not take."""
    ours = torch.ops.rlsd
    places = {  # of the number of groups among the arguments
        ours.group_norm.default: 3,
        ours.add_group_norm_nhwc.default: 4,
        ours.group_norm_taps.default: 5,
        ours.add_group_norm_taps.default: 6,
        ours.group_norm_pull.default: 6,
        ours.group_norm_pull_nhwc.default: 6,
        ours.group_norm_pull_phases.default: 6,
    }
    pulls = [target for target, place in places.items() if "pull" in str(target)]
    for node in graph_module.graph.nodes:
        if node.target not in places:
            continue
        x, groups = node.args[0].meta["val"], node.args[places[node.target]]
        samples, *pixels, channels = x.shape
        division = divide(samples, math.prod(pixels), channels, groups, x.element_size())
        fits = channels % LANES == 0 and channels // groups <= LARGEST_GROUP and division.align > 1
        if not fits or (node.target in pulls and division.block != PULLED_BLOCK):
            raise CheckError(
                f"graph {name}: a GroupNorm of {channels} channels in {groups} groups is not for the GPU's kernel, "
                f"which takes multiples of {LANES} channels, {LARGEST_GROUP} in a group at most (in a pull-back "
                f"divisors of {PULLED_BLOCK}), multiples of 16 bytes in a few groups; leave out the saving group_norm"
            )
        if samples * division.grid[1] * groups * 8 > PARTIAL_BYTES:
            raise CheckError(
                f"graph {name}: a GroupNorm of {groups} groups and a batch of {samples} need more than "
                f"{PARTIAL_BYTES >> 20} MB for partial sums; export smaller batches, or leave out the saving group_norm"
            )
