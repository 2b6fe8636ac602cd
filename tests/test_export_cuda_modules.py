"""The rewrites for CUDA on modules that Stable Diffusion does not have, but other networks may."""

from __future__ import annotations

import pytest
import torch
from taken_apart import ALL, kinds, taken_apart
from torch import nn

from rlsd.export.trace import to_aten


class Tokens(nn.Module):
    """Patches whose tokens are normalised and then taken together, whatever order the convolution left them in."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.head = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(self.patches(image).flatten(2).transpose(1, 2))
        return self.head(tokens.view(-1, 16)).unflatten(0, (len(image), -1)).mean(1)


def test_rows_may_lie_in_any_order() -> None:
    taken_apart(Tokens().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64), ALL)


class Norms(nn.Module):
    """GroupNorms of what is no image: vectors, and volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors, self.volumes, self.head = nn.GroupNorm(4, 96), nn.GroupNorm(2, 16), nn.Linear(96, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        volumes = nn.functional.silu(self.volumes(x.view(len(x), 16, 3, 2, 1)))
        return self.head(self.vectors(volumes.flatten(1)))


def test_a_norm_of_any_number_of_axes() -> None:
    parts, given = taken_apart(Norms().double(), torch.randn(2, 96, dtype=torch.float64), ALL)
    assert kinds(parts.pull, given, ["cotangent", *parts.pull_inputs], ["x"])["rlsd.GroupNormPullNhwc"] == 2
    x = torch.randn(2, 96)
    plain = Norms()
    assert torch.allclose(to_aten(plain, [x], ["no_ops", "group_norm"])(x), plain(x), atol=1e-5)


class Unlike(nn.Module):
    """Attention whose values are wider than its queries, or of whose queries two share their keys and values."""

    def __init__(self, wide: int, shared: int) -> None:
        super().__init__()
        self.wide, self.shared = wide, shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = [4 * 16, 4 * 16 // self.shared, 4 * 16 * self.wide // self.shared]
        heads = [4, 4 // self.shared, 4 // self.shared]
        q, k, v = (part.reshape(2, 5, n, -1).transpose(1, 2) for part, n in zip(x.split(split, 2), heads))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.shared > 1)
        return y.transpose(1, 2).reshape(2, 5, -1)


@pytest.mark.parametrize("wide, shared", [(1, 1), (2, 1), (1, 2)])
def test_attention_that_no_kernel_has_stays_what_it_is(wide: int, shared: int) -> None:
    x = torch.randn(2, 5, 64 + 64 // shared + 64 * wide // shared, dtype=torch.float64)
    parts, _ = taken_apart(Unlike(wide, shared), x, ALL)
    fused = [node for node in parts.forward.graph.nodes if node.target == torch.ops.rlsd.attention.default]
    assert len(fused) == (wide == shared == 1)
    (result,) = [node for node in parts.forward.graph.nodes if node.op == "output"]
    assert result.args[0][0].meta["val"].shape[2] == 64 * wide


class Times(nn.Module):
    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return (t * 1.0) / 1000 + (t + 0.0) / 7 + t / 1


def test_a_product_with_one_may_make_a_fraction_of_a_whole_number() -> None:
    t = torch.tensor([3, 998])
    graph = to_aten(Times(), [t], ["no_ops"])
    assert torch.equal(graph(t), Times()(t))
    assert all(node.meta["val"].is_floating_point() for node in graph.graph.nodes if node.op == "call_function")
