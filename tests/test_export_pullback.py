"""The pull-back exporter against torch's automatic differentiation, and its exact rewrites."""

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from rlsd.export.onnx_graph import to_onnx  # noqa: E402
from rlsd.export.pullback import split  # noqa: E402
from rlsd.export.trace import REWRITES, phase_kernels, to_aten  # noqa: E402


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(12, 36), nn.Linear(12, 12), nn.LayerNorm(12)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))


def upsampled(*tail: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Upsample(scale_factor=2, mode="nearest"), *tail)


MODULES = {
    "norm+silu": (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 5, 1)),
        (3, 6, 7),
    ),
    "norm alone": (nn.Sequential(nn.GroupNorm(3, 6), nn.Tanh()), (6, 5, 4)),
    "norm without weights": (nn.Sequential(nn.GroupNorm(3, 6, affine=False), nn.Sigmoid()), (6, 5, 4)),
    "upsampling folded": (upsampled(nn.Conv2d(8, 4, 3, padding=1), nn.SiLU()), (3, 5, 6)),
    "upsampling alone": (upsampled(nn.GELU()), (3, 5, 6)),
    "circular padding": (nn.Sequential(nn.CircularPad2d((1, 2, 0, 3)), nn.Conv2d(3, 4, 3), nn.SiLU()), (3, 6, 7)),
    "replicated padding": (nn.Sequential(nn.ReplicationPad2d((2, 1, 0, 3)), nn.Conv2d(3, 4, 3)), (3, 6, 7)),
    "strided, dilated, grouped": (
        nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 3, dilation=2, padding=2)
        ),
        (4, 9, 8),
    ),
    "halved": (
        nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Conv2d(5, 4, 3, stride=2, padding=1)),
        (3, 8, 12),
    ),
    "halved, odd": (nn.Conv2d(3, 5, 3, stride=2, padding=1), (3, 7, 12)),
    "attention": (nn.Sequential(Attention(), Attention()), (7, 12)),
    "mish": (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Mish()), (3, 5, 4)),
    "linear map": (nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3, 4)),
}


@pytest.mark.parametrize("rewrites", [None, ["group_norm"]], ids=["all", "norms only"])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("batch", [1, 3])
def test_split_agrees_with_autograd(name, batch, rewrites):
    torch.manual_seed(1)
    module, shape = MODULES[name]
    x = torch.randn(batch, *shape)
    exact = copy.deepcopy(module).double().requires_grad_(False)
    source = x.double().requires_grad_(True)
    y = exact(source)
    cotangent = torch.randn(y.shape)
    (want,) = torch.autograd.grad(y, source, cotangent.double())

    parts = split(to_aten(module, (x,), rewrites), [x], ["x"])
    got, *kept = parts.forward(x)
    named = {"x": x, **dict(zip(parts.kept, kept))}
    (pulled,) = parts.pull(cotangent, *(named[n] for n in parts.pull_inputs))
    assert (got - y).norm() <= 2e-6 * y.norm()
    assert (pulled - want).norm() <= 4e-6 * want.norm()


@pytest.mark.parametrize("activation", [nn.Mish(), nn.SiLU(), nn.GELU(), nn.ReLU()], ids=str)
def test_the_pull_back_of_a_vaes_activations_has_a_form_in_onnx(activation):
    x = torch.randn(1, 3, 4, 5)
    parts = split(to_aten(activation, (x,)), [x], ["x"])
    given = [
        torch.randn(x.shape),
        *({"x": x, **dict(zip(parts.kept, parts.kept_values))}[n] for n in parts.pull_inputs),
    ]
    to_onnx(parts.pull, given, ["cotangent", *parts.pull_inputs], ["x_cotangent"])


def test_forward_is_evaluated_once():
    """The pull graph starts from what the forward graph kept: no convolution of the forward pass is repeated."""
    module, shape = MODULES["norm+silu"]
    parts = split(to_aten(module, (torch.randn(1, *shape),)), [torch.randn(1, *shape)], ["x"])
    calls = [str(n.target) for n in parts.pull.graph.nodes if n.op == "call_function"]
    assert calls.count("aten.convolution.default") == 2  # one pull-back for each convolution
    assert not any("group_norm.default" in call for call in calls)


def test_phase_kernels_are_exact():
    torch.manual_seed(2)
    x, kernel = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(6, 3, 3, 3, dtype=torch.float64)
    up = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    want = nn.functional.conv2d(up, kernel, padding=1)
    phases = nn.functional.conv2d(x, phase_kernels(kernel), padding=1)
    got = torch.ops.rlsd.interleave(phases)
    assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("name", REWRITES)
def test_each_rewrite_leaves_the_function_as_it_is(name):
    torch.manual_seed(3)
    for module, shape in MODULES.values():
        x = torch.randn(2, *shape)
        want = to_aten(module, (x,), [])(x)
        got = to_aten(module, (x,), [name])(x)
        assert torch.allclose(got, want, atol=2e-5)


class Written(nn.Module):
    def forward(self, x):
        y = torch.zeros_like(x)
        y[:, 1:] = x[:, :-1] ** 2
        return y


def test_writing_into_a_part_is_refused():
    x = torch.randn(1, 3)
    with pytest.raises(NotImplementedError, match=r"copy_.* changes a part of a tensor"):
        split(Written(), [x], ["x"])
