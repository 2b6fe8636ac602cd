"""The rewrites for CUDA on modules that Stable Diffusion does not have, but other networks may."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from taken_apart import ALL, kinds, taken_apart
from torch import fx, nn

from rlsd.export.fused_narrow import fuse_narrow
from rlsd.export.fused_norms import fuse_layer_norms
from rlsd.export.fusions import fuse_rows
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


@pytest.mark.parametrize("rows, fused", [(2**15, True), (2**16, False)])
def test_a_gelu_of_more_values_than_its_kernel_counts_stays(rows: int, fused: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    gelu = graph.call_function(torch.ops.aten.gelu.default, (x,))
    graph.output(gelu)
    x.meta["val"] = gelu.meta["val"] = torch.empty(rows, 2**15, device="meta")
    fuse_rows(module := fx.GraphModule({}, graph))
    assert any(node.target == torch.ops.rlsd.gelu.default for node in module.graph.nodes) == fused


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


class Of(nn.Module):
    """A function of x and of layers or constants with names."""

    def __init__(self, function: Callable[..., torch.Tensor], **parts: nn.Module | torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part) if isinstance(part, nn.Module) else self.register_buffer(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def attended(x: torch.Tensor, **given: object) -> torch.Tensor:
    """Self-attention of two heads, x [B, L, C]."""
    q = x.view(*x.shape[:2], 2, -1).transpose(1, 2)
    y = nn.functional.scaled_dot_product_attention(q, q, q, **given)  # type: ignore[arg-type]
    return y.transpose(1, 2).reshape(x.shape)


def gated(m: Of, x: torch.Tensor, kind: str = "none") -> torch.Tensor:
    value, gate = m.wide(x).chunk(2, -1)
    return value * nn.functional.gelu(gate, approximate=kind)


def gate_of_another(m: Of, x: torch.Tensor) -> torch.Tensor:
    value, gate = m.wide(x).chunk(2, -1)
    return m.other(x) * nn.functional.gelu(gate) + value


IMAGE, TOKENS = (2, 16, 6, 8), (2, 5, 16)
UNLIKE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention with a scale of its own": (lambda: Of(lambda _, x: attended(x, scale=0.5)), TOKENS),
    "attention to what came before": (lambda: Of(lambda _, x: attended(x, is_causal=True)), TOKENS),
    "attention with a mask": (
        lambda: Of(lambda m, x: attended(x, attn_mask=m.mask), mask=(torch.arange(5) < 3)[None]),
        TOKENS,
    ),
    "an approximate GELU": (lambda: nn.GELU("tanh"), TOKENS),
    "a gate of an approximate GELU": (lambda: Of(lambda m, x: gated(m, x, "tanh"), wide=nn.Linear(16, 2560)), TOKENS),
    "a gate of another value": (
        lambda: Of(gate_of_another, wide=nn.Linear(16, 2560), other=nn.Linear(16, 1280)),
        TOKENS,
    ),
    "a LayerNorm over two axes": (lambda: nn.Sequential(nn.Linear(16, 16), nn.LayerNorm((5, 16))), TOKENS),
    "a bias behind a view that divides it": (
        lambda: Of(lambda m, x: m.linear(x).view(2, 10, 16) + torch.cat([x, x], 1), linear=nn.Linear(16, 32)),
        TOKENS,
    ),
    "a bias that another reads before the view": (
        lambda: Of(lambda m, x: (y := m.linear(x)).view(10, 16) + x.view(10, 16) + y.sum(), linear=nn.Linear(16, 16)),
        TOKENS,
    ),
    "a bias that a norm and another read": (
        lambda: Of(lambda m, x: m.norm(y := m.conv(x)) * y, conv=nn.Conv2d(16, 16, 1), norm=nn.GroupNorm(4, 16)),
        IMAGE,
    ),
    "a GroupNorm of a sum of two types": (
        lambda: Of(
            lambda m, x: m.norm(m.conv(x) + x.detach().float()), conv=nn.Conv2d(16, 16, 1), norm=nn.GroupNorm(4, 16)
        ),
        IMAGE,
    ),
    "a sum with one row of each": (
        lambda: Of(lambda m, x: m.linear(x) + x.mean(1, keepdim=True), linear=nn.Linear(16, 16)),
        TOKENS,
    ),
    "a GroupNorm of a sum of tokens": (
        lambda: Of(lambda m, x: m.norm((x + x.tanh()).transpose(1, 2)), norm=nn.GroupNorm(4, 16)),
        TOKENS,
    ),
    "a convolution in groups": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=2), IMAGE),
    "a convolution with gaps": (lambda: nn.Conv2d(16, 16, 3, padding=2, dilation=2), IMAGE),
    "a convolution that sees nothing at its border": (lambda: nn.Conv2d(16, 16, 1, padding=1), IMAGE),
    "an image times a row of three axes": (
        lambda: Of(lambda m, x: m.conv(x) * m.row, conv=nn.Conv2d(16, 16, 1), row=torch.randn(16, 1, 1)),
        IMAGE,
    ),
    "images below each other": (
        lambda: Of(lambda m, x: torch.cat([m.conv(x), x], 2), conv=nn.Conv2d(16, 16, 1)),
        IMAGE,
    ),
    "tokens turned twice": (
        lambda: Of(lambda m, x: m.conv(x).flatten(2).transpose(0, 1).transpose(1, 2), conv=nn.Conv2d(16, 16, 1)),
        IMAGE,
    ),
    "an image lying on its side": (
        lambda: Of(lambda m, x: m.conv(x).permute(0, 1, 3, 2), conv=nn.Conv2d(16, 16, 1)),
        IMAGE,
    ),
    "an upsampling before a convolution in groups": (
        lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(16, 16, 3, padding=1, groups=2)),
        IMAGE,
    ),
    "an upsampling by a broken factor": (lambda: nn.Sequential(nn.Upsample(scale_factor=1.5), nn.Tanh()), IMAGE),
    "an upsampling by unlike factors": (
        lambda: nn.Sequential(nn.Upsample(scale_factor=(2, 3)), nn.Conv2d(16, 16, 3, padding=1)),
        IMAGE,
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_a_rewrite_is_not_made_for_stays_what_it_is(name: str) -> None:
    """Each is nearly what a rewrite looks for: one that forgot to look closely would change its values."""
    make, shape = UNLIKE[name]
    module, x = make().double(), torch.randn(shape, dtype=torch.float64)
    taken_apart(module, x, ALL)
    graph = to_aten(module, [x], ALL)
    fuse_layer_norms(graph)  # which have no pull-back
    fuse_narrow(graph)
    assert torch.allclose(graph(x), module(x), rtol=0, atol=1e-12)
